"""A chunk that is not there counts as lost: so all that is written is there, whatever values it holds."""

import gc
import logging
import uuid

import numpy as np
import pytest
import zarr
from zarr.core.sync import sync
from zarr.storage import LocalStore

from aura_dist.errors import StoreError
from aura_dist.store.access import get_array, is_there, missing_chunks, open_group, prepare_write, read_array, store_at
from aura_dist.store.schema import ArrayLayout, create_arrays
from aura_dist.store.writer import ChunkWriter
from tests.stores import make_store

SHAPE, CHUNKS = (10, 7), (4, 3)


@pytest.fixture(params=["directory", "memory://"])
def group(request, tmp_path):
    """An empty group, on disk or behind a URL."""
    path = str(tmp_path / "s.zarr") if request.param == "directory" else f"{request.param}{uuid.uuid4().hex}"
    return zarr.open_group(store_at(path), mode="w", zarr_format=3)


@pytest.mark.parametrize(("dtype", "fill"), [("float32", np.nan), ("float16", np.nan), ("int64", 0)])
def test_chunks_of_fill_values_are_written_with_the_others(group, dtype, fill):
    create_arrays(group, {"a/b/values": ArrayLayout(SHAPE, CHUNKS, dtype, ("row", "column"), fill)})
    array = get_array(group, "a/b/values")
    values = np.arange(1, 71).reshape(SHAPE).astype(dtype)
    values[0:4, 3:6] = values[8:10, 6:7] = fill  # a whole chunk, and one that the array ends in
    values[5, 1] = fill  # not all of its chunk
    sync(prepare_write(array, (0, 0), values)())
    assert not missing_chunks(array, np.ndindex(*array.cdata_shape))
    np.testing.assert_array_equal(read_array(group, "a/b/values", complete=True), values)
    part = np.full((4, 3), fill, dtype)
    sync(prepare_write(array, (4, 3), part)())
    values[4:8, 3:6] = part
    np.testing.assert_array_equal(read_array(group, "a/b/values", complete=True), values)


def test_what_stands_is_left_as_it_is(group):
    layout = ArrayLayout(SHAPE, CHUNKS, "float32", ("row", "column"), np.nan)
    create_arrays(group, {"a/b/one": layout})
    group["a"].attrs["kept"] = True
    sync(prepare_write(get_array(group, "a/b/one"), (0, 0), np.ones(SHAPE, np.float32))())
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


def test_owner_of_several_intervals_writes_nan_among_them(tmp_path):
    """As under tensor parallelism: its columns lie side by side in the buffer."""
    group = open_group(str(make_store(tmp_path / "s.zarr", 40, (96,))))
    key, owned = ("layers.0.up", "max"), [(0, 12), (48, 60), (90, 96)]
    array = get_array(group, "activations/layers.0.up/max")
    before = read_array(group, "activations/layers.0.up/max")
    values = np.arange(40 * 30, dtype=np.float32).reshape(40, 30)
    values[:, 12:24] = np.nan
    with ChunkWriter(group, {"layers.0.up": owned}, lambda: {key: np.empty((32, 30), np.float32)}, commit) as writer:
        for start, stop in ((0, 32), (32, 40)):
            buffer = writer.free_buffer()
            buffer[key][: stop - start] = values[start:stop]
            writer.write(0, slice(start, stop), buffer, lambda: None)
    for place, (start, stop) in zip((0, 12, 24), owned, strict=True):
        before[:, start:stop] = values[:, place : place + stop - start]
    assert not missing_chunks(array, np.ndindex(*array.cdata_shape))
    np.testing.assert_array_equal(read_array(group, "activations/layers.0.up/max", complete=True), before)


def commit(task, nonfinite):
    """No task is finished here."""
