"""An intervention under every strategy gives the logits, and the greedy tokens, that one process gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aura_dist import open_store
from aura_dist.cli import main
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.methods import METHODS, fit_maps, needed_statistics, settle_options
from aura_dist.scoring.columns import statistics_by_concept
from tests.collecting.test_strategies import assert_same
from tests.distributed.intervened import logits_and_greedy, random_gates, random_map, run_plan
from tests.distributed.launch import run_ranks

TOLERANCE = 1e-5
MODELS = ("llama", "falcon-rotary", "falcon-40b-style", "mpt", "gpt2", "gemma3", "opt")
# random maps beside the fitted ones: every scale is far from 1, and shifts are as large as responses
MAPS = ("aura", "linear-act", "random", "gated")
LAUNCHES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "fsdp": (2, "fsdp", {}),
    "tensor": (2, "tensor", {}),
    "tensor=3": (3, "tensor=3", {}),  # slices of several widths
    "fsdp=2,tensor=2": (4, "fsdp=2,tensor=2", {}),
    "zero3": (2, "zero3", {}),
    "zero3, offload to the CPU": (2, "zero3", {"offload": "cpu"}),
    "dispatch, partly on disk": (1, "dispatch", {}),
}


@pytest.fixture(scope="module")
def maps(tiny_dir, plain_store, tmp_path_factory):
    """`maps(name)`: kind → directory of an intervention on every module of a tiny model, fitted from its store."""
    out = tmp_path_factory.mktemp("maps")

    def directories(name):
        if not (out / name).exists():
            for method in ("aura", "linear-act"):
                fitted(str(plain_store(name)), method).save(out / name / method)
            random_map(str(tiny_dir(name))).save(out / name / "random")
            random_gates(str(tiny_dir(name))).save(out / name / "gated")
        return {kind: str(out / name / kind) for kind in MAPS}

    return directories


def fitted(store: str, method: str) -> Intervention:
    """What `fit` makes of a store, without the scores in between: hundreds of small arrays a model."""
    row, options = METHODS[method], settle_options(method, {})
    view, names = open_store(store), needed_statistics(row, options)
    labels_CN = view["samples"]["label"].values.T
    statistics: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    for site, responses in view["activations"].items():
        made = statistics_by_concept(responses[options["pooling"]].values, labels_CN, names)
        for name in names:
            statistics[name][site] = made[name][0]
    return Intervention(*fit_maps(row, statistics, options))


@pytest.fixture(scope="module")
def alone(tiny_dir, maps):
    return {name: logits_and_greedy(str(tiny_dir(name)), maps(name), "replicate", {}) for name in MODELS}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_logits_equal_those_of_one_process(launch, alone, maps, tiny_dir, tmp_path):
    num_ranks, sharding, options = LAUNCHES[launch]
    able = [name for name in MODELS if not ("tensor" in sharding and name == "gpt2")]
    models: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {}
    for name in able:
        placed = partly_on_disk(tiny_dir(name), tmp_path / "offloaded" / name) if sharding == "dispatch" else options
        models[name] = str(tiny_dir(name)), maps(name), placed
    plan = {"sharding": sharding, "out": str(tmp_path), "models": models}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run_ranks(num_ranks, [str(tmp_path / "plan.json")], run_plan)
    for name in able:
        for kind, (expected, tokens) in alone[name].items():
            for rank in range(num_ranks):
                seen = np.load(tmp_path / f"{name}-{kind}-{rank}.npz")
                difference = np.abs(seen["logits"] - expected).max() / np.abs(expected).max()
                assert difference < TOLERANCE, f"{name} under {kind}, rank {rank}: {difference:.1e}"
                assert seen["tokens"].tolist() == tokens, f"{name} under {kind}, rank {rank}"


def partly_on_disk(model: Path, folder: Path) -> dict[str, Any]:
    """Options of `dispatch` under which some of a tiny model's layers lie in memory and some on disk."""
    memory = int(0.8 * (model / "model.safetensors").stat().st_size)
    return {"max_memory": [f"cpu={memory // 1000}KB"], "offload_folder": str(folder)}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_fitted_changes_every_module(name, alone, maps):
    """So that a module whose map a rank does not apply, or takes from others' columns, shows in the logits."""
    plain = alone[name]
    for kind, directory in maps(name).items():
        fitted = Intervention.load(directory)
        for site in fitted.sites:
            assert fitted.restricted({site}).num_changed > 0, f"{site} under {kind}"
        others = [plain[other][0] for other in plain if other != kind]
        assert all(np.abs(plain[kind][0] - other).max() > 1e-2 * np.abs(other).max() for other in others)


@pytest.fixture(scope="module")
def collected_under(tiny_dir, sentences_csv, tmp_path_factory):
    """(Words of a collection under a map, its store by one process), which differs from one without the map."""
    place = tmp_path_factory.mktemp("under")
    random_map(str(tiny_dir("llama"))).save(place / "map")
    what = ["--model", str(tiny_dir("llama")), "--data", sentences_csv, "--concepts", "toxic", "--num-positive", "20"]
    what += ["--num-negative", "20", "--tokens-per-batch", "256"]
    under = ["--intervention", str(place / "map")]
    assert main(["collect", *what, "--store", str(place / "plain")]) == 0
    assert main(["collect", *what, *under, "--store", str(place / "alone")]) == 0
    plain, changed = (open_store(place / name)["activations"] for name in ("plain", "alone"))
    for site in plain:
        assert not np.allclose(plain[site]["max"].values, changed[site]["max"].values, atol=1e-2), site
    return [*what, *under], place / "alone"


@pytest.mark.parametrize("sharding", ["fsdp", "tensor", "zero3"])
def test_collection_under_an_intervention(sharding, collected_under, tmp_path):
    words, alone = collected_under
    run_ranks(2, ["collect", *words, "--store", str(tmp_path / "ranks"), "--sharding", sharding])
    assert_same(tmp_path / "ranks", alone, sharding)
