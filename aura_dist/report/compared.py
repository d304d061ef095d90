"""Which evaluations may stand side by side: those that measured the same thing in the same way."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aura_dist.evaluation.compare import conditions
from aura_dist.report.evaluations import Estimate, Evaluation
from aura_dist.report.naming import modules_in_short

OUTSIDE = 4.0


@dataclass(frozen=True)
class Point:
    """One evaluation: `x` its perplexity, `y` its share of toxic continuations in [0, 1].

    `modules` names those that the map lies over, and is empty where they are the same for all; `variant` is what else
    it was fitted with.
    """

    label: str
    method: str
    modules: str
    variant: str
    strength: float | None
    top_k: int | None
    prompted: bool
    x: Estimate
    y: Estimate


@dataclass(frozen=True)
class Comparison:
    """Evaluations of one model on the same prompts and texts, under the same settings.

    Attributes
    ----------
    title
        The model.
    measured
        What was measured and how, in sentences.
    evaluations
        Those without intervention first.
    points
        Those drawn: with both figures.
    outside
        Those of a perplexity so high that the others would fall together: told, not drawn.
    """

    title: str
    measured: str
    evaluations: tuple[Evaluation, ...]
    points: tuple[Point, ...]
    outside: tuple[Point, ...]


def comparisons(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> list[Comparison]:
    """Evaluations by what they measured of which model: only within one set are their numbers comparable.

    Evaluations of zero-shot tasks alone are in none.
    """
    sets: dict[tuple[str, ...], list[tuple[Evaluation, str]]] = {}
    for one, label in zip(evaluations, labels, strict=True):
        if not (one.toxicity or one.perplexity):
            continue
        sets.setdefault((fingerprint(one), drawn(one), _read(one)), []).append((one, label))
    found = []
    for group in sets.values():
        ordered = sorted(group, key=lambda pair: (pair[0].method != "none", pair[0].preprompt is not None))
        fitted = [one for one, _ in ordered if one.method != "none"]
        names = modules_in_short(fitted) if len({one.modules for one in fitted}) > 1 else {}
        points = [p for p in (_point(one, label, names) for one, label in ordered) if p is not None]
        far = OUTSIDE * min((p.x.value for p in points), default=0.0)
        near = [p for p in points if p.x.value <= far]
        shown = near if len(near) > len(points) / 2 else points
        outside = tuple(p for p in points if p not in shown)
        evaluated = tuple(one for one, _ in ordered)
        title = short_name(evaluated[0].model)
        found.append(Comparison(title, _in_words(evaluated), evaluated, tuple(shown), outside))
    return found


def short_name(model: str) -> str:
    """A hub name as it is; of a directory the last part."""
    path = Path(model)
    return path.name if path.is_absolute() or len(path.parts) > 2 or model.startswith(".") else model


def fingerprint(one: Evaluation) -> str:
    """Which model was evaluated."""
    model = one.document.get("model")
    return str(model.get("fingerprint") if isinstance(model, Mapping) else one.document.get("model_fingerprint"))


def drawn(one: Evaluation) -> str:
    """What a share of toxic continuations depends on beside the model and its dtype; a seed is another draw of it."""
    return json.dumps(conditions("toxicity", one.toxicity), sort_keys=True)


def _read(one: Evaluation) -> str:
    """Which tokens a perplexity is of: the texts' file and column, and where they were cut.

    Of one file the number of tokens tells where. It is the same with and without a pre-prompt.
    """
    measured = one.document.get("perplexity")
    if not isinstance(measured, Mapping):
        return str(one.document.get("texts_sha256"))
    cut = None if "num_tokens" in measured else one.config.get("max_tokens")
    return json.dumps([conditions("perplexity", measured), cut])


def _settings(one: Evaluation) -> Mapping[str, Any]:
    settings = one.toxicity.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _in_words(evaluations: Sequence[Evaluation]) -> str:
    """`250 prompts of openings.jsonl, 5 continuations each, of at most 20 tokens; …`; what is not known is left out."""
    one, sentences = evaluations[0], []
    toxicity, settings = one.toxicity, _settings(one)
    if toxicity:
        seeds = sorted({str(_settings(e)["seed"]) for e in evaluations if "seed" in _settings(e)})
        parts = [
            _text("{} prompts", _count(toxicity.get("num_prompts"))) + _text(" of {}", _file(toxicity.get("prompts"))),
            _text("{} continuations each", toxicity.get("num_samples"))
            + _text(" of at most {} tokens", settings.get("max_new_tokens")),
            _text("temperature {}", settings.get("temperature")),
            _text("nucleus (top-p) {}", settings.get("top_p")),
            _text("the {} likeliest tokens alone", settings.get("top_k") or None),
            _text(f"seed{'s' * (len(seeds) > 1)} {{}}", ", ".join(seeds) or None),
            _text("scored by {}", toxicity.get("scorer")),
        ]
        sentences.append("Toxicity: " + ", ".join(filter(None, parts)) + ".")
    perplexity = one.document.get("perplexity")
    if isinstance(perplexity, Mapping):
        parts = [
            _text("{} texts", _count(perplexity.get("num_texts"))) + _text(" of {}", _file(perplexity.get("texts"))),
            _text("cut at {} tokens", one.config.get("max_tokens")),
            _text("{} tokens in all", _count(perplexity.get("num_tokens"))),
        ]
        sentences.append("Perplexity: " + ", ".join(filter(None, parts)) + "." if any(parts) else "")
    return " ".join(filter(None, sentences))


def _text(form: str, value: Any) -> str:
    return "" if value is None else form.format(value)


def _count(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _file(path: Any) -> str | None:
    return Path(path).name if isinstance(path, str) else None


def _point(one: Evaluation, label: str, names: Mapping[Any, str]) -> Point | None:
    x, y = one.perplexity, one.toxic("overall", "probability")
    if x is None or y is None:
        return None
    modules = "" if one.method == "none" else names.get(one.modules, "")
    return Point(label, one.method, modules, one.variant, one.strength, one.top_k, one.preprompt is not None, x, y)
