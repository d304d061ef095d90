"""Rows per second of `collect` on one rank of one thread, and on two: `replicate`, side by side in turns.

python tests/benchmarks/bench_ranks.py --model MODEL_DIR --data jigsaw_toxicity.csv [--rows 500] [--repeats 2]

Start and loading are left out: the rate is that of the last progress line.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile

LINE = re.compile(r"collect: ([\d,]+) of ([\d,]+) rows, ([\d,]+) tokens/s")


def tokens_per_second(num_ranks: int, arguments: list[str]) -> float:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    run = subprocess.run(
        [sys.executable, *launcher, "-m", "aura_dist", "collect", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    done, wanted, rate = (int(n.replace(",", "")) for n in LINE.findall(run.stderr)[-1])
    assert done == wanted, run.stderr
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    half = str(args.rows // 2)
    arguments = ["--model", args.model, "--data", args.data, "--concepts", "toxic"]
    arguments += ["--num-positive", half, "--num-negative", half]
    ratios = []
    # stores are deleted at the end: ext4 is slow at making files just after it removed many
    scratch = tempfile.TemporaryDirectory()
    for repeat in range(args.repeats):
        one, two = (
            tokens_per_second(n, [*arguments, "--store", f"{scratch.name}/{repeat}-{n}.zarr"])
            for n in ((1, 2) if repeat % 2 == 0 else (2, 1))
        )
        if repeat % 2:
            one, two = two, one
        ratios.append(two / one)
        print(f"one rank {one:,.0f} tokens/s, two ranks {two:,.0f} tokens/s: {ratios[-1]:.2f}x", flush=True)
    print(f"{args.rows} rows, median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
