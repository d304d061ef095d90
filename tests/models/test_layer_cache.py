"""Copies of layers on a local disk give the bits of the checkpoint, whatever happens to them."""

import errno
import fcntl
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from aura_dist.errors import ConfigError
from aura_dist.models import layer_cache, layer_reader
from aura_dist.models.load import ModelSource, load_base
from aura_dist.models.weights import open_weights
from aura_dist.ranks.world import World
from tests.layerwise import LAYERS, batches, by_layer
from tests.models import save_tiny

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tiny_dir, tmp_path):
    """A copy of a tiny Llama that a test may change."""
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    return tmp_path / "model"


def load(directory, cache, dtype="float32", **more):
    options = {} if cache is None else {"layer_cache": str(cache)}
    return load_base(ModelSource(str(directory), None, dtype, **more), LAYERS, options)


def plain(directory, dtype="float32", **more):
    whole = load_base(ModelSource(str(directory), None, dtype, **more), World())
    with torch.no_grad():
        return [whole(**given, use_cache=False)[0] for given in batches()]


def assert_equal(found, expected):
    assert all(map(torch.equal, found, expected))


def copies(cache):
    return sorted(path.name for path in cache.glob("*/*"))


LAYER_FILES = [f"layer-{index:05}.safetensors" for index in range(3)]


def overwrite_layers(file):
    """Put other values where the layers are, in place."""
    with open_weights(file) as weights, file.open("r+b") as stream:
        for tensor in weights.tensors:
            if ".layers." in tensor.name:
                stream.seek(tensor.start)
                stream.write(bytes(tensor.stop - tensor.start))


@pytest.mark.parametrize("cached", [False, True])
def test_later_waves_read_the_copies(cached, model, tmp_path):
    cache = tmp_path / "cache" if cached else None
    expected, ours = plain(model), load(model, cache)
    assert_equal(by_layer(ours, batches()), expected)
    overwrite_layers(model / WEIGHTS)
    second = by_layer(ours, batches())
    assert all(map(torch.equal, second, expected)) == cached
    if cached:
        assert copies(cache) == LAYER_FILES


def read_from(monkeypatch):
    """Files that layers are read from."""
    files, read_ahead = [], layer_reader._read_ahead
    monkeypatch.setattr(
        layer_reader,
        "_read_ahead",
        lambda tensors, places: (
            files.extend(sorted({str(source._path) for source, _ in map(places.get, tensors)})),
            read_ahead(tensors, places),
        ),
    )
    return files


def test_a_later_launch_reads_the_copies(model, tmp_path, monkeypatch):
    cache, expected = tmp_path / "cache", plain(model)
    by_layer(load(model, cache), batches())
    files = read_from(monkeypatch)
    assert_equal(by_layer(load(model, cache), batches()), expected)
    assert {file.partition("/cache/")[2][-len(LAYER_FILES[0]) :] for file in files} == set(LAYER_FILES)


def test_a_changed_checkpoint_has_its_own_copies(model, tmp_path):
    cache = tmp_path / "cache"
    by_layer(load(model, cache), batches())
    weights = load_file(model / WEIGHTS)
    weights["model.layers.1.mlp.up_proj.weight"].mul_(2)
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    assert_equal(by_layer(load(model, cache), batches()), plain(model))
    assert len(list(cache.iterdir())) == 2


