"""An intervention under every strategy gives the logits, and the greedy tokens, that one process gives."""

import json

import numpy as np
import pytest

from aura_dist.cli import main
from tests.distributed.intervened import logits_and_greedy, random_map, run_plan
from tests.distributed.launch import run_ranks
from tests.distributed.test_strategies import assert_same

TOLERANCE = 1e-5
MODELS = ("llama", "falcon-rotary", "falcon-40b-style", "mpt", "gpt2", "gemma3", "opt")
LAUNCHES = ((2, "fsdp", MODELS), (2, "tensor", MODELS), (4, "fsdp=2,tensor=2", MODELS), (2, "zero3", MODELS))


@pytest.fixture(scope="module")
def alone(tiny_dir):
    return {name: logits_and_greedy(str(tiny_dir(name)), "replicate") for name in MODELS}


@pytest.mark.parametrize(("num_ranks", "sharding", "models"), LAUNCHES, ids=lambda v: v if isinstance(v, str) else "")
def test_logits_equal_those_of_one_process(num_ranks, sharding, models, alone, tiny_dir, tmp_path):
    able = [name for name in models if not ("tensor" in sharding and name == "gpt2")]
    plan = {"sharding": sharding, "out": str(tmp_path), "models": {name: str(tiny_dir(name)) for name in able}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run_ranks(num_ranks, [str(tmp_path / "plan.json")], run_plan)
    for name in able:
        expected, tokens = alone[name]
        for rank in range(num_ranks):
            seen = np.load(tmp_path / f"{name}-{rank}.npz")
            difference = np.abs(seen["logits"] - expected).max() / np.abs(expected).max()
            assert difference < TOLERANCE, f"{name}, rank {rank}: {difference:.1e}"
            assert seen["tokens"].tolist() == tokens, name


@pytest.mark.parametrize("sharding", ["fsdp", "tensor", "zero3"])
def test_collection_under_an_intervention(sharding, tiny_dir, sentences_csv, tmp_path):
    random_map(str(tiny_dir("llama"))).save(tmp_path / "map")
    what = ["--model", str(tiny_dir("llama")), "--data", sentences_csv, "--concepts", "toxic", "--num-positive", "20"]
    how = ["--num-negative", "20", "--tokens-per-batch", "256", "--intervention", str(tmp_path / "map")]
    assert main(["collect", *what, *how, "--store", str(tmp_path / "alone")]) == 0
    run_ranks(2, ["collect", *what, *how, "--store", str(tmp_path / "ranks"), "--sharding", sharding])
    assert_same(tmp_path / "ranks", tmp_path / "alone", sharding)
