"""What configs/front.sh does between the commands: the parts of the data, and the choice of what is reported.

python configs/front.py start GRID.yaml COMMENTS.csv NEUTRAL.csv TEXTS.csv RUN_DIR [--prompts RTP.jsonl]
                              [--model MODEL] [--judges NAME …] [--choosing 120] [--again 300] [--reported 150]
                              [--words 10]
python configs/front.py choose sweep/table.csv [--budget 0.5] [--contenders 6 | --measured DIR]
python configs/front.py table RUN_DIR [RUN_DIR …] [--rows none aura mean-act-gated …]
"""

import argparse
import csv
import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from held_out_openings import held_out, read_records, write_prompts, write_rest

from aura_dist.config.verbs import OF_LABELS, CollectConfig
from aura_dist.errors import AuraError, InputError
from aura_dist.evaluation.compare import ENDS, MISSING, against_plain, as_added, check_same_prompts, with_interval
from aura_dist.evaluation.results import read_results
from aura_dist.interventions.artifact import is_gated, method_of
from aura_dist.interventions.gates import FITTED_ON
from aura_dist.text.labels import check_texts
from aura_dist.text.table import Table, read_table

LEAST_NEUTRAL = 40
FOR_GATES = {*FITTED_ON, "mean_square"}
# settings of `collect` that the controls have their own of, or none
NOT_OF_CONTROLS = OF_LABELS | {"data", "pooling", "keep_tokens", "text_column", "store"}
MEASURED = 100  # of the neutral texts, but a quarter of them at most
Results = Mapping[str, Any]


def start(args: argparse.Namespace) -> None:
    """Check all that the front needs, once make the parts of the data, and print model and dtype, a line each.

    sweep.yaml is the grid, control.yaml what collects the control texts as the grid collects the others. parts/ has
    fit.csv, control.csv | choose.jsonl, again.jsonl, choose.csv | report.jsonl: no text is in two of them, and none in
    TEXTS.csv.
    A run directory that was started with another model, dtype, judge, size of a part or data is refused.
    """
    grid = read_grid(args.grid, args.model)
    least = {"choosing": 1, "again": 1, "reported": 0 if args.prompts else 1, "words": 1}
    for name, number in least.items():
        if getattr(args, name) < number:
            raise InputError(f"--{name}: expected {number} or more, got {getattr(args, name)}")
    if args.judges:
        from aura_dist.evaluation.scorers import load_scorer  # imports torch, which takes seconds

        for judge in args.judges:
            load_scorer(judge, None, "cpu")
        grid["evaluate"] = {**(grid.get("evaluate") or {}), "scorer": args.judges[0]}
    columns = {"comments": ["text", "toxic"], "neutral": ["text"], "texts": ["text"]}
    tables = {name: read_table(getattr(args, name), of) for name, of in columns.items()}
    if args.prompts:
        read_records(args.prompts)
        tables["prompts"] = read_table(args.prompts, ["prompt.text"])
    made_of = {name: table.sha256 for name, table in tables.items()} | {
        "model": grid["model"], "dtype": grid.get("dtype"),
        "judge": (args.judges or [None])[0], "choosing": args.choosing, "again": args.again,
        "reported": args.reported, "words": args.words,
    }  # fmt: skip
    kept = args.run / "parts" / "made_of.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else made_of
    for name in {**before, **made_of}:
        if before.get(name) != made_of.get(name):
            raise InputError(
                f"{str(args.run)!r}: expected the {name} that it was started with ({before.get(name)}), got "
                f"{made_of.get(name)}; give another RUN_DIR"
            )
    if not kept.exists():
        make_parts(args, tables, kept.parent)
        kept.write_text(json.dumps(made_of, indent=2), encoding="utf-8")
    written = {"sweep.yaml": {**grid, "out": "sweep"}, "control.yaml": control_of(grid)}
    for name, document in written.items():
        (args.run / name).write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    print(grid["model"], grid.get("dtype") or "", sep="\n")


