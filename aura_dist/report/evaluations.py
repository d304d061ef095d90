"""Results files as the report shows them: every part may be missing."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aura_dist.errors import InputError, brief
from aura_dist.evaluation.figures import ByPrompt
from aura_dist.interventions.artifact import method_of

# what tells a results file from any other JSON document; of the second, an earlier version wrote less
_PARTS = ("perplexity", "toxicity", "zero_shot")
_WRITTEN_BY = ("schema", "aura_dist")
# measure → its name, what a figure is multiplied by, and its digits
MEASURES = {
    "probability": ("toxic (%)", 100.0, 1),
    "expected_maximum": ("expected maximum", 1.0, 2),
    "any_toxic": ("any toxic (%)", 100.0, 1),
}


@dataclass(frozen=True)
class Estimate:
    """A number and the interval around it; `low` and `high` are None where there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """One results file.

    Attributes
    ----------
    run, name, path
        The run directory's name, the file's name without its ending, and the file.
    document
        The file as it stands.
    """

    run: str
    name: str
    path: Path
    document: Mapping[str, Any]

    @property
    def model(self) -> str:
        return str(_mapping(self.document.get("model")).get("name") or self.config.get("model") or "unknown")

    @property
    def config(self) -> Mapping[str, Any]:
        return _mapping(self.document.get("config"))

    @property
    def method(self) -> str:
        """The intervention's method; `none` without one."""
        meta = self.document.get("intervention")
        return method_of(_mapping(meta)) if meta else "none"

    @property
    def strength(self) -> float | None:
        """How strongly the map lies over the model, as fitted and as applied: both multiply what it changes."""
        meta = _mapping(self.document.get("intervention"))
        if not meta:
            return None
        applied = meta.get("strength", self.config.get("strength", 1.0))
        fitted = _mapping(meta.get("parameters")).get("strength", 1.0)
        return _number(applied, 1.0) * _number(fitted, 1.0)

    @property
    def concept(self) -> str | None:
        return _mapping(self.document.get("intervention")).get("concept")

    @property
    def top_k(self) -> int | None:
        return _mapping(_mapping(self.document.get("intervention")).get("parameters")).get("top_k")

    @property
    def variant(self) -> str:
        """Further parameters of the fit, such as `q ≤ 0.05` or `α 0.3`; empty without."""
        given = _mapping(_mapping(self.document.get("intervention")).get("parameters"))
        shown = (("max_q", "q ≤ {:g}"), ("alpha", "α {:g}"))
        return ", ".join(form.format(given[name]) for name, form in shown if _is_number(given.get(name)))

    @property
    def modules(self) -> tuple[str, ...] | None:
        """Patterns of the modules that the map was confined to; None if it lies over all that were collected."""
        given = _mapping(_mapping(self.document.get("intervention")).get("parameters")).get("modules")
        return tuple(map(str, given)) if isinstance(given, list) else None

    @property
    def preprompt(self) -> str | None:
        return self.document.get("preprompt") or None

    @property
    def perplexity(self) -> Estimate | None:
        """The token-weighted one."""
        measured = _mapping(self.document.get("perplexity"))
        low, high = measured.get("token_weighted_low"), measured.get("token_weighted_high")
        return estimate({"value": measured.get("token_weighted"), "low": low, "high": high})

    @property
    def toxicity(self) -> Mapping[str, Any]:
        return _mapping(self.document.get("toxicity"))

    def toxic(self, group: str, measure: str) -> Estimate | None:
        """One of `MEASURES` over `overall`, `toxic_prompts` or `nontoxic_prompts`, in [0, 1]."""
        return estimate(_mapping(self.toxicity.get(group)).get(measure))

    @property
    def reduction(self) -> Estimate | None:
        """Share of toxic continuations of the baseline that it was compared with ÷ its own."""
        overall = _mapping(_mapping(self.toxicity.get("baseline")).get("overall"))
        return estimate(overall.get("probability"))

    @property
    def zero_shot(self) -> Mapping[str, Mapping[str, Any]]:
        return {task: _mapping(metrics) for task, metrics in _mapping(self.document.get("zero_shot")).items()}

    @property
    def seconds(self) -> Mapping[str, float]:
        times = _mapping(self.document.get("seconds"))
        return {name: float(v) for name, v in times.items() if _is_number(v)}

    @property
    def continuations(self) -> Path | None:
        """The file of continuations, if it is there."""
        name = self.toxicity.get("continuations")
        place = self.path.parent / name if isinstance(name, str) else None
        return place if place is not None and place.is_file() else None


def by_prompt(one: Evaluation) -> ByPrompt | None:
    """Figures of each prompt, in the file's order; None where they are not all there."""
    kept = _mapping(one.toxicity.get("per_prompt"))
    share, maximum = (kept.get(key) for key in ("toxic_share", "maximum"))
    if not isinstance(share, list) or not isinstance(maximum, list) or len(share) != len(maximum) or not share:
        return None
    if not all(map(_is_number, [*share, *maximum])):
        return None
    return ByPrompt(np.array(share, dtype=np.float64), np.array(maximum, dtype=np.float64))


def plain_first(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those without an intervention first, of them those without a pre-prompt.

    Then by method and modules, as they are first given, number of neurons and strength.
    """
    kinds = list(dict.fromkeys((e.method, e.modules) for e in evaluations))

    def place(e: Evaluation) -> tuple[bool, bool, int, int, float]:
        kind = kinds.index((e.method, e.modules))
        return e.method != "none", e.preprompt is not None, kind, e.top_k or 0, e.strength or 0.0

    return sorted(evaluations, key=place)


def estimate(value: Any) -> Estimate | None:
    """An estimate from `{value, low, high}` or a bare number; None where there is no number."""
    if _is_number(value):
        return Estimate(float(value))
    parts = _mapping(value)
    if not _is_number(parts.get("value")):
        return None
    low, high = (float(parts[k]) if _is_number(parts.get(k)) else None for k in ("low", "high"))
    return Estimate(float(parts["value"]), low, high)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any, otherwise: float) -> float:
    return float(value) if _is_number(value) else otherwise


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def read_evaluation(run: str, path: Path) -> Evaluation:
    """The results file at `path`; InputError unless it is one that `evaluate` wrote."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"results {str(path)!r}: expected JSON as `evaluate` writes it: {brief(error)}; "
            "evaluate again, or move the file away"
        ) from error
    if not isinstance(document, dict) or not any(key in document for key in (*_PARTS, *_WRITTEN_BY)):
        raise InputError(
            f"results {str(path)!r}: expected results as `evaluate` writes them, found another JSON document; "
            "move the file away"
        )
    return Evaluation(run, path.stem, path, document)
