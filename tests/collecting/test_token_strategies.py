"""Tokens under every strategy: the store that one process writes, each shard by one rank. One launch of two ranks."""

import json
from collections import Counter

import numpy as np
import pytest

from aura_dist.cli import main
from aura_dist.store.access import open_group, read_array
from aura_dist.store.record import response_names
from aura_dist.store.tokens import StoredTokens
from tests.distributed.launch import run_ranks
from tests.distributed.loop import run_tokens

pytestmark = pytest.mark.timeout(300)

SHARDINGS = ("replicate", "fsdp", "tensor=2", "layers", "zero3")
MODELS = {
    "llama": ["all", "norm", "heads", "neurons", "residual"],
    "falcon-40b-style": ["all", "neurons", "residual"],
    "qwen3-moe": ["experts", "routing", "residual"],
}
ALSO = [("falcon-40b-style", "tensor=2"), ("qwen3-moe", "tensor=2")]
POOLINGS = ["max", "tokens"]


def test_stores_equal_those_of_one_process(tiny_dir, sentences_csv, tmp_path):
    wanted = [("llama", sharding) for sharding in SHARDINGS] + ALSO
    few = {"data": sentences_csv, "concepts": ["toxic"], "num_positive": 40, "num_negative": 40}
    runs = [
        {**few, "model": str(tiny_dir(name)), "modules": MODELS[name], "sharding": sharding, "pooling": POOLINGS,
         "tokens_per_batch": 256, "store": str(tmp_path / f"{name}-{sharding}.zarr")}
        for name, sharding in wanted
    ]  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    run_ranks(2, [str(tmp_path / "runs.json")], run_tokens, timeout_seconds=250)
    written = Counter[str]()
    for rank in range(2):
        mine = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        written.update(mine)
        assert sum("tensor=2" in shard and "/tokens " in shard for shard in mine) > 40, "ranks take turns"
    assert set(written.values()) == {1}, "every shard is written once, by one rank"
    for name in MODELS:
        flags = ["--num-positive", "40", "--num-negative", "40", "--tokens-per-batch", "256", "--pooling", *POOLINGS]
        given = ["--model", str(tiny_dir(name)), "--data", sentences_csv, "--concepts", "toxic"]
        plain = tmp_path / f"{name}.zarr"
        assert main(["collect", *given, "--modules", *MODELS[name], *flags, "--store", str(plain)]) == 0
        for other, sharding in wanted:
            if other == name:
                assert_same(tmp_path / f"{name}-{sharding}.zarr", plain, f"{name}, {sharding}")


def assert_same(ours, plain, what):
    groups = [open_group(str(store)) for store in (ours, plain)]
    names, expected = map(response_names, groups)
    assert names == expected
    tokens = [StoredTokens.of(group) for group in groups]
    for name in names:
        if name.endswith("/tokens"):
            site = name.removeprefix("activations/").removesuffix("/tokens")
            a, b = (one.values(site).read(slice(0, one.num_tokens)) for one in tokens)
        else:
            a, b = (read_array(group, name, complete=True) for group in groups)
        assert np.isfinite(a).all(), f"{what}: {name}"
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), f"{what}: {name}"
    for path in ("samples/offset", "samples/place", "tokens/input_ids", "tokens/sample", "tokens/counted"):
        np.testing.assert_array_equal(*(read_array(group, path) for group in groups))
