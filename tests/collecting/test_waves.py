"""Under `--sharding layers` a collection gives, bit for bit, the store that `replicate` gives."""

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from aura_dist.collecting.capture import Capture
from aura_dist.collecting.waves import Waves
from aura_dist.config.verbs import CollectConfig
from aura_dist.errors import StoreError
from aura_dist.interventions.artifact import Intervention
from aura_dist.models.layerwise import Layerwise, executor_of
from aura_dist.models.load import ModelSource, load_base
from aura_dist.models.waiting import Waiting
from aura_dist.ranks.layout import Layout
from aura_dist.ranks.team import Team
from aura_dist.ranks.world import World
from aura_dist.stages import collect
from aura_dist.store.access import open_group, read_array
from aura_dist.store.record import response_names
from tests.distributed.intervened import random_gates
from tests.layerwise import LAYERS
from tests.models import save_tiny

pytestmark = pytest.mark.timeout(240)

# four tasks
OPTIONS = {
    "num_positive": 60, "num_negative": 60, "tokens_per_batch": 256, "modules": ["all", "norm"],
    "pooling": ["max", "mean"], "concepts": ["toxic"],
}  # fmt: skip
PROGRESS = ("progress/done", "progress/attempts", "progress/nonfinite", "progress/first_token")


@pytest.fixture(scope="module")
def make(sentences_csv):
    """`make(model, store, …)` collects into a store, with further settings."""

    def run(model, store, **settings):
        collect.run(CollectConfig(model=str(model), data=sentences_csv, store=str(store), **{**OPTIONS, **settings}))
        return store

    return run


@pytest.fixture(scope="module")
def plain(make, tiny_dir, tmp_path_factory):
    return make(tiny_dir("llama"), tmp_path_factory.mktemp("plain") / "store")


def assert_equal(ours, expected):
    a, b = open_group(str(ours)), open_group(str(expected))
    for name in [*response_names(b), "samples/row", *PROGRESS]:
        np.testing.assert_array_equal(read_array(a, name), read_array(b, name), err_msg=name)


@pytest.mark.parametrize("name", ["gpt2", "falcon-40b-style", "qwen3-moe"])
def test_store_equals_that_of_replicate(name, make, tiny_dir, tmp_path):
    settings = {"dtype": "bfloat16", "modules": ["all", "norm"]}
    expected = make(tiny_dir(name), tmp_path / "plain", **settings)
    assert_equal(make(tiny_dir(name), tmp_path / "ours", sharding="layers", **settings), expected)


def count_waves(monkeypatch):
    waves, run = [], Waves._run_wave
    monkeypatch.setattr(Waves, "_run_wave", lambda self, wave: (waves.append(len(wave)), run(self, wave)))
    return waves


@pytest.mark.parametrize(("tokens", "expected"), [(1, [1, 1, 1, 1]), (10**6, [4])])
def test_waves_of_any_size_give_the_same_store(tokens, expected, make, tiny_dir, plain, tmp_path, monkeypatch):
    waves = count_waves(monkeypatch)
    assert_equal(make(tiny_dir("llama"), tmp_path / "store", sharding="layers", wave_tokens=tokens), plain)
    assert waves == expected


@pytest.mark.parametrize(
    ("num_ranks", "tokens", "expected"),
    [
        (2, [95, 105], [1, 1]),
        (2, [100] * 3, [2, 1]),
        (2, [100] * 4, [2, 2]),
        (2, [100] * 25, [13, 12]),
        (8, [100] * 25, [4, 4, 4, 4, 4, 4, 1, 0]),
    ],
)
def test_ranks_share_the_tasks_evenly_in_one_turn(num_ranks, tokens, expected, tiny_dir):
    executor = executor_of(load_base(ModelSource(str(tiny_dir("llama")), None, "float32"), LAYERS))
    executor.wave_tokens = 10**6
    store, claimed = HashStore(), []
    for rank in range(num_ranks):
        team = Team(World(Layout("layers", num_ranks), rank), store)
        team.keep_abreast = team.meet = lambda *given, **more: None  # the ranks of this test claim after one another
        claimed.append(len(executor.claim(team, "tasks", tokens, int, int)))
        team.close()
    assert claimed == expected


def test_hidden_states_wait_in_a_file_where_memory_is_short(make, tiny_dir, plain, tmp_path, monkeypatch):
    written, write = [], Waiting._write
    monkeypatch.setattr(Waiting, "_write", lambda self, tensor: (written.append(tensor.nbytes), write(self, tensor))[1])
    (tmp_path / "folder").mkdir()
    limits = {"host_memory": "20KB", "offload_folder": str(tmp_path / "folder"), "wave_tokens": 10**6}
    assert_equal(make(tiny_dir("llama"), tmp_path / "store", sharding="layers", **limits), plain)
    assert written


