"""Peak anonymous memory of `collect` for few and for many rows, each in a process of its own.

python tests/benchmarks/bench_memory.py --model MODEL_DIR --data jigsaw_toxicity.csv [--rows 500 2000]
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.memory import peak_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, nargs=2, default=[500, 2000])
    args = parser.parse_args()
    peaks = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as scratch:
            half = str(rows // 2)
            sampling = ["--concepts", "toxic", "--num-positive", half, "--num-negative", half]
            command = ["--model", args.model, "--data", args.data, *sampling, "--store", f"{scratch}/store.zarr"]
            peaks.append(peak_of(["collect", *command], timeout_seconds=3600))
        print(f"{rows:,} rows: peak anonymous memory {peaks[-1] / 1e6:,.0f} MB", flush=True)
    print(f"ratio {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
