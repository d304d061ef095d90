"""`evaluate` in process and with a server of the same model, plain and under an intervention, side by side.

    python -m tests.benchmarks.bench_serve --model MODEL_DIR --intervention DIR [--strength 1] --out DIR
        --prompts rtp_prompts.jsonl --texts texts.csv --server '/envs/vllm/bin/vllm serve {model} --port {port}'
        [--dtype float32] [--cases plain laid] [more flags of evaluate]

The server's command says its own dtype, and its environment has the plugin. The two draw other continuations, so their
rates are compared by 95 % intervals; perplexities should be the same but for rounding. Results that are in --out are
kept, and shown again.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from aura_dist.evaluation.compare import with_interval
from aura_dist.evaluation.results import read_results

LIMIT = 1e-3  # of the relative difference of perplexities
SHOWN = {"toxic, %": (100, 2), "expected maximum": (1, 3), "perplexity": (1, 4)}  # factor, digits


def figures(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    overall, perplexity = results["toxicity"]["overall"], results["perplexity"]
    ends = {"value": "token_weighted", "low": "token_weighted_low", "high": "token_weighted_high"}
    found = (overall["probability"], overall["expected_maximum"], {end: perplexity[key] for end, key in ends.items()})
    return dict(zip(SHOWN, found, strict=True))


def side_by_side(case: str, here: dict[str, Any], there: dict[str, Any]) -> str:
    """The figures of both, and whether they agree."""
    found = {"in process": figures(here), "server": figures(there)}
    rows = [[case, *SHOWN]]
    rows += [[name, *(with_interval(one[key], *SHOWN[key]) for key in SHOWN)] for name, one in found.items()]
    lines = [f"{row[0]:12}" + "".join(f"  {cell:>26}" for cell in row[1:]) for row in rows]
    one, other = found.values()
    for key in ("toxic, %", "expected maximum"):
        overlap = one[key]["low"] <= other[key]["high"] and other[key]["low"] <= one[key]["high"]
        lines.append(f"{key}: the intervals {'overlap' if overlap else 'DO NOT OVERLAP'}")
    apart = abs(other["perplexity"]["value"] / one["perplexity"]["value"] - 1)
    verdict = "within" if apart <= LIMIT else "MORE THAN"
    return "\n".join([*lines, f"perplexity: {apart:.1e} of it apart, {verdict} {LIMIT:g}"])


def evaluated(out: Path, flags: list[str]) -> dict[str, Any]:
    if not out.exists():
        subprocess.run([sys.executable, "-m", "aura_dist", "evaluate", *flags, "--out", str(out)], check=True)
    return read_results(str(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("--model", "--intervention", "--prompts", "--texts", "--server"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--strength", default="1")
    parser.add_argument("--dtype", default="float32", help="of the model in process")
    parser.add_argument("--scorer", default="profanity-check")
    parser.add_argument("--cases", nargs="+", default=["plain", "laid"], choices=["plain", "laid"])
    args, more = parser.parse_known_args()
    flags = ["--model", args.model, "--toxicity-prompts", args.prompts, "--perplexity-texts", args.texts]
    flags += ["--scorer", args.scorer, *more]
    laid = {"plain": [], "laid": ["--intervention", args.intervention, "--strength", args.strength]}
    for case in args.cases:
        here = evaluated(args.out / f"{case}-here.json", [*flags, *laid[case], "--dtype", args.dtype])
        there = evaluated(args.out / f"{case}-server.json", [*flags, *laid[case], "--server", args.server])
        print(side_by_side(case, here, there), flush=True)


if __name__ == "__main__":
    main()
