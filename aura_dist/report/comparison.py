"""Which evaluations can be compared, because they measured the same thing in the same way; and what that shows."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aura_dist.evaluation.compare import conditions, perplexity_added
from aura_dist.evaluation.figures import ratios
from aura_dist.report.evaluations import Estimate, Evaluation, by_prompt, modules_in_short

# a perplexity this many times the lowest would squeeze all other points together
OUTSIDE = 4.0
# largest perplexity that the headline accepts, as a multiple of the model's without intervention
AFFORDABLE = 1.1
_BOUND = f"at no more than {AFFORDABLE - 1:.0%} more perplexity"


@dataclass(frozen=True)
class Point:
    """One evaluation: `x` its perplexity, see `_with_added` for the interval; `y` its share of toxic continuations.

    `modules` names the modules that its intervention acts on; empty without one, or where they are the same for all.
    `ringed`: its intervention was measured on other prompts or texts too, and not every one of its group was, as where
    points are chosen on some prompts and reported on others.
    """

    one: Evaluation
    modules: str
    x: Estimate
    y: Estimate
    ringed: bool = False


@dataclass(frozen=True)
class Comparison:
    """Evaluations of one model (`title`) on the same prompts and texts, under the same settings (`measured`).

    Evaluations without an intervention come first. Those with both figures are drawn as `points`, except the points
    `outside`, whose perplexity would squeeze the others together.
    """

    title: str
    measured: str
    evaluations: tuple[Evaluation, ...]
    points: tuple[Point, ...]
    outside: tuple[Point, ...]


def comparisons(evaluations: Sequence[Evaluation]) -> list[Comparison]:
    """Evaluations grouped by model and by what they measured, because numbers compare within a group only.

    Evaluations of zero-shot tasks alone are in no group.
    """
    sets: dict[tuple[str, ...], list[Evaluation]] = {}
    for one in evaluations:
        if one.toxicity or one.perplexity:
            sets.setdefault((fingerprint(one), drawn(one), _read(one)), []).append(one)
    measured = Counter(use for group in sets.values() for use in {_use(e) for e in group if e.is_fitted})
    found = []
    for group in sets.values():
        ordered = sorted(group, key=lambda e: (e.is_fitted, e.preprompt is not None))
        points = _ringed(_points(ordered), {use for use, times in measured.items() if times > 1})
        far = OUTSIDE * min((p.x.value for p in points), default=0.0)
        near = [p for p in points if p.x.value <= far]
        shown = near if len(near) > len(points) / 2 else points
        outside = tuple(p for p in points if p not in shown)
        title = short_name(ordered[0].model)
        found.append(Comparison(title, _in_words(ordered), tuple(ordered), tuple(shown), outside))
    return found


def _points(evaluations: Sequence[Evaluation]) -> list[Point]:
    """The evaluations that have both figures."""
    fitted = [e for e in evaluations if e.is_fitted]
    names = modules_in_short(fitted) if len({e.modules for e in fitted}) > 1 else {}
    points = [
        Point(e, names.get(e.modules, "") if e.is_fitted else "", x, y)
        for e in evaluations
        if (x := e.perplexity) is not None and (y := e.toxic("overall", "probability")) is not None
    ]
    return _with_added(points)


def _with_added(points: list[Point]) -> list[Point]:
    """The same with the interval of what is added to the plain model's perplexity, in place of each one's own.

    Texts differ far more from each other than an intervention changes them. Unchanged unless all points can have it.
    """
    plain = next((p for p in points if p.one.is_plain), None)
    if plain is None:
        return points
    before, placed = plain.x.value, []
    for p in points:
        added = perplexity_added(p.one.document, plain.one.document) or {}
        if not {"low", "high"} <= added.keys():
            return points
        around = () if p is plain else (before + added["low"], before + added["high"])
        placed.append(replace(p, x=Estimate(p.x.value, *around)))
    return placed


def _use(one: Evaluation) -> tuple[str, ...]:
    """Which intervention acts on which model, how strongly."""
    made = one.document.get("intervention")
    digest = made.get("digest") if isinstance(made, Mapping) else None
    return fingerprint(one), str(digest or one.label), str(one.strength), str(one.preprompt)


def _ringed(points: Sequence[Point], elsewhere: Set[tuple[str, ...]]) -> list[Point]:
    rings = [p.one.is_fitted and _use(p.one) in elsewhere for p in points]
    if all(ring or not p.one.is_fitted for ring, p in zip(rings, points, strict=True)):
        return list(points)
    return [replace(p, ringed=ring) for p, ring in zip(points, rings, strict=True)]


def short_name(model: str) -> str:
    """A hub name unchanged; of a directory, the last part."""
    path = Path(model)
    return path.name if path.is_absolute() or len(path.parts) > 2 or model.startswith(".") else model


def fingerprint(one: Evaluation) -> str:
    """Which model was evaluated."""
    model = one.document.get("model")
    return str(model.get("fingerprint") if isinstance(model, Mapping) else one.document.get("model_fingerprint"))


def drawn(one: Evaluation) -> str:
    """What a share of toxic continuations depends on besides the model; the seed only draws again."""
    return json.dumps(conditions("toxicity", one.toxicity), sort_keys=True)


def _read(one: Evaluation) -> str:
    """Which tokens a perplexity covers: the file and column of the texts, and where they were cut.

    For one file, the number of tokens tells where. A pre-prompt does not count.
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
    """`250 prompts of openings.jsonl, 5 continuations each, of at most 20 tokens; …`, without what is not known."""
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


