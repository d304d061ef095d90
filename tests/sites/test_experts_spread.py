"""A mixture's experts under every strategy: what is stored, and the logits under a map, are those of one process."""

import json
from pathlib import Path

import numpy as np
import pytest

from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.models.load import skeleton
from aura_dist.models.strategies.tensor_plan import seen_columns, tensor_plan
from aura_dist.sites.find import find_sites, tap_of
from aura_dist.store.access import open_group, read_array
from aura_dist.store.record import response_names
from tests.distributed import intervened, loop
from tests.distributed.launch import run_ranks
from tests.models import MIXTURE_CONFIGS, TINY_CONFIGS

pytestmark = pytest.mark.timeout(420)

# each rank has a part of every expert, whole experts, or a part of what runs all tokens
MODELS = ("qwen3-moe", "gpt-oss", "llama4")
OPTIONS = {**loop.OPTIONS, "num_positive": 12, "num_negative": 12, "modules": ["experts", "routing"]}
SETTINGS = {"dispatch": {"max_memory": ["cpu=600KB"]}}
SOME = {"dispatch": ("gpt-oss",)}  # the limit puts a part of this model on disk, and parts of no other


def run_both(arguments) -> int:
    """Every rank of a launch runs this."""
    return loop.run_plan(arguments[:1]) or intervened.run_plan(arguments[1:])


@pytest.fixture(scope="module")
def maps(tiny_dir, tmp_path_factory):
    """Model → directory of a map of its experts, with shifts."""
    rng, made = np.random.default_rng(0), {}
    for name in MODELS:
        sites = find_sites(skeleton((TINY_CONFIGS | MIXTURE_CONFIGS)[name]())).select(["experts"])
        scale = {s.name: rng.uniform(0.2, 1.5, s.width).astype(np.float32) for s in sites}
        shift = {s.name: rng.normal(0, 0.1, s.width).astype(np.float32) for s in sites}
        made[name] = str(tmp_path_factory.mktemp(f"map-{name}"))
        Intervention(scale, shift).save(made[name])
    return made


def run(sharding, num_ranks, tiny_dir, data, maps, out: Path):
    """Collect each model's experts, and note its logits under its map, in one launch."""
    out.mkdir()
    options = {**OPTIONS, **SETTINGS.get(sharding, {})}
    more = dict(SETTINGS.get(sharding, {}))
    if more:
        options["offload_folder"] = more["offload_folder"] = str(out / "offloaded")
    names = SOME.get(sharding, MODELS)
    runs = {str(tiny_dir(name)): str(out / name) for name in names}
    collections = {"sharding": sharding, "options": options, "data": data, "runs": runs, "notes": str(out)}
    models = {name: (str(tiny_dir(name)), {"experts": maps[name]}, more) for name in names}
    (out / "collect.json").write_text(json.dumps(collections))
    (out / "logits.json").write_text(json.dumps({"sharding": sharding, "models": models, "out": str(out)}))
    run_ranks(num_ranks, [str(out / "collect.json"), str(out / "logits.json")], run_both, timeout_seconds=400)
    assert json.loads((out / "rank-0.json").read_text())["refused"] == {}
    return out


@pytest.fixture(scope="module")
def alone(tiny_dir, sentences_csv, maps, tmp_path_factory):
    return run("replicate", 1, tiny_dir, sentences_csv, maps, tmp_path_factory.mktemp("alone") / "out")


@pytest.mark.parametrize(
    ("sharding", "num_ranks"), [("fsdp", 2), ("tensor", 2), ("fsdp=2,tensor=2", 4), ("zero3", 2), ("dispatch", 1)]
)
def test_as_one_process(sharding, num_ranks, alone, tiny_dir, sentences_csv, maps, tmp_path):
    out = run(sharding, num_ranks, tiny_dir, sentences_csv, maps, tmp_path / "out")
    for name in SOME.get(sharding, MODELS):
        ours, plain = open_group(str(out / name)), open_group(str(alone / name))
        assert response_names(ours) == response_names(plain)
        for path in response_names(plain):
            theirs = read_array(plain, path)
            np.testing.assert_allclose(read_array(ours, path), theirs, rtol=1e-5, atol=1e-5, err_msg=f"{name} {path}")
        expected = np.load(alone / f"{name}-experts-0.npz")
        for rank in range(num_ranks):
            found = np.load(out / f"{name}-experts-{rank}.npz")
            np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4, err_msg=name)
            assert found["tokens"].tolist() == expected["tokens"].tolist()


def test_columns_that_a_rank_sees():
    seen = {}
    for name in MODELS:
        model = skeleton((TINY_CONFIGS | MIXTURE_CONFIGS)[name]())
        site, plan = find_sites(model).select(["experts"])[0], tensor_plan(model, 2)
        seen[name] = seen_columns(plan, tap_of(model, site), 2)
    assert seen["qwen3-moe"][1] == tuple((24 * e + 12, 24 * e + 24) for e in range(4))
    assert seen["gpt-oss"] == [((0, 160),), ((160, 320),)]
    assert seen["llama4"][0] == tuple((80 * e, 80 * e + 40) for e in range(4))


def test_experts_that_the_ranks_do_not_divide_are_refused():
    with pytest.raises(ModelError, match="no plan for --sharding tensor"):
        tensor_plan(skeleton(MIXTURE_CONFIGS["gpt-oss"]()), 3)
    model = skeleton(MIXTURE_CONFIGS["mixtral"]())
    site = find_sites(model).select(["experts"])[0]
    with pytest.raises(ModelError, match=rf"{site.name}.* is split as 'moe_tp_experts', which is not by columns"):
        seen_columns(tensor_plan(model, 3), tap_of(model, site), 3)