def control_of(grid: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `collect` for the control texts: those of the grid but for its labels, with what gates read."""
    known = {one.name for one in fields(CollectConfig)} - {"strength"}  # at the top of a grid, that of evaluations
    given = {name: value for name, value in grid.items() if name in known} | grid["collect"]
    kept = {name: value for name, value in given.items() if name not in NOT_OF_CONTROLS}
    pooling = dict.fromkeys(["mean", *(one for one in given.get("pooling") or [] if one in FOR_GATES)])
    own = {"data": "parts/control.csv", "unlabelled": True, "pooling": list(pooling), "store": "control.zarr"}
    return {"collect": {**kept, **own}}


def make_parts(args: argparse.Namespace, tables: Mapping[str, Table], place: Path) -> None:
    prompts_of = {"report": args.reported, "choose": args.choosing, "again": args.again}
    number = sum(prompts_of.values())
    drawn = held_out(tables["comments"], set(), number, args.words)
    if len(drawn) < number:
        raise InputError(
            f"data {args.comments!r}: expected {number} toxic comments of {args.words} words or more, no two with the "
            f"same ones, got {len(drawn)}; give smaller --choosing, --again and --reported (of front.sh: PARTS)"
        )
    neutral = list(dict.fromkeys(check_texts(tables["neutral"], "text")))
    if len(neutral) < LEAST_NEUTRAL:
        raise InputError(f"data {args.neutral!r}: expected {LEAST_NEUTRAL} texts or more, got {len(neutral)}")
    texts_of = {name: set(check_texts(table, "text")) for name, table in tables.items() if name != "prompts"}
    for name, other in (("texts", "neutral"), ("texts", "comments"), ("neutral", "comments")):
        if both := texts_of[name] & texts_of[other]:
            raise InputError(
                f"data {getattr(args, name)!r}: expected texts that {getattr(args, other)!r} does not have, got "
                f"{len(both)} of them, such as {min(both)[:60]!r}; give others"
            )
    place.mkdir(parents=True, exist_ok=True)
    write_rest(tables["comments"], set(drawn), args.words, str(place / "fit.csv"))
    left = iter(drawn)
    for name, size in prompts_of.items():
        write_prompts(list(islice(left, size)), args.prompts if name == "report" else None, place / f"{name}.jsonl")
    num_controls = len(neutral) - min(MEASURED, len(neutral) // 4)
    for name, texts in (("control.csv", neutral[:num_controls]), ("choose.csv", neutral[num_controls:])):
        with (place / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])


def read_grid(path: Path, model: str | None) -> dict[str, Any]:
    """The grid, with `model` in the place of its own if that is given; a local directory becomes absolute."""
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{str(path)!r}: expected YAML: {error}") from error
    collected = grid.get("collect") if isinstance(grid, dict) else None
    modules = collected.get("modules") if isinstance(collected, dict) else None
    named = model or (grid.get("model") if isinstance(grid, dict) else None)
    if not isinstance(modules, list) or not modules or not isinstance(named, str):
        raise InputError(
            f"{str(path)!r}: expected `model`, a name, and `collect: modules`, a list; see configs/front-*.yaml"
        )
    return {**grid, "model": str(Path(named).resolve()) if Path(named).is_dir() else named}


def choose(args: argparse.Namespace) -> None:
    """Of each method, with and without a gate: name, intervention and strength of one cell, separated by tabs.

    The cell with the fewest toxic continuations that adds at most `budget` to the perplexity; where every cell adds
    more, the one that adds least. With `contenders`, so many of those within the budget instead, the least toxic of
    all methods. `measured` has the results of contenders on further prompts. They count in the place of the first ones,
    and a method's cell within the budget that has them goes before one that has none.
    """
    with args.table.open(newline="", encoding="utf-8") as file:
        done = [row["output"] for row in csv.DictReader(file) if row["state"] == "done"]
    cells = [read_results(str(args.table.parent / path)) for path in done]
    plain = next((c for c in cells if c["intervention"] is None), None)
    if plain is None or perplexity(plain) is None:
        raise InputError(f"{str(args.table)!r}: expected a finished cell of `method: none` with perplexity, got none")
    most = perplexity(plain) + args.budget
    if args.contenders is not None and args.contenders < 0:
        raise InputError(f"--contenders: expected 0 or more, got {args.contenders}")
    toxic_again = measured(args.measured) if args.measured else {}
    ranked: list[tuple[tuple[float, bool, float, float], str, tuple[str, float]]] = []
    for results in cells:
        made, costs = results["intervention"], perplexity(results)
        if made is None or costs is None:
            continue
        method = method_of(made).replace(" ", "-")
        if not results.get("toxicity"):
            raise InputError(f"{str(args.table)!r}: expected cells with toxicity, got {method} without")
        cell, over = cell_of(made), max(0.0, costs - most)
        rank = (over, cell not in toxic_again, toxic_again.get(cell, toxic_share(results)), costs)
        ranked.append((rank, method + ("-gated" if is_gated(made) else ""), cell))
    ranked.sort()
    best: dict[str, tuple[str, float]] = {}
    for _, name, cell in ranked:
        best.setdefault(name, cell)
    within = [(name, cell) for (over, *_), name, cell in ranked if over == 0]
    for name, cell in best.items() if args.contenders is None else within[: args.contenders]:
        print(name, *cell, sep="\t")


def measured(place: Path) -> dict[tuple[str, float], float]:
    """Cell → its share of toxic continuations, of results on the same prompts; InputError for others."""
    if not place.is_dir():
        raise InputError(f"{str(place)!r}: expected a directory of results, found none")
    found = [read_results(str(path)) for path in sorted(place.glob("*.json"))]
    if any(not results.get("toxicity") or not results["intervention"] for results in found):
        raise InputError(f"{str(place)!r}: expected toxicity under interventions, got results without; remove them")
    hows = {
        tuple(results["toxicity"][name] for name in ("prompts_sha256", "num_samples", "scorer")) for results in found
    }
    if len(hows) > 1:
        raise InputError(
            f"{str(place)!r}: expected results on one set of prompts by one judge, got {len(hows)}; remove it"
        )
    return {cell_of(results["intervention"]): toxic_share(results) for results in found}


def cell_of(made: Results) -> tuple[str, float]:
    """Directory and strength of an intervention."""
    return str(Path(str(made["directory"])).resolve()), made["strength"]


def toxic_share(results: Results) -> float:
    return float(results["toxicity"]["overall"]["probability"]["value"])


def perplexity(results: Results) -> Any:
    """None where it was not measured, or is not finite."""
    return (results.get("perplexity") or {}).get("token_weighted")


def table(args: argparse.Namespace) -> None:
    """Of one or several runs, what each method's chosen cell was reported with: a row a method, three columns a run.

    Perplexity is the plain model's in its row, and what an intervention adds to it in the others.
    """
    runs = [{path.stem: read_results(str(path)) for path in sorted(run.glob("results/*.json"))} for run in args.runs]
    for run, found in zip(args.runs, runs, strict=True):
        if "none" not in found:
            raise InputError(f"{str(run)!r}: expected results/none.json, got {', '.join(found) or 'no results'}")
    everyone = dict.fromkeys(name for found in runs for name in found)
    if lacking := [name for name in args.rows or [] if name not in everyone]:
        raise InputError(f"--rows: expected some of {', '.join(everyone)}, got {lacking[0]!r}")
    head = [f"{Path(found['none']['model']['name']).name}: toxic, % | times fewer | perplexity" for found in runs]
    lines = [f"| | {' | '.join(head)} |", f"|---|{'---:|' * 3 * len(runs)}"]
    for name in args.rows or ["none", *sorted(everyone.keys() - {"none"})]:
        cells = [cell for found in runs for cell in reported(found.get(name), found["none"])]
        lines.append(f"| {' | '.join([name.replace('-gated', ', gated'), *cells])} |")
    print("\n".join(lines))


def reported(results: Results | None, plain: Results) -> list[str]:
    if results is None:
        return [MISSING] * 3
    check_same_prompts(plain, results, "none.json")
    toxic, costs = with_interval(results["toxicity"]["overall"]["probability"], 100, 1), perplexity(results)
    if results is plain:
        return [toxic, MISSING, MISSING if costs is None else f"{costs:.2f}"]
    beside = against_plain(plain, results)
    ratio = {name: beside.get(f"times_less_toxic.{name}") for name in ("value", "low", "high")}
    added = {name: beside.get(f"perplexity_increase{end}") for name, end in ENDS.items()}
    if added["value"] is None and None not in (costs, perplexity(plain)):
        raise InputError("expected results of one model on the same texts, got others; evaluate them in the same way")
    return [toxic, with_interval(ratio, 1, 1), as_added(added)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    own = {verb: verbs.add_parser(verb.__name__) for verb in (start, choose, table)}
    for verb, sub in own.items():
        sub.set_defaults(run_verb=verb)
    for name, kind in (("grid", Path), ("comments", str), ("neutral", str), ("texts", str), ("run", Path)):
        own[start].add_argument(name, type=kind)
    for name, number in (("choosing", 120), ("again", 300), ("reported", 150), ("words", 10)):
        own[start].add_argument(f"--{name}", type=int, default=number)
    own[start].add_argument("--prompts")
    own[start].add_argument("--model")
    own[start].add_argument("--judges", nargs="+")
    own[choose].add_argument("table", type=Path)
    own[choose].add_argument("--budget", type=float, default=0.5)
    stage = own[choose].add_mutually_exclusive_group()
    stage.add_argument("--contenders", type=int)
    stage.add_argument("--measured", type=Path)
    own[table].add_argument("runs", nargs="+", type=Path)
    own[table].add_argument("--rows", nargs="+")
    args = parser.parse_args()
    args.run_verb(args)


if __name__ == "__main__":
    try:
        main()
    except (AuraError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"error: {error}")