def plain_of(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The first evaluation without intervention and pre-prompt."""
    return next((e for e in evaluations if e.is_plain), None)


def reduction(one: Evaluation, plain: Evaluation | None) -> Estimate | None:
    """Share of toxic continuations of `plain` ÷ share of `one`, paired over prompts.

    Where a file lacks its prompts' figures, the ratio that `evaluate --baseline` measured.
    """
    if one is plain:
        return None
    theirs, ours = (None if e is None else by_prompt(e) for e in (plain, one))
    if theirs is None or ours is None or len(theirs.maximum) != len(ours.maximum):
        return one.reduction
    found = ratios(theirs, ours)["probability"]
    return None if math.isnan(found["value"]) else Estimate(found["value"], found["low"], found["high"])


def headline(evaluations: Sequence[Evaluation]) -> str | None:
    """The largest reduction of toxicity that costs little perplexity, in a sentence; None without a comparison."""
    measured = [(e, share.value) for e in evaluations if (share := e.toxic("overall", "probability")) is not None]
    base = plain_of([e for e, _ in measured])
    if base is None or len(measured) == 1:
        return None
    before = next(toxic for e, toxic in measured if e is base)
    cheap = [(toxic, e, reduction(e, base)) for e, toxic in measured if toxic < before and _cost(e, base) <= AFFORDABLE]
    # the interval of the ratio, if there is one, excludes 1
    sure = [found for found in cheap if (r := found[2]) is None or r.low is None or r.low > 1]
    if not sure:
        chance = " by more than chance" if cheap else ""
        return f"no evaluation lowers the {before:.1%} of toxic continuations{chance} {_BOUND}"
    toxic, best, fewer = min(sure, key=lambda found: found[0])
    ratio = f", {before / toxic:.1f} times fewer" if toxic > 0 else ""
    if ratio and fewer is not None and fewer.low is not None and fewer.high is not None:
        ratio += f" [{fewer.low:.1f}, {fewer.high:.1f}]".replace("inf", "∞")
    perplexity = bound = ""
    if base.perplexity and best.perplexity:
        perplexity = f"; perplexity {base.perplexity.value:.2f} → {best.perplexity.value:.2f}"
        bound = f" (the fewest {_BOUND})"
    return f"{best.label}: toxic continuations {before:.1%} → {toxic:.1%}{ratio}{perplexity}{bound}"


def _cost(one: Evaluation, base: Evaluation) -> float:
    """Perplexity as a multiple of the model's without intervention; 1 where it was not measured."""
    return one.perplexity.value / base.perplexity.value if one.perplexity and base.perplexity else 1.0
