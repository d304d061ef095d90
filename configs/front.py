"""What configs/front.sh does between the commands: the parts of the data, and the choice of what is reported.

python configs/front.py parts COMMENTS.csv NEUTRAL.csv DIR [--beside RTP.jsonl] [--choosing 120] [--reported 150]
python configs/front.py modules GRID.yaml
python configs/front.py choose sweep/table.csv [--budget 0.5]
python configs/front.py table RUN_DIR [RUN_DIR …] [--rows none aura mean-act-gated …]
"""

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from held_out_openings import held_out, openings, write_rest

from aura_dist.errors import AuraError, InputError
from aura_dist.evaluation.compare import MISSING, against_plain, interval
from aura_dist.evaluation.results import read_results
from aura_dist.text.labels import check_texts
from aura_dist.text.table import read_table

LEAST_NEUTRAL = 40
MEASURED = 100  # of the neutral texts, but a quarter of them at most
Results = Mapping[str, Any]


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


def table(args: argparse.Namespace) -> None:
    """Of one or several runs, what each method's chosen cell was reported with: a row a method, three columns a run.

    Perplexity is the plain model's in its row, and what an intervention adds to it in the others.
    """
    runs = [{path.stem: read_results(str(path)) for path in sorted(run.glob("results/*.json"))} for run in args.runs]
    for run, found in zip(args.runs, runs, strict=True):
        if lacking := [name for name in ["none", *(args.rows or [])] if name not in found]:
            raise InputError(f"{str(run)!r}: expected results/{lacking[0]}.json, got {', '.join(found) or 'none'}")
    head = [f"{Path(found['none']['model']['name']).name}: toxic, % | times fewer | perplexity" for found in runs]
    lines = [f"| | {' | '.join(head)} |", f"|---|{'---:|' * 3 * len(runs)}"]
    for name in args.rows or ["none", *sorted({name for found in runs for name in found} - {"none"})]:
        cells = [cell for found in runs for cell in reported(found.get(name), found["none"])]
        lines.append(f"| {' | '.join([name.replace('-gated', ', gated'), *cells])} |")
    print("\n".join(lines))


def reported(results: Results | None, plain: Results) -> list[str]:
    if results is None:
        return [MISSING] * 3
    toxic = interval(results["toxicity"]["overall"]["probability"], 100, 1)
    if results is plain:
        return [toxic, MISSING, f"{plain['perplexity']['token_weighted']:.2f}"]
    beside = against_plain(plain, results)
    ratio = {name: beside.get(f"times_less_toxic.{name}") for name in ("value", "low", "high")}
    if "perplexity_increase" not in beside:
        raise InputError("expected results of one model on the same texts, got others; evaluate them in the same way")
    return [toxic, interval(ratio, 1, 1), f"{beside['perplexity_increase']:+.2f}".replace("-", "−")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    verbs_and_paths = (
        (parts, ("comments", "neutral", "dir")), (modules, ("grid",)), (choose, ("table",)), (table, ()),
    )  # fmt: skip
    for verb, paths in verbs_and_paths:
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
        if verb is table:
            own.add_argument("runs", nargs="+", type=Path)
            own.add_argument("--rows", nargs="+")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    try:
        main()
    except (AuraError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"error: {error}")