def test_interrupted_and_continued_by_either_strategy(make, tiny_dir, plain, tmp_path, monkeypatch):
    """A wave that does not end leaves its tasks to others; what it wrote is written again."""
    run = Layerwise.run

    def fails_in_the_last_layer(self, index, key):
        if index == 2 and len(done) == 1:
            raise StoreError("the power failed")
        run(self, index, key)

    done = count_waves(monkeypatch)
    monkeypatch.setattr(Layerwise, "run", fails_in_the_last_layer)
    for store in (tmp_path / "ours", tmp_path / "theirs"):
        done.clear()
        with pytest.raises(StoreError, match="the power failed"):
            make(tiny_dir("llama"), store, sharding="layers", wave_tokens=400)
        progress = open_group(str(store))
        assert not read_array(progress, "progress/attempts").any()
        assert not read_array(progress, "progress/done").all()
    monkeypatch.setattr(Layerwise, "run", run)
    assert_equal(make(tiny_dir("llama"), tmp_path / "ours", sharding="layers"), plain)
    assert_equal(make(tiny_dir("llama"), tmp_path / "theirs"), plain)


def test_a_subset_of_layers_with_an_intervention(make, tiny_dir, tmp_path):
    """Layers without a captured site run too, later ones than the last captured one are not read."""
    scale = np.linspace(0, 1, 80, dtype=np.float32)
    Intervention({"model.layers.0.mlp.up_proj": scale}, {}, {"method": "aura"}).save(tmp_path / "map")
    settings = {"modules": ["model.layers.1.mlp.*"], "intervention": str(tmp_path / "map"), "strength": 0.5}
    expected = make(tiny_dir("llama"), tmp_path / "plain", **settings)
    assert_equal(make(tiny_dir("llama"), tmp_path / "ours", sharding="layers", **settings), expected)


def test_an_intervention_with_gates_at_every_site(make, tiny_dir, plain, tmp_path):
    random_gates(str(tiny_dir("llama"))).save(tmp_path / "map")
    settings = {"modules": ["all", "norm", "residual"], "intervention": str(tmp_path / "map")}
    expected = make(tiny_dir("llama"), tmp_path / "plain", **settings)
    assert_equal(make(tiny_dir("llama"), tmp_path / "ours", sharding="layers", **settings), expected)
    name = response_names(open_group(str(plain)))[-1]
    assert (read_array(open_group(str(expected)), name) != read_array(open_group(str(plain)), name)).any()


@pytest.mark.parametrize("form", ["bin", "sharded", "float16"])
def test_checkpoints_in_other_forms(form, make, tiny_dir, tmp_path):
    """torch's format; several files; weights that are converted to the dtype of the forward."""
    directory = save_tiny("qwen3-moe", tmp_path / "model", **({"max_shard_size": "100KB"} if form == "sharded" else {}))
    if form == "bin":
        from safetensors.torch import load_file

        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    settings = {"modules": ["all"], **({"dtype": "float16"} if form == "float16" else {})}
    expected = make(directory, tmp_path / "plain", **settings)
    assert_equal(make(directory, tmp_path / "ours", sharding="layers", **settings), expected)


def test_batches_are_larger_where_weights_are_read_for_each(make, tiny_dir, tmp_path, monkeypatch):
    """Under `dispatch` a row chunk is one batch, as far as memory allows; the store is that of small batches."""
    batches, run = [], Capture.run
    monkeypatch.setattr(Capture, "run", lambda self, batch, *more: (batches.append(batch), run(self, batch, *more)))
    monkeypatch.setattr("aura_dist.config.options.TOKENS_PER_TASK", 256)
    default = {"tokens_per_batch": None}
    expected = make(tiny_dir("llama"), tmp_path / "plain", **default)
    small, chunks = len(batches), len(range(0, 120, 32))
    batches.clear()
    offloaded = {"max_memory": ["cpu=150KB"], "offload_folder": str(tmp_path / "offloaded")}
    ours = make(tiny_dir("llama"), tmp_path / "ours", sharding="dispatch", **offloaded, **default)
    assert len(batches) == chunks < small
    group, plain = open_group(str(ours)), open_group(str(expected))
    assert group.attrs["tokens_per_batch"] == plain.attrs["tokens_per_batch"] == 256
    for name in response_names(plain):
        np.testing.assert_allclose(read_array(group, name), read_array(plain, name), rtol=1e-4, atol=1e-5)
    batches.clear()
    make(tiny_dir("llama"), tmp_path / "asked", sharding="dispatch", **offloaded, tokens_per_batch=256)
    assert len(batches) == small, "a number that the user names counts"