def save_adapter(directory):
    directory.mkdir()
    key = "base_model.model.model.layers.{}.mlp.gate_proj.lora_{}.weight"
    tensors = {key.format(i, part): torch.randn(*size) for i in range(3) for part, size in SIZES.items()}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["gate_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return {"adapter": str(directory)}


SIZES = {"A": (4, 48), "B": (80, 4)}


@pytest.mark.parametrize("form", ["adapter", "bin", "sharded", "converted"])
def test_checkpoints_in_other_forms(form, model, tmp_path):
    """Weights that an adapter is added to, torch's format, several files, and experts that become one parameter."""
    more = save_adapter(tmp_path / "adapter") if form == "adapter" else {}
    if form == "bin":
        torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
        (model / WEIGHTS).unlink()
    if form in ("sharded", "converted"):
        name = "llama" if form == "sharded" else "qwen3-moe"
        model = save_tiny(name, tmp_path / form, max_shard_size="100KB")
    expected, cache = plain(model, "bfloat16", **more), tmp_path / "cache"
    for _ in range(2):  # launches
        ours = load(model, cache, "bfloat16", **more)
        for _ in range(2):
            assert_equal(by_layer(ours, batches()), expected)
    assert copies(cache) == LAYER_FILES


def test_weights_begin_as_they_do_in_the_checkpoint(model, tmp_path):
    """At the same remainder by 64, because products of mapped weights may depend on it; all bytes are the same."""
    by_layer(load(model, tmp_path / "cache"), batches())
    originals = load_file(model / WEIGHTS)
    with open_weights(model / WEIGHTS) as weights:
        starts = {tensor.name: tensor.start % 64 for tensor in weights.tensors}
    seen = set()
    for file in (tmp_path / "cache").glob("*/*"):
        with open_weights(file) as weights:
            found = {t.name: t.start % 64 for t in weights.tensors if t.name in starts}
        assert found == {name: starts[name] for name in found}
        assert all(torch.equal(value, originals[n]) for n, value in load_file(file).items() if n in originals)
        seen |= found.keys()
    assert seen == {name for name in originals if ".layers." in name}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def of_other_tensors(path):
    save_file({"other": torch.ones(4)}, path, metadata={"crc32c": "0" * 8})


DAMAGES = {
    "flipped": (flip, "its checksum is wrong"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "other": (of_other_tensors, "it has other tensors"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_copy_is_made_again(how, model, tmp_path, caplog):
    damage, why = DAMAGES[how]
    by_layer(load(model, tmp_path / "cache"), batches())
    path = next((tmp_path / "cache").glob(f"*/{LAYER_FILES[1]}"))
    whole = path.read_bytes()
    damage(path)
    assert_equal(by_layer(load(model, tmp_path / "cache"), batches()), plain(model))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert f"{path} is damaged and is made again" in messages[0]
    assert why in messages[0]
    assert path.read_bytes() == whole


def test_a_full_disk_is_one_warning(model, tmp_path, monkeypatch, caplog):
    """The copies that fitted are used."""
    write, cache = layer_cache.write_all, tmp_path / "cache"

    def fills(file, data, at):
        if copies(cache).count(LAYER_FILES[0]):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data, at)

    monkeypatch.setattr(layer_cache, "write_all", fills)
    ours, expected = load(model, cache), plain(model)
    for _ in range(2):
        assert_equal(by_layer(ours, batches()), expected)
    assert copies(cache) == LAYER_FILES[:1]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "No space left on device): layers without a copy are read from the checkpoint" in messages[0]


def test_one_process_writes_a_copy_and_a_killed_one_leaves_its_place(model, tmp_path):
    cache, expected = tmp_path / "cache", plain(model)
    ours = load(model, cache)
    (folder,) = cache.iterdir()
    aside = folder / "layer-00001.part"
    aside.write_bytes(b"begun")
    with aside.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert_equal(by_layer(ours, batches()), expected)
        assert copies(cache) == [LAYER_FILES[0], "layer-00001.part", LAYER_FILES[2]]
    assert_equal(by_layer(ours, batches()), expected)
    assert copies(cache) == LAYER_FILES


def test_the_turn_is_over_where_the_file_was_renamed_meanwhile(tmp_path):
    """A process that has opened the file before its writer renamed it would empty a whole copy."""
    aside = tmp_path / "layer.part"
    late = os.open(aside, os.O_RDWR | os.O_CREAT)
    with layer_cache._turn(tmp_path / "layer.safetensors") as file:
        os.write(file, b"whole")
        assert not layer_cache._locked(late, aside)
    assert not layer_cache._locked(late, aside)
    os.close(late)
    assert (tmp_path / "layer.safetensors").read_bytes() == b"whole"


def test_two_at_once(model, tmp_path):
    expected, both = plain(model), [load(model, tmp_path / "cache") for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            for found in pool.map(lambda ours: by_layer(ours, batches()), both):
                assert_equal(found, expected)
    assert copies(tmp_path / "cache") == LAYER_FILES


def test_a_place_that_cannot_be_a_directory_is_refused(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--layer-cache '.*/file': expected a directory that can be written"):
        load(model, tmp_path / "file")
