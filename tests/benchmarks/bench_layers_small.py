"""Layer by layer on a model that fits in memory: `layers` against `replicate`, and `fit --sequential` against a
collection a layer, each command a process of its own.

python tests/benchmarks/bench_layers_small.py --model GEMMA_DIR --data jigsaw_toxicity.csv --folder DIR
    [--rows 200] [--pairs 5] [--layers 18] [--sequential-rows 100] [--only layers|sequential]

The stores in the folder take some 100 MB.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from aura_dist.interventions.artifact import Intervention

NORMS = ("model.layers.{}.post_attention_layernorm", "model.layers.{}.post_feedforward_layernorm")


def command(*words: object) -> float:
    """Seconds of `aura-dist WORDS`."""
    begun = time.perf_counter()
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        [sys.executable, "-m", "aura_dist", *map(str, words)], check=True, env={**os.environ, **path},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - begun


def labelled(args: argparse.Namespace, rows: int) -> list[object]:
    half = ["--num-positive", rows // 2, "--num-negative", rows // 2]
    return ["--model", args.model, "--data", args.data, *half, "--max-tokens", 128]


def running(store: Path) -> float:
    """Seconds of a collection without start and loading."""
    document = json.loads((store / "progress" / "zarr.json").read_text())
    return float(document["attributes"]["times"]["seconds"])


def against_replicate(args: argparse.Namespace) -> None:
    ratios, walls = [], []
    for pair in range(args.pairs):
        found = {}
        for sharding in ("replicate", "layers")[:: 1 if pair % 2 else -1]:
            store = args.folder / f"{sharding}.zarr"
            words = [*labelled(args, args.rows), "--concepts", "toxic", "--sharding", sharding, "--overwrite"]
            wall = command("collect", *words, "--store", store)
            found[sharding] = running(store), wall
        ratios.append(found["layers"][0] / found["replicate"][0])
        walls.append(found["layers"][1] / found["replicate"][1])
        print(f"pair {pair}: replicate {found['replicate'][0]:.1f} s, layers {found['layers'][0]:.1f} s", flush=True)
    print(
        f"layers / replicate, {args.rows} rows: {median(ratios):.3f} (median of {args.pairs}; {min(ratios):.3f} to "
        f"{max(ratios):.3f}), whole processes {median(walls):.3f}; aim at most 1.05"
    )


def a_collection_a_layer(args: argparse.Namespace) -> tuple[float, Intervention]:
    """What the recipe did before there was `fit --sequential`."""
    before: list[object] = []
    onto: list[object] = []
    seconds, out = 0.0, args.folder
    for layer in range(args.layers):
        store, out = args.folder / "layer.zarr", args.folder / f"map-{layer}"
        modules = [name.format(layer) for name in NORMS]
        words = [*labelled(args, args.sequential_rows), "--concepts", "toxic", "--pooling", "mean", "--overwrite"]
        seconds += command("collect", *words, "--modules", *modules, *before, "--store", store)
        seconds += command("score", "--store", store)
        fitted = ["fit", "--store", store, "--concept", "toxic", "--method", "linear-act"]
        seconds += command(*fitted, *onto, "--out", out)
        before, onto = ["--intervention", out], ["--onto", out]
    return seconds, Intervention.load(out)


def against_the_loop(args: argparse.Namespace) -> None:
    modules = [name.format(layer) for layer in range(args.layers) for name in NORMS]
    words = [*labelled(args, args.sequential_rows), "--concept", "toxic", "--method", "linear-act"]
    ours = command("fit", "--sequential", *words, "--modules", *modules, "--out", args.folder / "sequential")
    theirs, expected = a_collection_a_layer(args)
    found = Intervention.load(args.folder / "sequential")
    off = max(
        float(np.abs(mine - other).max() / max(1.0, float(np.abs(other).max())))
        for site in expected.sites
        for mine, other in zip(found.map_of(site), expected.map_of(site), strict=True)
        if mine is not None and other is not None
    )
    print(
        f"fit --sequential, {args.layers} layers, {args.sequential_rows} rows: {ours:.1f} s; a collection a layer "
        f"{theirs:.1f} s: {theirs / ours:.1f} times as fast; maps differ by {off:.1e} at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--sequential-rows", type=int, default=100)
    parser.add_argument("--only", choices=("layers", "sequential"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.only != "sequential":
        against_replicate(args)
    if args.only != "layers":
        against_the_loop(args)


if __name__ == "__main__":
    main()
