"""Results files as the report shows them, and what it calls them. Every part of a file may be missing."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aura_dist.errors import InputError, brief
from aura_dist.evaluation.figures import ByPrompt
from aura_dist.evaluation.results import by_judge, judges
from aura_dist.interventions.artifact import method_of

# a JSON document with one of these keys is a results file; an earlier version wrote only some of the second row
_PARTS = ("perplexity", "toxicity", "zero_shot")
_WRITTEN_BY = ("schema", "aura_dist")
# measure → its name, the factor of its figures, and their digits
MEASURES = {
    "probability": ("toxic (%)", 100.0, 1),
    "expected_maximum": ("expected maximum", 1.0, 2),
    "any_toxic": ("any toxic (%)", 100.0, 1),
}
# a sweep names results by parts of their settings and a digest of all settings
_OF_A_SWEEP = re.compile(r"-[0-9a-f]{10}$")
PLAIN = "no intervention"


@dataclass(frozen=True)
class Estimate:
    """A number and the interval around it; `low` and `high` are None where there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """One results file of a run: its name without the ending, what the page calls it, and its content."""

    run: str
    name: str
    path: Path
    label: str
    document: Mapping[str, Any]

    @property
    def model(self) -> str:
        return str(_mapping(self.document.get("model")).get("name") or self.config.get("model") or "unknown")

    @property
    def config(self) -> Mapping[str, Any]:
        return _mapping(self.document.get("config"))

    @property
    def _intervention(self) -> Mapping[str, Any]:
        return _mapping(self.document.get("intervention"))

    @property
    def _parameters(self) -> Mapping[str, Any]:
        """Parameters of the fit."""
        return _mapping(self._intervention.get("parameters"))

    @property
    def is_fitted(self) -> bool:
        """Whether an intervention was applied."""
        return bool(self.document.get("intervention"))

    @property
    def method(self) -> str:
        """The intervention's method; `none` without an intervention."""
        return method_of(self._intervention) if self.is_fitted else "none"

    @property
    def strength(self) -> float | None:
        """Strength of the fit times strength of the use: both scale the change; None without an intervention."""
        if not self._intervention:
            return None
        applied = self._intervention.get("strength", self.config.get("strength"))
        both: list[Any] = [applied, self._parameters.get("strength")]
        return float(np.prod([strength for strength in both if is_number(strength)]))

    @property
    def top_k(self) -> int | None:
        return self._parameters.get("top_k")

    @property
    def variant(self) -> str:
        """Further parameters of the fit, such as `q ≤ 0.05`, `α 0.3` or `gate of tokens`; empty without any."""
        shown = (("max_q", "q ≤ {:g}"), ("alpha", "α {:g}"), *((name, f"{name} {{:g}}") for name in ("kp", "ki", "kd")))
        found = [form.format(self._parameters[n]) for n, form in shown if is_number(self._parameters.get(n))]
        gate = _mapping(self._intervention.get("gate"))
        if gate:
            pooling = self._parameters.get("gate_pooling")
            fitted_on = f" fitted on {pooling} values" if pooling else ""
            found.append(f"gate of {gate.get('kind')}{fitted_on}" + (" with controls" if gate.get("control") else ""))
        moved = (("threshold", "logit − {:g}"), ("sharpness", "sharpness {:g}"), ("min_accuracy", "accuracy ≥ {:g}"))
        settings = {name: (self._parameters.get(f"gate_{name}"), form) for name, form in moved}
        return ", ".join([*found, *(form.format(value) for value, form in settings.values() if is_number(value))])

    @property
    def modules(self) -> tuple[str, ...] | None:
        """Patterns of the modules that `fit` chose; None for all modules of the store."""
        given = self._parameters.get("modules")
        return tuple(map(str, given)) if isinstance(given, list) else None

    @property
    def preprompt(self) -> str | None:
        return self.document.get("preprompt") or None

    @property
    def is_plain(self) -> bool:
        """Whether it has neither an intervention nor a pre-prompt."""
        return not self.is_fitted and self.preprompt is None

    @property
    def perplexity(self) -> Estimate | None:
        """The token-weighted perplexity."""
        return self.measured("perplexity", "token_weighted")

    @property
    def toxicity(self) -> Mapping[str, Any]:
        return _mapping(self.document.get("toxicity"))

    def toxic(self, group: str, measure: str) -> Estimate | None:
        """One of `MEASURES` over `overall`, `toxic_prompts` or `nontoxic_prompts`, in [0, 1]."""
        return estimate(_mapping(self.toxicity.get(group)).get(measure))

    def by_judge(self, scorer: str) -> "Evaluation":
        """The same with the toxicity that a further scorer found; without that, no toxicity."""
        return replace(self, document=by_judge(self.document, scorer))

    @property
    def reduction(self) -> Estimate | None:
        """Share of toxic continuations of `--baseline` ÷ share of this evaluation."""
        overall = _mapping(_mapping(self.toxicity.get("baseline")).get("overall"))
        return estimate(overall.get("probability"))

    def measured(self, *path: str) -> Estimate | None:
        """The figure at a place of the document; `x` with its interval also where that is `x_low` and `x_high`."""
        *above, name = path
        part: Mapping[str, Any] = self.document
        for key in above:
            part = _mapping(part.get(key))
        value, low, high = (part.get(f"{name}{end}") for end in ("", "_low", "_high"))
        return estimate(value) if isinstance(value, Mapping) else estimate({"value": value, "low": low, "high": high})

    @property
    def zero_shot(self) -> Mapping[str, Mapping[str, Any]]:
        return {task: _mapping(metrics) for task, metrics in _mapping(self.document.get("zero_shot")).items()}

    @property
    def seconds(self) -> Mapping[str, float]:
        times = _mapping(self.document.get("seconds"))
        return {name: float(v) for name, v in times.items() if is_number(v)}

    @property
    def continuations(self) -> Path | None:
        """The file of continuations, if it exists."""
        name = self.toxicity.get("continuations")
        place = self.path.parent / name if isinstance(name, str) else None
        return place if place is not None and place.is_file() else None


