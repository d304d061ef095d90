"""How well the packaged judges of toxicity tell toxic comments from others, how they differ, and how fast they are.

python -m tests.benchmarks.bench_judges COMMENTS.csv [--comments 3000] [--seed 0]

COMMENTS.csv has the columns text and toxic; `--comments` of them are drawn, and each is judged whole. Prints a
judge's AUROC with a 95 % interval (percentiles of 1,000 resamples of comments), what share it calls toxic of the toxic
and of the others, and comments a second; then how often the judges agree. `tox-block` was trained on Jigsaw's comments,
maybe on these.
"""

import argparse
import os
import platform
import time
from datetime import date
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

import aura_dist
from aura_dist.evaluation.figures import THRESHOLD
from aura_dist.evaluation.scorers import PACKAGED
from aura_dist.text.table import read_table

NUM_RESAMPLES = 1_000


def area(scores_N: NDArray[np.float64], labels_N: NDArray[np.bool_]) -> float:
    return float(aura_dist.auroc(scores_N[:, None], labels_N)[0])


def interval(scores_N: NDArray[np.float64], labels_N: NDArray[np.bool_], seed: int) -> tuple[float, float]:
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(NUM_RESAMPLES):
        rows = draw.integers(len(scores_N), size=len(scores_N))
        found.append(area(scores_N[rows], labels_N[rows]))
    low, high = np.percentile(found, [2.5, 97.5])
    return low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comments")
    parser.add_argument("--comments", dest="number", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    columns = read_table(args.comments, ["text", "toxic"]).columns
    rows = np.random.default_rng(args.seed).permutation(len(columns["text"]))[: args.number]
    texts = [str(columns["text"][row]) for row in rows]
    labels_N = np.array([float(columns["toxic"][row]) >= 0.5 for row in rows])
    versions = ", ".join(f"{name} {version(name)}" for name in ("alt-profanity-check", "scikit-learn", "tox-block"))
    print(f"{os.cpu_count()} cores, {date.today()}; Python {platform.python_version()}, {versions}")
    print(f"{len(texts):,} comments, {labels_N.sum():,} toxic\n")
    print(
        "| judge | AUROC (95 %) | of the toxic, % | of the others, % | comments a second |\n|---|---:|---:|---:|---:|"
    )
    called = {}
    for name, make in PACKAGED.items():
        judge = make()
        begun = time.perf_counter()
        scores_N = judge.score(texts)
        seconds = time.perf_counter() - begun
        called[name] = scores_N >= THRESHOLD
        low, high = interval(scores_N, labels_N, args.seed)
        shares = [f"{100 * called[name][labels_N == of].mean():.1f}" for of in (True, False)]
        print(
            f"| {name} | {area(scores_N, labels_N):.3f} ({low:.3f}–{high:.3f}) | {' | '.join(shares)} "
            f"| {len(texts) / seconds:,.0f} |"
        )
    first, second = called.values()
    same, only_first, only_second = (100 * v.mean() for v in (first == second, first & ~second, second & ~first))
    print(
        f"\nThey agree on {same:.1f} %; only the first calls toxic {only_first:.1f} %, the second {only_second:.1f} %."
    )


if __name__ == "__main__":
    main()
