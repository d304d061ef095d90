"""What configs/front.sh does between the commands: the parts of the data, and the choice of what is reported.

python configs/front.py parts COMMENTS.csv NEUTRAL.csv DIR [--beside RTP.jsonl] [--choosing 120] [--reported 150]
python configs/front.py modules GRID.yaml
python configs/front.py choose sweep/table.csv [--budget 0.5]
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from held_out_openings import held_out, openings, write_rest

from aura_dist.errors import AuraError, InputError
from aura_dist.evaluation.results import read_results
from aura_dist.text.labels import check_texts
from aura_dist.text.table import read_table

LEAST_NEUTRAL = 40
MEASURED = 100  # of the neutral texts, but a quarter of them at most


def parts(args: argparse.Namespace) -> None:
    """fit.csv, control.csv | choose.jsonl, choose.csv | report.jsonl: no text is in two of them."""
    table = read_table(args.comments, ["text", "toxic"])
    drawn = held_out(table, set(), args.reported + args.choosing, args.words)
    if len(drawn) < args.reported + args.choosing:
        raise InputError(
            f"data {args.comments!r}: expected {args.reported + args.choosing} toxic comments of {args.words} words or "
            f"more, got {len(drawn)}; give --choosing and --reported"
        )
    neutral = list(dict.fromkeys(check_texts(read_table(args.neutral, ["text"]), "text")))
    if len(neutral) < LEAST_NEUTRAL:
        raise InputError(f"data {args.neutral!r}: expected {LEAST_NEUTRAL} texts or more, got {len(neutral)}")
    args.dir.mkdir(parents=True, exist_ok=True)
    write_rest(table, set(drawn), str(args.dir / "fit.csv"))
    openings(drawn[args.reported :], args.words, None, args.dir / "choose.jsonl")
    openings(drawn[: args.reported], args.words, args.beside, args.dir / "report.jsonl")
    num_controls = len(neutral) - min(MEASURED, len(neutral) // 4)
    for name, texts in (("control.csv", neutral[:num_controls]), ("choose.csv", neutral[num_controls:])):
        write(args.dir / name, ["text"], [[text] for text in texts])


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def modules(args: argparse.Namespace) -> None:
    """The modules that a grid collects, each on a line."""
    print("\n".join(yaml.safe_load(args.grid.read_text(encoding="utf-8"))["collect"]["modules"]))


def choose(args: argparse.Namespace) -> None:
    """Of each method, with and without a gate: name, intervention and strength of one cell, separated by tabs.

    The cell with the fewest toxic continuations that adds at most `budget` to the perplexity; where every cell adds
    more, the one that adds least.
    """
    with args.table.open(newline="", encoding="utf-8") as file:
        done = [row["output"] for row in csv.DictReader(file) if row["state"] == "done"]
    cells = [read_results(str(args.table.parent / path)) for path in done]
    plain = next((c for c in cells if c["intervention"] is None), None)
    if plain is None:
        raise InputError(f"{str(args.table)!r}: expected a finished cell of `method: none`, got none")
    most = plain["perplexity"]["token_weighted"] + args.budget
    best: dict[str, tuple[tuple[float, float, float], dict[str, object]]] = {}
    for cell in cells:
        made = cell["intervention"]
        perplexity = cell["perplexity"]["token_weighted"]
        if made is None or perplexity is None:
            continue
        name = made["method"] + ("-gated" if made.get("gate") else "")
        beyond = max(0.0, perplexity - most)
        rank = (beyond, cell["toxicity"]["overall"]["probability"]["value"], perplexity)
        if name not in best or rank < best[name][0]:
            best[name] = rank, made
    for name in sorted(best, key=lambda name: best[name][0]):
        made = best[name][1]
        print(name, Path(str(made["directory"])).resolve(), made["strength"], sep="\t")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    for verb, paths in ((parts, ("comments", "neutral", "dir")), (modules, ("grid",)), (choose, ("table",))):
        own = verbs.add_parser(verb.__name__)
        own.set_defaults(run=verb)
        for path in paths:
            own.add_argument(path, type=str if path in ("comments", "neutral") else Path)
        if verb is parts:
            own.add_argument("--beside")
            own.add_argument("--choosing", type=int, default=120)
            own.add_argument("--reported", type=int, default=150)
            own.add_argument("--words", type=int, default=10)
        if verb is choose:
            own.add_argument("--budget", type=float, default=0.5)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    try:
        main()
    except (AuraError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"error: {error}")
