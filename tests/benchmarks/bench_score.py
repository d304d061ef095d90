"""Scoring from a store on disk to scores on disk, with where the time goes and what the machine could do at best.

    python tests/benchmarks/bench_score.py [--scratch DIR]

2,500 rows × 400,000 neurons of bfloat16 values in float32 (4 GB raw, lz4), two worker processes. Starting the cluster
and loading compiled kernels are left out. Each figure is the best of the repeats, the two kinds taking turns. The
store lies in the page cache as far as it fits: `disk` reads its files in the same state.
"""

import argparse
import logging
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from aura_dist.config.verbs import ScoreConfig
from aura_dist.scoring.columns import statistics_by_concept
from aura_dist.scoring.statistics import STATISTICS
from aura_dist.stages import score
from aura_dist.store.access import get_array, open_group
from tests.stores import make_store

NUM_ROWS, WIDTH, NUM_SITES = 2_500, 25_000, 16
LOGGER = logging.getLogger("aura_dist")


class Lines(logging.Handler):
    """Keeps the engine's own log lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run(store: Path, *statistics: str) -> tuple[float, str, str]:
    """Neurons per second, and the engine's lines of its progress and of its shares."""
    shutil.rmtree(store / "scores", ignore_errors=True)
    lines = Lines()
    LOGGER.addHandler(lines)
    score._show = lambda *_: None  # tables are for people
    score.run(ScoreConfig(store=str(store), dask="processes", num_workers=2, statistics=list(statistics)))
    LOGGER.removeHandler(lines)
    rate_line = [line for line in lines.lines if line.startswith("score:")][-1]
    shares = next(line for line in lines.lines if "workers' time" in line)
    rate = float(re.search(r"([\d,]+) neurons/s", rate_line)[1].replace(",", ""))
    return rate, rate_line, shares


def best_seconds(call, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def kernel_seconds(store: Path) -> str:
    """Statistics of one column of chunks, on one thread."""
    group = open_group(str(store))
    array = get_array(group, "activations/layers.0.up/max")
    values_NM = np.asarray(array[:, : array.chunks[1]])
    labels_CN = np.ascontiguousarray(group["samples/label"][...].T)
    parts = []
    for what, names in (("all statistics", [n for n, row in STATISTICS.items() if row.of]), ("AUROC", ["auroc"])):
        statistics_by_concept(values_NM, labels_CN, names)
        seconds = best_seconds(lambda names=names: statistics_by_concept(values_NM, labels_CN, names), 15)
        parts.append(f"{what} {seconds / values_NM.shape[1] * 1e6:.1f} µs a neuron")
    return f"kernel, one thread: {', '.join(parts)}"


def limits(store: Path) -> list[str]:
    """What reading the files, and moving memory, takes at best."""
    files = [f for f in (store / "activations").rglob("c/*/*") if f.is_file()]
    num_bytes = sum(f.stat().st_size for f in files)
    disk = num_bytes / best_seconds(lambda: [f.read_bytes() for f in files], 2)
    block = np.ones(1 << 26, np.float32)
    target = np.empty_like(block)
    memory = 2 * block.nbytes / best_seconds(lambda: np.copyto(target, block))
    array = get_array(open_group(str(store)), "activations/layers.0.up/max")
    columns = slice(0, array.chunks[1] * 8)
    raw = NUM_ROWS * columns.stop * 4
    decoding = raw / best_seconds(lambda: array[:, columns])
    return [
        f"disk: {num_bytes / 1e9:.2f} GB of files for {NUM_ROWS * WIDTH * NUM_SITES * 4 / 1e9:.2f} GB raw, read by one "
        f"thread at {disk / 1e9:.2f} GB/s = {disk / num_bytes * WIDTH * NUM_SITES:,.0f} neurons/s",
        f"reading and decoding through Zarr, one thread: {decoding / 1e9:.2f} GB/s raw = "
        f"{decoding / NUM_ROWS / 4:,.0f} neurons/s",
        f"memory: copying at {memory / 1e9:.1f} GB/s, read and write counted",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    scratch = args.scratch or tempfile.mkdtemp()
    LOGGER.setLevel(logging.INFO)
    store = Path(scratch) / "bench-score.zarr"
    if not store.exists():
        make_store(store, NUM_ROWS, [WIDTH] * NUM_SITES)
    print(f"{NUM_ROWS:,} rows × {WIDTH * NUM_SITES:,} neurons, bfloat16 values in float32, two worker processes")
    runs: dict[str, list[tuple[float, str, str]]] = {"AUROC alone": [], "all statistics": []}
    for _ in range(args.repeats):
        runs["AUROC alone"].append(run(store, "auroc"))
        runs["all statistics"].append(run(store))
    for what, found in runs.items():
        rates = ", ".join(f"{rate:,.0f}" for rate, _, _ in found)
        print(f"{what}: best {max(found)[0]:,.0f} neurons/s (runs: {rates})\n  {max(found)[1]}\n  {max(found)[2]}")
    print(kernel_seconds(store))
    print("\n".join(limits(store)))
    if args.scratch is None:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
