"""The fingerprint says which weights a model has: not where they lie, nor in how many files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from aura_dist.errors import ModelError
from aura_dist.models.identity import checkpoint_files, fingerprint
from aura_dist.models.load import ModelSource
from tests.models import save_tiny, tiny_causal


def of(directory):
    return fingerprint(ModelSource(str(directory), None, "float32"), AutoConfig.from_pretrained(directory))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


def test_the_same_at_another_path_and_split_into_files(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "copy")
    save_tiny("llama", tmp_path / "split", max_shard_size="60KB")
    assert len(checkpoint_files(str(llama), None)) == 1
    assert len(checkpoint_files(str(tmp_path / "split"), None)) > 2
    assert of(llama) == of(tmp_path / "copy") == of(tmp_path / "split")


def test_other_weights_or_dtype_or_shape_differ(llama, tmp_path):
    save_tiny("llama", tmp_path / "seed", seed=1)
    tiny_causal("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dtype")
    prints = {of(llama), of(tmp_path / "seed"), of(tmp_path / "dtype")}
    assert len(prints) == 3


@pytest.mark.parametrize("at", [0, -1])
def test_one_changed_value_at_either_end_differs(at, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "tuned")
    weights = load_file(tmp_path / "tuned" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].view(-1)[at] += 1e-3
    save_file(weights, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    assert of(tmp_path / "tuned") != of(llama)


def test_large_tensors_are_told_apart_by_their_last_values(tmp_path, llama):
    """Beyond the 64 KiB at each end that are read."""
    prints = []
    for name, at in (("a", None), ("b", 0), ("c", -1)):
        shutil.copytree(llama, tmp_path / name)
        large = torch.zeros(50_000)
        if at is not None:
            large[at] = 1
        save_file({"w": large}, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        prints.append(of(tmp_path / name))
    assert len(set(prints)) == 3


def test_old_checkpoint_format(llama, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shutil.copytree(llama, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        torch.save(tiny_causal("llama", seed).state_dict(), tmp_path / name / "pytorch_model.bin")
    assert of(tmp_path / "a") == of(tmp_path / "b") != of(tmp_path / "c")


def test_first_version_of_the_old_format(llama, tmp_path):
    """Before torch 1.6: no archive, and so not to be mapped into memory."""
    for name, archive in (("archive", True), ("first", False)):
        shutil.copytree(llama, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        state, file = tiny_causal("llama").state_dict(), tmp_path / name / "pytorch_model.bin"
        torch.save(state, file, _use_new_zipfile_serialization=archive)
    assert of(tmp_path / "first") == of(tmp_path / "archive")


def test_old_checkpoint_of_each_dtype(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    state = {"b": torch.ones(3, dtype=torch.bfloat16), "s": torch.tensor(1.5), "t": torch.ones(4, 6).T}
    torch.save(state, tmp_path / "a" / "pytorch_model.bin")
    assert len(of(tmp_path / "a")) == 64


def test_the_same_where_the_system_reads_into_no_buffer(llama, monkeypatch):
    expected = of(llama)
    monkeypatch.delattr("os.preadv")
    assert of(llama) == expected


def test_files_are_those_that_transformers_loads(llama, tmp_path):
    """A single file goes before an index left over beside it."""
    save_tiny("llama", tmp_path / "both", seed=1, max_shard_size="60KB")
    shutil.copy(llama / "model.safetensors", tmp_path / "both")
    assert [f.name for f in checkpoint_files(str(tmp_path / "both"), None)] == ["model.safetensors"]
    assert of(tmp_path / "both") == of(llama)
    shutil.copy(tmp_path / "both" / "model.safetensors", tmp_path / "both" / "pytorch_model.bin")
    assert [f.name for f in checkpoint_files(str(tmp_path / "both"), None)] == ["model.safetensors"]


def cut(file):
    file.write_bytes(file.read_bytes()[:50])


def displaced(file, offsets):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: cut(p / "model.safetensors"),
        lambda p: (p / "model.safetensors").write_bytes(b""),
        lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 64),
        lambda p: displaced(p / "model.safetensors", [8, 0]),
        lambda p: displaced(p / "model.safetensors", [-8, 0]),
        lambda p: displaced(p / "model.safetensors", [0, 16]),
        lambda p: [(p / "model.safetensors").unlink(), (p / "pytorch_model.bin").write_bytes(b"PK\x03\x04")],
        lambda p: [(p / "model.safetensors").unlink(), (p / "model.safetensors.index.json").write_text("{")],
        lambda p: [(p / "model.safetensors").unlink(), (p / "model.safetensors.index.json").write_text("[1]")],
    ],
    ids=["cut", "empty", "noise", "reversed", "before", "beyond", "cut bin", "cut index", "odd index"],
)
def test_damaged_files_are_errors(damage, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ModelError, match="damaged"):
        of(tmp_path / "model")


def test_missing_files_are_errors(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "none")
    (tmp_path / "none" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"expected weights in model\.safetensors or pytorch_model\.bin"):
        of(tmp_path / "none")
    save_tiny("llama", tmp_path / "split", max_shard_size="60KB")
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    lost = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / "split" / lost).unlink()
    with pytest.raises(ModelError, match=f"expected the weight file '{lost}'"):
        of(tmp_path / "split")


def test_the_same_bytes_in_another_dtype_or_shape_differ(llama, tmp_path):
    zeros = {
        "a": torch.zeros(6, dtype=torch.float16),
        "b": torch.zeros(6, dtype=torch.bfloat16),
        "c": torch.zeros(2, 3),
    }
    zeros["c"] = zeros["c"].to(torch.float16)
    for name, tensor in zeros.items():
        shutil.copytree(llama, tmp_path / name)
        save_file({"w": tensor}, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    assert len({of(tmp_path / name) for name in zeros}) == 3
