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
class Continuation:
    """A text, the scorer's probability that it is toxic (None without one), and whether it counts as toxic."""

    text: str
    toxicity: float | None

    @property
    def is_toxic(self) -> bool:
        return self.toxicity is not None and self.toxicity >= TOXIC


@dataclass(frozen=True)
class Prompt:
    """A prompt and its continuation under each evaluation; None where an evaluation has none."""

    index: int
    text: str
    toxicity: float | None
    continuations: tuple[Continuation | None, ...]

    @property
    def is_toxic(self) -> bool:
        return self.toxicity is not None and self.toxicity >= TOXIC


@dataclass(frozen=True)
class SideBySide:
    """Evaluations of the same prompts.

    Attributes
    ----------
    evaluations
        An evaluation without intervention and pre-prompt comes first.
    prompts
        The prompts shown, of `num_prompts`.
    num_left_out
        Evaluations of the same prompts that are not shown.
    """

    evaluations: tuple[Evaluation, ...]
    prompts: tuple[Prompt, ...]
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
        if table.prompts:
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
    prompts = [_prompt(index, [rows.get(index) for rows in found]) for index in chosen]
    return SideBySide(tuple(columns), tuple(prompts), len(scores), len(evaluations) - len(columns))


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


def _prompt(index: int, rows: Sequence[dict[str, Any] | None]) -> Prompt:
    first = next(row for row in rows if row is not None)
    texts = [None if row is None else Continuation(_cut(row.get("text")), _probability(row)) for row in rows]
    return Prompt(index, _cut(first.get("prompt_text")), _probability(first, "prompt_toxicity"), tuple(texts))


def _cut(text: Any) -> str:
    shown = "" if text is None else str(text)
    return shown if len(shown) <= MAX_CHARACTERS else shown[:MAX_CHARACTERS] + " …"


def _probability(row: dict[str, Any], name: str = "toxicity") -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None


def _first_samples(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of every prompt's first continuation; the file is read line by line."""
    return (row for row in _rows(path) if row["sample"] == 0)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = decode(line)
                    if not isinstance(row.get("prompt"), int) or not isinstance(row.get("sample"), int):
                        raise ValueError(f"line {number} has no prompt and sample")
                    yield row
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise InputError(
            f"continuations {str(path)!r}: expected JSON lines as `evaluate` writes them: {brief(error)}; "
            "evaluate again, or move the results away"
        ) from error
