"""A store of 8 GB raw scored by two workers of 1 GB each: what each worker takes at most, and whether any was lost.

    python tests/benchmarks/bench_worker_memory.py [--scratch DIR]

100,000 rows × 20,000 neurons, so that a chunk column has the greatest size there is (250 MB). All statistics. Each
worker's resident memory (what Dask holds its limit against) is sampled from outside; a worker killed by its limit
would be replaced by another process.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from tests.stores import make_store

NUM_ROWS, WIDTHS, LIMIT = 100_000, (10_000, 10_000), 1_000_000_000


def watch(process: subprocess.Popen) -> dict[int, int]:
    """Peak resident bytes of every worker process, by its id, until the command ends; not of what a worker starts."""
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for child in psutil.Process(process.pid).children():
            try:
                if "spawn_main" in " ".join(child.cmdline()):
                    peaks[child.pid] = max(peaks.get(child.pid, 0), child.memory_info().rss)
            except psutil.Error:
                continue
        time.sleep(0.02)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", default=None)
    args = parser.parse_args()
    scratch = args.scratch or tempfile.mkdtemp()
    store = Path(scratch) / "bench-memory.zarr"
    if not store.exists():
        make_store(store, NUM_ROWS, WIDTHS)
    shutil.rmtree(store / "scores", ignore_errors=True)
    print(f"{NUM_ROWS:,} rows × {sum(WIDTHS):,} neurons: {NUM_ROWS * sum(WIDTHS) * 4 / 1e9:.1f} GB raw")
    settings = ["--dask", "processes", "--num-workers", "2", "--memory-limit", str(LIMIT)]
    command = [sys.executable, "-m", "aura_dist", "score", "--store", str(store), *settings]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peaks = watch(process)
        output.seek(0)
        text = output.read()
    assert process.returncode == 0, text
    print(next(line for line in reversed(text.splitlines()) if " score: " in line).partition(" ")[2])
    for peak in peaks.values():
        print(f"worker: at most {peak / 1e6:,.0f} MB resident, {peak / LIMIT:.0%} of its limit")
    complaints = [line for line in text.splitlines() if "memory" in line.lower() or "restart" in line.lower()]
    print(f"workers started: {len(peaks)}; complaints about memory: {len(complaints)}", *complaints, sep="\n")
    assert len(peaks) == 2, "a worker was lost"
    assert max(peaks.values()) < LIMIT
    if args.scratch is None:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
