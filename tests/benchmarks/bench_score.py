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

import numba
import numpy as np

from aura_dist.config.verbs import ScoreConfig
from aura_dist.scoring import auroc_kernels, run_kernels
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


@numba.njit
def gather_only(bits_NM, rows_K, columns_WK):
    for first in range(0, bits_NM.shape[1] - columns_WK.shape[0] + 1, columns_WK.shape[0]):
        auroc_kernels.gather(bits_NM, rows_K, first, columns_WK.shape[0], columns_WK)


@numba.njit
def gather_and_sort(bits_NM, rows_K, columns_WK, table, used, run_K, keys_R, rest_R, values_R, nan_R):
    for first in range(0, bits_NM.shape[1] - columns_WK.shape[0] + 1, columns_WK.shape[0]):
        auroc_kernels.gather(bits_NM, rows_K, first, columns_WK.shape[0], columns_WK)
        for j in range(columns_WK.shape[0]):
            auroc_kernels.to_keys(columns_WK[j], 0x7F800000)
            runs = run_kernels.runs_by_counting(columns_WK[j], table, used, run_K, keys_R, rest_R)
            run_kernels.values_of_runs(keys_R, runs, 0x7F800000, False, values_R, nan_R)


def kernel_shares(store: Path) -> str:
    """Transposing, sorting and merging (everything after the sort) of one column of chunks, on one thread."""
    group = open_group(str(store))
    array = get_array(group, "activations/layers.0.up/max")
    width = array.chunks[1] // 64 * 64
    values_NM = np.asarray(array[:, :width])
    labels_CN = np.ascontiguousarray(group["samples/label"][...].T)
    bits_NM, rows_K = values_NM.view(np.uint32), np.arange(len(values_NM))
    n = len(rows_K)
    columns_WK = np.empty((64, n), np.uint32)
    scratch = (np.zeros(1 << 16, np.uint32), np.zeros(1 << 10, np.bool_), np.empty(n, np.int32))
    scratch += (np.empty(n + 1, np.uint32), np.empty(n + 1, np.int32), np.empty(n + 1), np.empty(n + 1, np.bool_))
    everything = [name for name, statistic in STATISTICS.items() if statistic.of]
    calls = {
        "transposing": lambda: gather_only(bits_NM, rows_K, columns_WK),
        "sorting": lambda: gather_and_sort(bits_NM, rows_K, columns_WK, *scratch),
        "merging": lambda: statistics_by_concept(values_NM, labels_CN, everything),
    }
    for call in calls.values():
        call()
    seconds = {name: best_seconds(call, 15) for name, call in calls.items()}
    alone = best_seconds(lambda: statistics_by_concept(values_NM, labels_CN, ["auroc"]), 15)
    transposing, sorting = seconds["transposing"], seconds["sorting"] - seconds["transposing"]
    us = {"transposing": transposing, "sorting": sorting, "merging": seconds["merging"] - seconds["sorting"]}
    parts = ", ".join(f"{name} {s / width * 1e6:.1f} µs ({s / seconds['merging']:.0%})" for name, s in us.items())
    return f"kernel, one thread, all statistics: {parts}; AUROC alone: {alone / width * 1e6:.1f} µs a neuron in all"


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
    print(kernel_shares(store))
    print("\n".join(limits(store)))
    if args.scratch is None:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
