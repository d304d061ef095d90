"""Every byte of the weights is read once, and never again while the file is unchanged."""

import hashlib
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from aura_dist.models import digests
from aura_dist.models.digests import tensor_digests
from aura_dist.models.identity import fingerprint
from aura_dist.models.load import ModelSource
from aura_dist.models.weights import open_weights
from tests.distributed.counted import run_hashed
from tests.distributed.launch import run_ranks

ROWS, COLUMNS = 64, 32


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, which keeps a file as soon as it is written."""
    monkeypatch.setattr(digests, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    return tmp_path / "cache" / "digests"


@pytest.fixture
def reads(monkeypatch):
    """The files that were hashed."""
    found, original = [], digests._hash
    monkeypatch.setattr(digests, "_hash", lambda file: found.append(file) or original(file))
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    save_file({"w": torch.randn(ROWS, COLUMNS), "b": torch.randn(COLUMNS), "none": torch.empty(0)}, path)
    return path


def edit(file, row):
    """Change one value of `w` in place."""
    with open_weights(file) as weights:
        (w,) = [t for t in weights.tensors if t.name == "w"]
    with file.open("r+b") as stream:
        stream.seek(w.start + row * COLUMNS * 4)
        stream.write(np.float32(7).tobytes())


def test_second_call_reads_nothing(cache, reads, file):
    first = tensor_digests(file)
    assert tensor_digests(file) == first
    assert len(reads) == 1


def test_digest_is_that_of_the_pieces(cache, file, monkeypatch):
    """Whatever the threads and reads, by the plain formula."""
    monkeypatch.setattr(digests, "PIECE_BYTES", 1000)
    monkeypatch.setattr(digests, "READ_BYTES", 300)
    torch.manual_seed(0)
    values = torch.randn(ROWS, COLUMNS).numpy().tobytes()
    pieces = b"".join(hashlib.sha256(values[at : at + 1000]).digest() for at in range(0, len(values), 1000))
    assert ("w", "F32", [ROWS, COLUMNS], hashlib.sha256(pieces).hexdigest()) in tensor_digests(file)


@pytest.mark.parametrize("row", [0, 1, ROWS // 2, ROWS - 1])
def test_an_edited_row_is_seen_though_the_time_of_modification_is_set_back(row, cache, file):
    before, times = tensor_digests(file), os.stat(file)
    edit(file, row)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = tensor_digests(file)
    assert [a[0] for a, b in zip(after, before, strict=True) if a != b] == ["w"]


def test_a_file_that_changes_is_read_again(cache, reads, file, tmp_path):
    tensor_digests(file)
    os.utime(file)
    tensor_digests(file)
    shutil.copy2(file, tmp_path / "copy")  # another inode, the same times of modification
    (tmp_path / "copy").replace(file)
    tensor_digests(file)
    assert len(reads) == 3


def test_a_file_that_was_just_written_is_not_kept(cache, reads, file, monkeypatch):
    """It may change once more within the tick of the file system's clock."""
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 2.0)
    tensor_digests(file)
    edit(file, 3)
    tensor_digests(file)
    assert len(reads) == 2
    assert not cache.exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(cache, file, monkeypatch):
    original = digests._piece

    def piece(*given):
        edit(file, 5)
        return original(*given)

    monkeypatch.setattr(digests, "_piece", piece)
    tensor_digests(file)
    assert not cache.exists()


def entry_of(cache):
    (entry,) = cache.iterdir()
    return entry


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.write_bytes(b""),
        lambda entry: entry.write_text('{"stamp": 1'),
        lambda entry: entry.write_text("[1]"),
        lambda entry: entry.write_text(entry.read_text().replace('"tensors": [[', '"tensors": [["x"], [')),
        lambda entry: entry.write_bytes(b"\xff\xfe"),
    ],
)
def test_a_damaged_entry_is_no_error(damage, cache, file):
    first = tensor_digests(file)
    damage(entry_of(cache))
    assert tensor_digests(file) == first


def test_without_a_cache_each_call_reads(reads, file, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    (tmp_path / "taken").touch()

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for place in (lambda: tmp_path / "taken", no_home):
        monkeypatch.setattr(digests, "cache_dir", place)
        assert tensor_digests(file) == tensor_digests(file)
    assert len(reads) == 4


def test_a_link_and_its_file_share_an_entry(cache, reads, file, tmp_path):
    """As the hub's cache, whose snapshots link to files."""
    (tmp_path / "link.safetensors").symlink_to(file)
    assert tensor_digests(file) == tensor_digests(tmp_path / "link.safetensors")
    assert len(reads) == 1


@pytest.mark.timeout(200)
def test_ranks_of_a_host_read_once(tiny_dir, sentences_csv, tmp_path):
    notes = tmp_path / "notes"
    what = ["--model", tiny_dir("llama"), "--data", sentences_csv, "--concepts", "toxic", "--num-positive", "8"]
    what += ["--num-negative", "8", "--modules", "*.0.mlp.up_proj", "--store", tmp_path / "s.zarr"]
    run_ranks(2, list(map(str, [notes, "collect", *what])), run_hashed)
    assert notes.read_text().splitlines() == ["model.safetensors"]


@pytest.mark.realmodel
def test_one_row_of_gemma(gemma_dir, tmp_path):
    """In the middle of its largest tensor, far from both ends."""
    copy = tmp_path / "gemma"
    copy.mkdir()
    for part in gemma_dir.iterdir():
        (shutil.copyfile if part.suffix == ".safetensors" else os.symlink)(part, copy / part.name)
    (file,) = copy.glob("*.safetensors")
    with open_weights(file) as weights:
        large = max(weights.tensors, key=lambda t: t.stop - t.start)

    def of(directory):
        return fingerprint(ModelSource(str(directory), None, "float32"), AutoConfig.from_pretrained(directory))

    original = of(gemma_dir)
    assert of(copy) == original
    row_bytes = (large.stop - large.start) // large.shape[0]
    with file.open("r+b") as stream:
        stream.seek(large.start + large.shape[0] // 2 * row_bytes)
        stream.write(bytes(row_bytes))
    assert of(copy) != original