def read_evaluation(run: str, path: Path) -> Evaluation:
    """The results file at `path`; InputError unless `evaluate` wrote it."""
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
    return Evaluation(run, path.stem, path, path.stem, document)


def judges_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """Names of the further scorers, in their order of first mention."""
    return list(dict.fromkeys(name for e in evaluations for name in judges(e.document)))


def by_prompt(one: Evaluation) -> ByPrompt | None:
    """Figures of each prompt, in the file's order; None unless the file has them all."""
    kept = _mapping(one.toxicity.get("per_prompt"))
    share, maximum = (kept.get(key) for key in ("toxic_share", "maximum"))
    if not isinstance(share, list) or not isinstance(maximum, list) or len(share) != len(maximum) or not share:
        return None
    if not all(map(is_number, [*share, *maximum])):
        return None
    return ByPrompt(np.array(share, dtype=np.float64), np.array(maximum, dtype=np.float64))


def plain_first(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Evaluations without an intervention first, of them those without a pre-prompt.

    Then by method and modules in their order of first mention, by number of neurons, and by strength.
    """
    kinds = list(dict.fromkeys((e.method, e.modules) for e in evaluations))

    def place(e: Evaluation) -> tuple[bool, bool, int, int, float]:
        kind = kinds.index((e.method, e.modules))
        return e.is_fitted, e.preprompt is not None, kind, e.top_k or 0, e.strength or 0.0

    return sorted(evaluations, key=place)


def estimate(value: Any) -> Estimate | None:
    """An estimate from `{value, low, high}` or a bare number; None where there is no number."""
    if is_number(value):
        return Estimate(float(value))
    parts = _mapping(value)
    if not is_number(parts.get("value")):
        return None
    low, high = (float(parts[k]) if is_number(parts.get(k)) else None for k in ("low", "high"))
    return Estimate(float(parts["value"]), low, high)


def is_number(value: Any) -> bool:
    """Whether a value of a JSON document is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def labelled(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The same with labels: the file's name, after the run's name where the page shows several runs.

    A name that a sweep made is replaced by what distinguishes the evaluation, unless another evaluation has that name.
    """
    several = len({e.run for e in evaluations}) > 1
    names = [f"{e.run}/{e.name}" if several else e.name for e in evaluations]
    made = [i for i, e in enumerate(evaluations) if _OF_A_SWEEP.search(e.name)]
    described = _described([evaluations[i] for i in made])
    taken = set(names)
    for i, text in zip(made, described, strict=True):
        if described.count(text) == 1 and text not in taken:
            names[i] = text
    return [replace(e, label=name) for e, name in zip(evaluations, names, strict=True)]


def _described(evaluations: Sequence[Evaluation]) -> list[str]:
    """`mean-act 0.25, mlp`: method and strength, and whatever else differs between the evaluations."""
    fitted = [e for e in evaluations if e.is_fitted]
    short = modules_in_short(fitted)
    texts = []
    for e in evaluations:
        method = e.method if e.is_fitted else PLAIN
        parts = [method if e.strength in (None, 1.0) else f"{method} {e.strength:g}"]
        parts += [f"top {e.top_k}"] if len({o.top_k for o in fitted if o.method == e.method}) > 1 else []
        parts += [e.variant] if e.variant and len({o.variant for o in fitted if o.method == e.method}) > 1 else []
        parts += [short[e.modules]] if e.is_fitted and len({o.modules for o in fitted}) > 1 else []
        parts += ["pre-prompt"] if e.preprompt is not None else []
        parts += [e.model.rstrip("/").rsplit("/", 1)[-1]] if len({o.model for o in evaluations}) > 1 else []
        parts += [e.run] if len({o.run for o in evaluations}) > 1 else []
        texts.append(", ".join(parts))
    return texts


def modules_in_short(evaluations: Sequence[Evaluation]) -> dict[tuple[str, ...] | None, str]:
    """Modules of the interventions → a short name: `norms` for several patterns of norms, if only one set has them."""
    given = list(dict.fromkeys(e.modules for e in evaluations))
    long = ["all modules" if m is None else " + ".join(p.removeprefix("*.") for p in m) for m in given]
    norms = [m is not None and len(m) > 1 and all("norm" in p for p in m) for m in given]
    is_unique = norms.count(True) == 1 and "norms" not in long
    return {m: "norms" if is_unique and norm else name for m, name, norm in zip(given, long, norms, strict=True)}
