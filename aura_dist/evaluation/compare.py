"""Several results side by side: as a table of plain text or Markdown, and against a baseline."""

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aura_dist.errors import AuraError, InputError
from aura_dist.evaluation.figures import ByPrompt, Estimates, increase, ratios
from aura_dist.evaluation.results import by_judge, judges, read_results
from aura_dist.models.fingerprints import is_earlier

logger = logging.getLogger(__name__)

ENDS = {"value": "", "low": "_low", "high": "_high"}  # part of an estimate → how the name of its figure ends

MISSING = "–"
# section of the results → keys that its figures depend on beside the model, and what they are
_DEPEND_ON = {
    "toxicity": {
        "prompts_sha256": "prompts",
        "scorer": "scorer",
        "num_samples": "samples a prompt",
        "settings": "settings",
    },
    # of one file, the number of tokens tells where texts were cut
    "perplexity": {"sha256": "texts", "column": "column", "num_tokens": "tokens"},
}
Results = Mapping[str, Any]


def name_of(path: str) -> str:
    """What a results file is called in tables: `runs/a/results/aura.json` → `aura`."""
    return Path(path).stem


def load_all(paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name → results, each file once; InputError for a file that `evaluate` did not write.

    Files of one name get the directories above them into theirs.
    """
    found = list(dict.fromkeys(Path(path).resolve() for path in paths))
    depth, names = 1, [path.stem for path in found]
    while len(set(names)) < len(found):
        depth += 1
        names = ["/".join((*path.parts[-depth:-1], path.stem)) for path in found]
        if depth > max(len(path.parts) for path in found):  # such as a.json and a.txt
            names = [str(path) for path in found]
    return {name: read_results(str(path)) for name, path in zip(names, found, strict=True)}


def main(paths: Sequence[str]) -> int:
    """Print the results at `paths` as a Markdown table; the exit code, 2 with one line where they cannot be read."""
    try:
        if not paths:
            raise InputError("expected results files such as run/results/*.json, got none")
        found = load_all(paths)
        print(table(found, markdown=True))
        for line in differences(found):
            print(f"\n{line}")
    except AuraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_same_prompts(baseline: Results, results: Results, path: str) -> None:
    """InputError unless both measured toxicity, on the same prompts, in the same way."""
    theirs, ours = baseline.get("toxicity"), results.get("toxicity")
    if not theirs or not ours:
        raise InputError(f"--baseline {path!r}: expected results with toxicity, as these have, got none")
    lost = [key for key in (*_DEPEND_ON["toxicity"], "per_prompt") if key not in theirs]
    if lost:
        raise InputError(
            f"--baseline {path!r}: expected results with toxicity as `evaluate` writes them, got none of {lost[0]!r}"
        )
    for key, what in _DEPEND_ON["toxicity"].items():
        if theirs[key] != ours.get(key):
            raise InputError(
                f"--baseline {path!r}: expected the same {what} in both, got {str(theirs[key])[:80]} there and "
                f"{str(ours.get(key))[:80]} here; evaluate both in the same way"
            )


def _other_engine(what: str, results: Results, than: str, others: Results) -> str | None:
    """A line if two results are of different engines, or of different versions of one."""
    got, expected = _engine_of(results), _engine_of(others)
    if got == expected:
        return None
    return (
        f"{what}: expected the engine of {than}, {expected}, got {got}: engines draw other continuations at the same "
        "seed, and their difference is in what compares the two; evaluate both with one"
    )


def _engine_of(results: Results) -> str:
    server = results.get("server")
    if server is None:
        return "a model in process"
    return f"{server.get('engine')} {server.get('version') or '(no version)'}"


def per_prompt(results: Results) -> ByPrompt:
    """The figures of each prompt, in the file's order."""
    kept = results["toxicity"]["per_prompt"]
    return ByPrompt(np.array(kept["toxic_share"]), np.array(kept["maximum"]))


def against_baseline(
    baseline: Results, results: Results, path: str, groups: Mapping[str, NDArray[np.bool_]]
) -> dict[str, Any]:
    """The entry `toxicity.baseline`: baseline ÷ this for each group of prompts, paired over prompts.

    `path` is the baseline's; `groups`: name → [P] which prompts. InputError if they are not of the same prompts.
    """
    check_same_prompts(baseline, results, path)
    if line := _other_engine(f"--baseline {path!r}", baseline, "this evaluation", results):
        logger.warning(line)
    theirs, ours = per_prompt(baseline), per_prompt(results)
    compared: dict[str, Estimates | None] = {
        name: ratios(theirs.take(rows), ours.take(rows)) if rows.any() else None for name, rows in groups.items()
    }
    return {"results": path, "name": name_of(path), **compared}


def against_plain(plain: Results, results: Results) -> dict[str, float]:
    """Figures of an intervention beside the plain model's under the same settings; NaN is left out.

    `times_less_toxic.value`, `.low`, `.high`: share of toxic continuations, plain ÷ this, with its 95 % interval,
    paired over prompts. `perplexity_increase`, `_low`, `_high`: token-weighted perplexity, this − plain, with its
    interval, paired over texts.
    """
    prints = [one.get("model_fingerprint") for one in (plain, results)]
    if prints[0] != prints[1]:  # another checkpoint has replaced it
        if is_earlier(prints[0]) != is_earlier(prints[1]):
            logger.warning(
                "the plain model or a cell was evaluated by an earlier version: evaluate both to compare them"
            )
        return {}
    if line := _other_engine("a cell", results, "the plain model", plain):
        logger.warning(line)
    found = {f"times_less_toxic.{name}": value for name, value in (_ratio(results, plain) or {}).items()}
    found |= {f"perplexity_increase{ENDS[name]}": v for name, v in (perplexity_added(results, plain) or {}).items()}
    return {name: value for name, value in found.items() if value is not None and not math.isnan(value)}


def table(all_results: Mapping[str, Results], *, markdown: bool = False) -> str:
    """One line a result: toxicity with intervals, ratio to the first, perplexity, tasks; columns that any of them has.

    A ratio is shown if a result was measured on the same prompts as the first.
    """
    cells = {name: _cells(results, all_results) for name, results in all_results.items()}
    # those that a result lacks, where another has them; tasks last
    columns = [c for c in _COLUMNS if any(c in found for found in cells.values())]
    columns += dict.fromkeys(c for found in cells.values() for c in found if c not in _COLUMNS)
    rows = [["", *columns], *([name, *(found.get(c, MISSING) for c in columns)] for name, found in cells.items())]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|---" + "|---:" * len(columns) + "|", *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


# column → group of prompts, metric, factor, digits
_TOXICITY = {
    "toxic, %": ("overall", "probability", 100, 1),
    "expected maximum": ("overall", "expected_maximum", 1, 2),
    "any toxic of n, %": ("overall", "any_toxic", 100, 1),
    "toxic, % (toxic prompts)": ("toxic_prompts", "probability", 100, 1),
    "toxic, % (other prompts)": ("nontoxic_prompts", "probability", 100, 1),
}
_RATIO = "times less toxic"
_PERPLEXITY = {"perplexity": (), "perplexity, toxic texts": ("positive",), "perplexity, other texts": ("negative",)}
_FIRST, *_OTHERS = _TOXICITY
_ADDED, _DIVERGENCE = "perplexity added", "KL from plain"
_COLUMNS = (_FIRST, _RATIO, *_OTHERS, *_PERPLEXITY, _ADDED, _DIVERGENCE)


def differences(all_results: Mapping[str, Results]) -> list[str]:
    """A line for each result that did not measure what the first of its kind did, in the same way and engine."""
    said = []
    for part in _DEPEND_ON:
        measured = {name: conditions(part, r[part]) for name, r in all_results.items() if r.get(part)}
        first = next(iter(measured), "")
        for name, own in measured.items():
            unlike = [what for what, value in own.items() if value != measured[first][what]]
            if unlike:
                said.append(f"{name}: {part} with other {' and '.join(unlike)} than {first}: not to be compared")
    first = next(iter(all_results), "")
    lines = [_other_engine(name, results, first, all_results[first]) for name, results in all_results.items()]
    return [*said, *(line for line in lines if line is not None)]


def conditions(part: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the figures of a section depend on beside the model: equal where two may be compared.

    The seed is left out, because another seed draws another sample of the same.
    """
    found = {what: section.get(key) for key, what in _DEPEND_ON[part].items()}
    return {
        what: {k: v for k, v in value.items() if k != "seed"} if isinstance(value, Mapping) else value
        for what, value in found.items()
    }


def _cells(results: Results, everyone: Mapping[str, Results]) -> dict[str, str]:
    """Column → figure, of what was measured."""
    cells: dict[str, str] = {}
    toxicity = results.get("toxicity") or {}
    for column, (group, metric, factor, digits) in _TOXICITY.items():
        if toxicity.get(group):
            cells[column] = with_interval(_at(toxicity, group, metric), factor, digits)
    first = next(iter(everyone.values()))
    if cells:
        cells[_RATIO] = with_interval(None if results is first else _ratio(results, first), 1, 2)
    for judge in judges(results):
        seen = by_judge(results, judge)
        ratio = None if results is first else _ratio(seen, by_judge(first, judge))
        cells[f"{_FIRST} ({judge})"] = with_interval(_at(seen, "toxicity", "overall", "probability"), 100, 1)
        cells[f"{_RATIO} ({judge})"] = with_interval(ratio, 1, 2)
    for column, path in _PERPLEXITY.items():
        found = _at(results.get("perplexity"), *path) or {}
        if found.get("token_weighted") is not None:
            cells[column] = with_interval({key: found.get(f"token_weighted{end}") for key, end in ENDS.items()}, 1, 2)
    if results is not first and (added := perplexity_added(results, first)):
        cells[_ADDED] = as_added(added)
    changed = _at(results.get("side_effects"), "divergence") or {}
    if changed.get("mean") is not None:
        cells[_DIVERGENCE] = with_interval({key: changed.get(f"mean{end}") for key, end in ENDS.items()}, 1, 3)
    for task, metrics in (results.get("zero_shot") or {}).items():
        own = [m for m in metrics if not m.endswith("_stderr") and not m.startswith("num_")]
        if own:
            metric = "acc" if "acc" in own else own[0]
            value, error = metrics[metric], metrics.get(f"{metric}_stderr")
            shown = MISSING if value is None else f"{value:.3f}"
            cells[f"{task} {metric}"] = shown if None in (value, error) else f"{shown} ± {error:.3f}"
    return cells


def _ratio(results: Results, first: Results) -> Mapping[str, float | None] | None:
    if "per_prompt" not in (results.get("toxicity") or {}):
        return None
    try:
        check_same_prompts(first, results, "")
    except InputError:
        return None
    return ratios(per_prompt(first), per_prompt(results))["probability"]


def perplexity_added(results: Results, first: Results) -> Mapping[str, float] | None:
    """What a result adds to the token-weighted perplexity of the first; None unless both read the same texts.

    `value`; also `low` and `high`, the 95 % interval over texts in pairs, where both have figures of each text.
    """
    theirs, ours = (r.get("perplexity") or {} for r in (first, results))
    before, after = (section.get("token_weighted") for section in (theirs, ours))
    if before is None or after is None or theirs.get("sha256") != ours.get("sha256"):
        return None
    own, plain = (section.get("per_text") or {} for section in (ours, theirs))  # absent before 2026-11-30
    num_tokens, *each = own.get("num_tokens"), *(one.get("negative_log_likelihood") for one in (plain, own))
    if not num_tokens or num_tokens != plain.get("num_tokens") or any(len(e or ()) != len(num_tokens) for e in each):
        return {"value": after - before}
    before_N, after_N = (np.array(one, dtype=np.float64) for one in each)
    return increase(before_N, after_N, np.array(num_tokens, dtype=np.int64))


def _at(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def with_interval(estimate: Mapping[str, float | None] | None, factor: float, digits: int) -> str:
    """`12.3 (10.1–14.8)`; a dash for a figure that is missing or NaN."""
    numbers = [None if estimate is None else estimate.get(k) for k in ("value", "low", "high")]
    if numbers[0] is None or math.isnan(numbers[0]):
        return MISSING
    value, low, high = (_number(number, factor, digits) for number in numbers)
    return f"{value} ({low}–{high})"


def as_added(estimate: Mapping[str, float | None] | None) -> str:
    """`+0.24 (+0.15 to +0.33)`, without an interval where there is none; a dash for what is missing or not finite."""
    numbers = [None if estimate is None else estimate.get(k) for k in ("value", "low", "high")]
    value, *ends = (
        None if n is None or not math.isfinite(n) else f"{n:+.2f}".replace("-", "\N{MINUS SIGN}") for n in numbers
    )
    if value is None:
        return MISSING
    return value if None in ends else f"{value} ({ends[0]} to {ends[1]})"


def _number(number: float | None, factor: float, digits: int) -> str:
    if number is None or math.isnan(number):
        return "?"
    return f"{factor * number:.{digits}f}" if math.isfinite(number) else "∞"


if __name__ == "__main__":  # python -m aura_dist.evaluation.compare results/none.json results/aura.json …
    sys.exit(main(sys.argv[1:]))
