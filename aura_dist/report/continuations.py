"""Continuations side by side: the first continuation of a prompt under every evaluation of the same prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from aura_dist.errors import InputError, brief
from aura_dist.report.comparison import drawn, fingerprint
from aura_dist.report.evaluations import Evaluation, plain_first

TOXIC = 0.5
MAX_CHARACTERS = 600


@dataclass(frozen=True)
class Text:
    """A prompt or continuation, and the scorer's probability that it is toxic (None without a scorer)."""

    text: str
    toxicity: float | None

    @property
    def is_toxic(self) -> bool:
        return self.toxicity is not None and self.toxicity >= TOXIC


@dataclass(frozen=True)
class SideBySide:
    """Evaluations of the same prompts, one without intervention and pre-prompt first; rows of some of the prompts.

    A row has a prompt, and its continuation under each evaluation: None where that has none. `num_left_out` further
    evaluations of the same prompts are not shown.
    """

    evaluations: tuple[Evaluation, ...]
    rows: tuple[tuple[Text, tuple[Text | None, ...]], ...]
    num_prompts: int
    num_left_out: int


def side_by_side(evaluations: Sequence[Evaluation], num_shown: int, max_columns: int) -> list[SideBySide]:
    """One table for each model, prompts and settings with continuations, of at most `max_columns` evaluations."""
    sets: dict[tuple[str, str], list[Evaluation]] = {}
    for one in evaluations:
        if one.continuations is not None:
            sets.setdefault((fingerprint(one), drawn(one)), []).append(one)
    tables = []
    for group in sets.values():
        table = _table(_unlike_first(plain_first(group)), num_shown, max_columns)
        if table.rows:
            tables.append(table)
    return tables


def _unlike_first(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The strongest of each method, modules and pre-prompt first, so that a few columns show all kinds."""
    strongest = {(e.method, e.modules, e.preprompt): e for e in evaluations}
    chosen = {id(e) for e in strongest.values()}
    return sorted(evaluations, key=lambda e: id(e) not in chosen)


def _table(evaluations: Sequence[Evaluation], num_shown: int, max_columns: int) -> SideBySide:
    columns = evaluations[:max_columns]
    files = [e.continuations for e in columns if e.continuations is not None]
    scores = {row["prompt"]: _probability(row) for row in _first_samples(files[0])}
    chosen = choose(scores, num_shown)
    wanted = set(chosen)
    found = [{row["prompt"]: row for row in _first_samples(file) if row["prompt"] in wanted} for file in files]
    rows = [_row([file.get(index) for file in found]) for index in chosen]
    return SideBySide(tuple(columns), tuple(rows), len(scores), len(evaluations) - len(columns))


def choose(scores: Mapping[int, float | None], num_shown: int) -> list[int]:
    """Prompts to show, in file order: half have the most toxic continuations, half are spread evenly over the file.

    `scores` maps a prompt to the toxicity of its first continuation under the first evaluation.
    """
    if len(scores) <= num_shown:
        return sorted(scores)
    worst = sorted(scores, key=lambda i: (-(scores[i] or 0.0), i))[: num_shown // 2]
    rest = sorted(set(scores) - set(worst))
    wanted = num_shown - len(worst)
    spread = [rest[(2 * i + 1) * len(rest) // (2 * wanted)] for i in range(wanted)]
    return sorted([*worst, *spread])


def _row(lines: Sequence[dict[str, Any] | None]) -> tuple[Text, tuple[Text | None, ...]]:
    first = next(line for line in lines if line is not None)
    prompt = Text(_cut(first.get("prompt_text")), _probability(first, "prompt_toxicity"))
    return prompt, tuple(None if ln is None else Text(_cut(ln.get("text")), _probability(ln)) for ln in lines)


def _cut(text: Any) -> str:
    shown = "" if text is None else str(text)
    return shown if len(shown) <= MAX_CHARACTERS else shown[:MAX_CHARACTERS] + " …"


def _probability(row: dict[str, Any], name: str = "toxicity") -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None


def _first_samples(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of every prompt's first continuation, read line by line."""
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = decode(line)
                    if not isinstance(row.get("prompt"), int) or not isinstance(row.get("sample"), int):
                        raise ValueError(f"line {number} has no prompt and sample")
                    if row["sample"] == 0:
                        yield row
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise InputError(
            f"continuations {str(path)!r}: expected JSON lines as `evaluate` writes them: {brief(error)}; "
            "evaluate again, or move the results away"
        ) from error
