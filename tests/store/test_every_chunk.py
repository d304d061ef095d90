"""A shard that is not there counts as lost: so all that is written is there, whatever values it holds."""

import gc
import logging
import uuid
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.core.sync import sync
from zarr.storage import LocalStore

from aura_dist.errors import StoreError
from aura_dist.store import grid
from aura_dist.store.access import get_array, is_there, open_group, read_array, read_region, store_at
from aura_dist.store.schema import ArrayLayout, create_arrays
from aura_dist.store.shards import shard_writes
from aura_dist.store.writer import ChunkWriter
from tests.stores import make_store

SHAPE, CHUNKS, SHARDS = (10, 7), (4, 3), (4, 6)


@pytest.fixture(params=["directory", "memory://"])
def group(request, tmp_path):
    """An empty group, on disk or behind a URL."""
    path = str(tmp_path / "s.zarr") if request.param == "directory" else f"{request.param}{uuid.uuid4().hex}"
    return zarr.open_group(store_at(path), mode="w", zarr_format=3)


def write(array, start, values):
    for one in shard_writes(array, start, values):
        sync(one())


@pytest.mark.parametrize(("dtype", "fill"), [("float32", np.nan), ("float16", np.nan), ("int64", 0)])
def test_chunks_of_fill_values_are_written_with_the_others(group, dtype, fill):
    create_arrays(group, {"a/b/values": ArrayLayout(SHAPE, CHUNKS, dtype, ("row", "column"), fill, SHARDS)})
    array = get_array(group, "a/b/values")
    values = np.arange(1, 71).reshape(SHAPE).astype(dtype)
    values[0:4, 3:6] = values[8:10, 6:7] = fill  # a whole chunk, and one that the array ends in
    values[5, 1] = fill  # not all of its chunk
    write(array, (0, 0), values)
    np.testing.assert_array_equal(read_array(group, "a/b/values", complete=True), values)
    values[4:8] = fill  # a whole row chunk
    write(array, (4, 0), values[4:8])
    np.testing.assert_array_equal(read_array(group, "a/b/values", complete=True), values)
    np.testing.assert_array_equal(np.asarray(array[...]), values, err_msg="as zarr reads it")
    region = (slice(4, 10), slice(3, 7))
    np.testing.assert_array_equal(read_region(group, array, region, complete=True), values[region])


def test_shards_of_zarr_are_read_and_gaps_in_them(group):
    create_arrays(group, {"a/b/values": ArrayLayout(SHAPE, CHUNKS, "float32", ("row", "column"), np.nan, SHARDS)})
    array = get_array(group, "a/b/values")
    values = np.arange(70, dtype=np.float32).reshape(SHAPE)
    values[0:4, 3:6] = np.nan  # zarr leaves this chunk out of its shard
    array[...] = values
    np.testing.assert_array_equal(read_array(group, "a/b/values", complete=True), values)
    if isinstance(group.store, LocalStore):
        (group.store.root / "a/b/values/c/1/0").unlink()
        values[4:8, :6] = np.nan
        np.testing.assert_array_equal(read_array(group, "a/b/values"), values)
        with pytest.raises(StoreError, match=r"a/b/values/c/1/0' is missing"):
            read_array(group, "a/b/values", complete=True)


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda content: content[:-1], "the checksum of its index is wrong"),
        (lambda content: content[len(content) // 2 :], "the checksum of a chunk in it is wrong"),
        (lambda content: content[:8], "it is cut short"),
        (lambda content: bytes(len(content)), "the checksum of its index is wrong"),
        (lambda content: b"", "it is cut short"),
        (lambda content: _flipped(content, len(content) - 10), "the checksum of its index is wrong"),
        (lambda content: _flipped(content, 0), "the checksum of a chunk in it is wrong"),
        (lambda content: _flipped(content, 30), "the checksum of a chunk in it is wrong"),
    ],
)
def test_damaged_shard_is_named(damage, why, tmp_path):
    group = open_group(str(make_store(tmp_path / "s.zarr", 40, (96,))))
    array = get_array(group, "activations/layers.0.up/max")
    shard = tmp_path / "s.zarr" / array.path / "c" / "0" / "0"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(StoreError, match=f"max/c/0/0' is damaged: {why}.*collect again with --overwrite"):
        read_region(group, array, (slice(0, 32), slice(0, 6)))
    assert np.isfinite(read_region(group, array, (slice(32, 40), slice(0, 96)))).all(), "the other shard is whole"


def test_writer_that_is_cut_off_leaves_the_shard_of_before(tmp_path, monkeypatch):
    group = open_group(str(make_store(tmp_path / "s.zarr", 40, (96,))))
    array = get_array(group, "activations/layers.0.up/max")
    before = read_array(group, array.path)
    monkeypatch.setattr(Path, "replace", lambda *_: Path("/no/such/file").stat())
    with pytest.raises(FileNotFoundError):
        write(array, (0, 0), np.zeros((32, 96), np.float32))
    np.testing.assert_array_equal(read_array(group, array.path, complete=True), before)


def test_what_stands_is_left_as_it_is(group):
    layout = ArrayLayout(SHAPE, CHUNKS, "float32", ("row", "column"), np.nan, SHARDS)
    create_arrays(group, {"a/b/one": layout})
    group["a"].attrs["kept"] = True
    write(get_array(group, "a/b/one"), (0, 0), np.ones(SHAPE, np.float32))
    create_arrays(group, {"a/b/one": layout, "a/b/two": layout, "c": layout})
    assert group["a"].attrs["kept"]
    assert (read_array(group, "a/b/one", complete=True) == 1).all()
    assert all(is_there(group, name) for name in ("a/b/two", "c"))


def test_full_disk_is_one_error(tmp_path, monkeypatch, caplog):
    put = LocalStore.set

    async def full(self, key, value):
        if key.startswith("activations/layers"):
            raise OSError(28, "No space left on device")
        await put(self, key, value)

    monkeypatch.setattr(LocalStore, "set", full)
    with caplog.at_level(logging.ERROR, "asyncio"), pytest.raises(StoreError, match="No space left on device"):
        make_store(tmp_path / "s.zarr", 40, (8, 8, 8))
    gc.collect()
    assert not caplog.records, "none that nobody has asked for"


def test_owner_of_several_intervals_writes_nan_among_them(tmp_path, monkeypatch):
    """As under tensor parallelism: its columns lie side by side in the buffer."""
    monkeypatch.setattr(grid, "MAX_BYTES_PER_SHARD", 32 * 12 * 4)  # 12 columns
    group = open_group(str(make_store(tmp_path / "s.zarr", 40, (96,))))
    key, owned = ("layers.0.up", "max"), [(0, 12), (48, 60), (84, 96)]
    array = get_array(group, "activations/layers.0.up/max")
    before = read_array(group, "activations/layers.0.up/max")
    values = np.arange(40 * 36, dtype=np.float32).reshape(40, 36)
    values[:, 12:24] = np.nan
    with ChunkWriter(group, {"layers.0.up": owned}, lambda: {key: np.empty((32, 36), np.float32)}, commit) as writer:
        for start, stop in ((0, 32), (32, 40)):
            buffer = writer.free_buffer()
            buffer[key][: stop - start] = values[start:stop]
            writer.write(0, slice(start, stop), buffer, lambda: None)
    for place, (start, stop) in zip((0, 12, 24), owned, strict=True):
        before[:, start:stop] = values[:, place : place + stop - start]
    np.testing.assert_array_equal(read_array(group, array.path, complete=True), before)


def commit(task, nonfinite):
    """No task is finished here."""
