"""`--sharding layers` at every kind of site, with an adapter, killed at any moment, and after another strategy."""

import json
import random
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from aura_dist.collecting.capture import Capture
from aura_dist.config.verbs import CollectConfig
from aura_dist.errors import StoreError
from aura_dist.models.layerwise import executor_of
from aura_dist.models.load import ModelSource, column_plans, load_base
from aura_dist.ranks.layout import Layout
from aura_dist.ranks.world import World
from aura_dist.sites.find import find_sites
from aura_dist.stages import collect
from aura_dist.store.access import open_group, read_array
from aura_dist.store.record import response_names
from aura_dist.text.tokens import TokenizedTexts
from tests.models import HYBRID_CONFIGS, MIXTURE_CONFIGS, ODD_CONFIGS, TINY_CONFIGS, VOCAB

pytestmark = pytest.mark.timeout(240)

POOLINGS = ["max", "mean"]
OPTIONS = {
    "num_positive": 60, "num_negative": 60, "tokens_per_batch": 256, "modules": ["all"], "concepts": ["toxic"],
}  # fmt: skip
LATER = ("progress/done", "progress/nonfinite", "progress/first_token")
# Forks for each share: the child collects and is killed within the tasks that are left, each of which takes two batches
# through three layers at least, after two runs of layers for a check. At last a child collects to the end.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from aura_dist.config.verbs import CollectConfig
from aura_dist.models.layerwise import Layerwise
from aura_dist.stages import collect
from aura_dist.store.access import open_group
from aura_dist.store.record import unfinished
settings, shares = json.loads(sys.argv[1])
run = Layerwise.run
for share in [*shares, None]:
    child = os.fork()
    if child == 0:
        calls, begun = [], Path(settings["store"]).exists()
        left = len(unfinished(open_group(settings["store"]))) if begun else 4
        moment = None if share is None else 3 + int(share * 6 * left)
        def struck(self, layer, key):
            calls.append(layer)
            if len(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            run(self, layer, key)
        Layerwise.run = struck
        collect.run(CollectConfig(**settings))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if share is None else -signal.SIGKILL), (share, status)
"""


def texts():
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, VOCAB, size).astype(np.int32) for size in sorted(rng.integers(2, 30, 10))]
    return TokenizedTexts(ids, np.array([0]), skip_special=False)


def responses(model, by_layer):
    """(site, pooling) → [N, D] at every place of a base model, in two batches."""
    batches = [slice(0, 6), slice(6, 10)]
    # Jamba multiplies by this one's weights, and does not call it
    sites = [site for site in find_sites(model).sites if ".mamba.dt_proj" not in site.name]
    plans = column_plans(model, sites, {site.name: site.width for site in sites}, World())
    buffer = {(s.name, p): np.full((10, s.width), np.nan, np.float32) for s in sites for p in POOLINGS}
    capture = Capture(model, sites, plans, POOLINGS, "cpu")
    executor, tokens = executor_of(model), texts()
    assert (executor is not None) == by_layer
    with capture.listening():
        if not by_layer:
            for rows in batches:
                capture.run(tokens.batch(rows), buffer, rows.start)
            return buffer
        executor.prepare(capture.inputs(tokens.batch(batches[0])))
        for rows in batches:
            executor.record(rows.start, capture.inputs(tokens.batch(rows)))
        for layer in executor.layers():
            names = [site.name for site in sites if site.layer == layer]
            for rows in batches:
                forward = partial(executor.run, layer, rows.start)
                capture.run(tokens.batch(rows), buffer, rows.start, forward, names)
    executor.close()
    return buffer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*TINY_CONFIGS, *ODD_CONFIGS, *MIXTURE_CONFIGS, *HYBRID_CONFIGS])
def test_every_kind_of_site_has_the_bits_of_replicate(name, dtype, tiny_dir):
    source = ModelSource(str(tiny_dir(name)), None, dtype)
    expected = responses(load_base(source, World()), by_layer=False)
    found = responses(load_base(source, World(Layout("layers"))), by_layer=True)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=str(key))


@pytest.fixture(scope="module")
def make(tiny_dir, sentences_csv):
    """`make(store, …)` collects into a store, with further settings."""

    def run(store, **settings):
        given = {"model": str(tiny_dir("llama")), "data": sentences_csv, "store": str(store), **OPTIONS, **settings}
        collect.run(CollectConfig(**given))
        return store

    return run


@pytest.fixture(scope="module")
def plain(make, tmp_path_factory):
    return make(tmp_path_factory.mktemp("plain") / "store")


def assert_equal(ours, expected):
    a, b = open_group(str(ours)), open_group(str(expected))
    for name in [*response_names(b), "samples/row", *LATER]:
        np.testing.assert_array_equal(read_array(a, name), read_array(b, name), err_msg=name)


def save_adapter(directory):
    """A random LoRA adapter of Llama's gates, as peft saves it; returns the directory."""
    directory.mkdir()
    keys = [f"base_model.model.model.layers.{layer}.mlp.gate_proj" for layer in range(3)]
    tensors = {f"{key}.lora_A.weight": torch.randn(4, 48) for key in keys}
    tensors |= {f"{key}.lora_B.weight": torch.randn(80, 4) for key in keys}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["gate_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def test_an_adapter(make, plain, tmp_path):
    adapter = {"adapter": str(save_adapter(tmp_path / "adapter"))}
    expected = make(tmp_path / "plain", **adapter)
    assert_equal(make(tmp_path / "ours", sharding="layers", **adapter), expected)
    name = response_names(open_group(str(plain)))[-1]
    assert (read_array(open_group(str(expected)), name) != read_array(open_group(str(plain)), name)).any()


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_at_random_moments_and_resumed(kills, plain, tiny_dir, sentences_csv, tmp_path):
    """A wave is a task: of its runs of layers each may be the last. Layers are copied meanwhile."""
    store = tmp_path / "store"
    settings = {
        **OPTIONS, "model": str(tiny_dir("llama")), "data": sentences_csv, "store": str(store), "sharding": "layers",
        "wave_tokens": 1, "max_attempts": 0, "layer_cache": str(tmp_path / "copies"),
    }  # fmt: skip
    chance = random.Random(kills)
    shares = [chance.random() for _ in range(kills)]
    subprocess.run([sys.executable, "-c", KILLED, json.dumps([settings, shares])], check=True, timeout=100 + 60 * kills)
    assert_equal(store, plain)
    assert len(list((tmp_path / "copies").glob("*/layer-*.safetensors"))) == 3


def test_begun_under_replicate_and_finished_layer_by_layer(make, plain, tmp_path, monkeypatch):
    run, batches = Capture.run, []

    def fails(self, *arguments):
        batches.append(arguments)
        if len(batches) == 8:
            raise StoreError("the power failed")
        run(self, *arguments)

    monkeypatch.setattr(Capture, "run", fails)
    with pytest.raises(StoreError, match="the power failed"):
        make(tmp_path / "store")
    monkeypatch.setattr(Capture, "run", run)
    done = read_array(open_group(str(tmp_path / "store")), "progress/done")
    assert 0 < done.sum() < len(done)
    make(tmp_path / "store", sharding="layers")
    ours, theirs = open_group(str(tmp_path / "store")), open_group(str(plain))
    for name in response_names(theirs):
        np.testing.assert_allclose(read_array(ours, name), read_array(theirs, name), rtol=1e-5, atol=1e-6)
