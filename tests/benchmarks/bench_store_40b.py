"""A store of Falcon-40B's true shape: written by the product's own writer, counted, and scored whole.

    python tests/benchmarks/bench_store_40b.py [--sites 120] [--rows 2500] [--scratch DIR] [--keep]

120 MLP modules, 2,457,600 neurons, 2,500 rows of normal bfloat16 values in float32: 24.6 GB raw, about 11 GB on disk.
Then `score` runs with two worker processes: AUROC alone, then all statistics. A worker's memory is the most that it
has resident while it scores.
"""

import argparse
import logging
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ml_dtypes
import numpy as np
import psutil

from aura_dist.config.verbs import ScoreConfig
from aura_dist.scoring.scores import score_layout, score_path
from aura_dist.stages import score
from aura_dist.store.access import get_array, open_group
from aura_dist.store.consolidated import consolidate
from aura_dist.store.grid import row_chunks, rows_per_chunk
from aura_dist.store.record import commit
from aura_dist.store.schema import (
    Samples,
    StoreSpec,
    activation_path,
    create_store,
    num_files,
    progress_layouts,
    response_layouts,
    tasks_of,
)
from aura_dist.store.writer import ChunkWriter
from tests.stores import make_labels, make_spec

WIDTHS = (32_768, 8_192)
LOGGER = logging.getLogger("aura_dist")


def make(store: Path, num_sites: int, num_rows: int) -> float:
    """Write the store; returns the seconds that it took, with making the values."""
    rng = np.random.default_rng(0)
    tokens = np.full(num_rows, 128, np.int32)
    samples = Samples(np.arange(num_rows), tokens, make_labels(rng, num_rows, 1))
    spec = make_spec([WIDTHS[i % 2] for i in range(num_sites)], ["toxic"])
    create_store(str(store), spec, samples, {})
    group, rows = open_group(str(store)), rows_per_chunk(num_rows)
    owned = {site.name: [(0, site.width)] for site in spec.sites}
    # each site takes them from another place on, because making new ones would take longer than writing
    normal = rng.standard_normal(rows * max(WIDTHS) * 2, np.float32)
    pool = normal.astype(ml_dtypes.bfloat16).astype(np.float32)

    def buffer() -> dict[tuple[str, str], np.ndarray]:
        return {(site.name, "max"): np.empty((rows + 1, site.width), np.float32) for site in spec.sites}

    begun = time.perf_counter()
    with ChunkWriter(group, owned, buffer, lambda task, bad: commit(group, task, bad)) as writer:
        for task in tasks_of(tokens, spec.tokens_per_batch):
            for chunk in row_chunks(task, rows):
                values, count = writer.free_buffer(), chunk.stop - chunk.start
                for part in values.values():
                    width = part.shape[1]
                    start = int(rng.integers(0, len(pool) - count * width))
                    part[:count] = pool[start : start + count * width].reshape(count, width)
                    moved = samples.label[chunk, 0] == 1
                    part[:count][moved, : width // 10] *= 2
                writer.write(task.index, chunk, values, lambda: None)
            writer.commit(task.index)
    seconds = time.perf_counter() - begun
    consolidate(open_group(str(store), to_write=True))
    return seconds


def planned_files(store: Path) -> tuple[int, int]:
    """Files that `plan` would say of the collection, and of its scores."""
    group = open_group(str(store))
    spec = StoreSpec.of(group)
    num_rows, num_tasks = group["samples/row"].shape[0], group["progress/done"].shape[0]
    arrays = response_layouts(spec.sites, spec.poolings, spec.dtype, num_rows)
    arrays |= progress_layouts(spec.sites, spec.poolings, (num_rows, 1), num_tasks, first_tokens=True)
    chunks = {site: get_array(group, activation_path(site.name, "max")).chunks[1] for site in spec.sites}
    scores = {score_path(s.name, "max"): score_layout(1, s.width, chunk) for s, chunk in chunks.items()}
    return 1 + num_files(arrays, 0), num_files(scores)


class Lines(logging.Handler):
    """Keeps the engine's own log lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def scored(store: Path, *statistics: str) -> str:
    """Score the store, and say how long it took by the clock and how much memory the largest worker held."""
    shutil.rmtree(store / "scores", ignore_errors=True)
    lines, peak, ended = Lines(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            for child in psutil.Process().children(recursive=True):
                try:
                    peak[0] = max(peak[0], child.memory_info().rss)
                except psutil.Error:
                    continue

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    LOGGER.addHandler(lines)
    begun = time.perf_counter()
    score.score(ScoreConfig(store=str(store), dask="processes", num_workers=2, statistics=list(statistics)))
    seconds = time.perf_counter() - begun
    LOGGER.removeHandler(lines)
    ended.set()
    watching.join()
    (line,) = [line for line in lines.lines if re.search(r"chunk columns, .* elapsed$", line)][-1:]
    return f"{seconds:.1f} s with start and q-values; {line}; largest worker {peak[0] / 1e9:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=120)
    parser.add_argument("--rows", type=int, default=2_500)
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    scratch = Path(args.scratch or tempfile.mkdtemp())
    store = scratch / "falcon-40b.zarr"
    LOGGER.setLevel(logging.INFO)
    neurons = sum(WIDTHS[i % 2] for i in range(args.sites))
    raw = 4 * neurons * args.rows
    print(f"{args.rows:,} rows × {neurons:,} neurons of {args.sites} modules, {raw / 1e9:.1f} GB raw", flush=True)
    if not store.exists():
        seconds = make(store, args.sites, args.rows)
        print(f"written in {seconds:.1f} s ({raw / 1e9 / seconds:.2f} GB/s raw)", flush=True)
    files = [f for f in store.rglob("*") if f.is_file() and "scores" not in f.relative_to(store).parts]
    size, planned = sum(f.stat().st_size for f in files), planned_files(store)
    print(f"{len(files):,} files (plan: {planned[0]:,}), {size / 1e9:.2f} GB")
    print("AUROC alone:", scored(store, "auroc"), flush=True)
    print("all statistics:", scored(store), flush=True)
    found = sum(f.is_file() for f in (store / "scores").rglob("*"))
    print(f"scores: {found:,} files (plan: {planned[1]:,}); {len(files) + found:,} files in all")
    if not args.keep:
        shutil.rmtree(store)


if __name__ == "__main__":
    main()
