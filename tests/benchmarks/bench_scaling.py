"""How scoring time grows with neurons and with rows: figures, and a plot beside them.

    python tests/benchmarks/bench_scaling.py [--scratch DIR] [--out tests/benchmarks/results]

Neurons: stores of 100,000, 200,000 and 400,000 neurons × 2,500 rows, all statistics, two worker processes, cluster
start left out. Rows: 1,000, 10,000 and 100,000 rows in memory, all statistics, one thread, bfloat16 values and any
float32; beside it what N log N from 1,000 rows on would take.
"""

import argparse
import logging
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ml_dtypes
import numpy as np

from aura_dist.scoring.columns import statistics_by_concept
from aura_dist.scoring.statistics import STATISTICS
from aura_dist.store.schema import create_store
from tests.benchmarks.bench_score import LOGGER, NUM_ROWS, NUM_SITES, WIDTH, best_seconds, run
from tests.stores import make_store

ROWS = (1_000, 10_000, 100_000)
COLUMNS_OF_ROWS = {1_000: 1_024, 10_000: 256, 100_000: 64}
EVERYTHING = [name for name, statistic in STATISTICS.items() if statistic.of]


def part_of(store: Path, num_sites: int, path: Path) -> Path:
    """A store of the first sites of another one, sharing its chunks."""
    from aura_dist.store.access import open_group
    from aura_dist.store.record import commit, unfinished
    from aura_dist.store.schema import Samples
    from tests.stores import make_spec

    source = open_group(str(store))
    samples = Samples(*(source[f"samples/{name}"][...] for name in ("row", "num_tokens", "label")))
    create_store(str(path), make_spec([WIDTH] * num_sites, ["toxic"]), samples, {})
    for i in range(num_sites):
        shutil.rmtree(path / "activations" / f"layers.{i}.up")
        (path / "activations" / f"layers.{i}.up").symlink_to(store / "activations" / f"layers.{i}.up")
    group = open_group(str(path))
    for task in unfinished(group):
        commit(group, task, {})
    return path


def by_neurons(scratch: Path, repeats: int) -> dict[int, float]:
    """Neurons → best seconds."""
    store = scratch / "bench-score.zarr"
    if not store.exists():
        make_store(store, NUM_ROWS, [WIDTH] * NUM_SITES)
    stores = {n * WIDTH: part_of(store, n, scratch / f"part-{n}.zarr") for n in (NUM_SITES // 4, NUM_SITES // 2)}
    stores[NUM_SITES * WIDTH] = store
    rates: dict[int, list[float]] = {num: [] for num in stores}
    for _ in range(repeats):
        for num, path in stores.items():
            rates[num].append(run(path)[0])
    for num, path in stores.items():
        if path != store:
            shutil.rmtree(path)
        print(f"{num:>9,} neurons: {num / max(rates[num]):7.2f} s, {max(rates[num]):,.0f} neurons/s", flush=True)
    return {num: num / max(rate) for num, rate in rates.items()}


def by_rows(dtype) -> dict[int, float]:
    """Rows → best microseconds per neuron."""
    rng = np.random.default_rng(0)
    found = {}
    for num_rows in ROWS:
        values = rng.standard_normal((num_rows, COLUMNS_OF_ROWS[num_rows]), np.float32).astype(dtype).astype(np.float32)
        labels_CN = (rng.random((1, num_rows)) < 0.2).astype(np.int8)
        seconds = best_seconds(lambda v=values, y=labels_CN: statistics_by_concept(v, y, EVERYTHING), 5)
        found[num_rows] = seconds / values.shape[1] * 1e6
    return found


def linearithmic(rows: dict[int, float]) -> dict[int, float]:
    first = ROWS[0]
    return {n: rows[first] * n * np.log(n) / (first * np.log(first)) for n in ROWS}


def plot(neurons: dict[int, float], rows: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    thousands, first = [n // 1000 for n in neurons], min(neurons)
    left.plot(thousands, list(neurons.values()), "o-", label="measured")
    left.plot(thousands, [neurons[first] * n / first for n in neurons], "--", label="linear from the first")
    left.set(
        xlabel="neurons, thousands", ylabel="seconds", title="2,500 rows, all statistics, two processes", ylim=0, xlim=0
    )
    for name, found in rows.items():
        right.loglog(list(found), list(found.values()), "o-", label=name)
        right.loglog(list(found), list(linearithmic(found).values()), "--", label=f"N log N from 1,000, {name}")
    right.set(xlabel="rows N", ylabel="µs a neuron", title="all statistics, one thread")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    LOGGER.setLevel(logging.INFO)
    scratch = Path(args.scratch or tempfile.mkdtemp())
    neurons = by_neurons(scratch, args.repeats)
    first, *others = sorted(neurons)
    print("; ".join(f"× {n // first} neurons: × {neurons[n] / neurons[first]:.2f} time" for n in others))
    rows = {"bfloat16 values": by_rows(ml_dtypes.bfloat16), "any float32": by_rows(np.float32)}
    for name, found in rows.items():
        bound = linearithmic(found)
        print(f"{name}: " + "; ".join(f"{n:,} rows {us:,.1f} µs (N log N: {bound[n]:,.1f})" for n, us in found.items()))
    plot(neurons, rows, Path(args.out) / "bench_scaling.png")
    if args.scratch is None:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
