"""Tables of results: evaluations side by side, zero-shot tasks, best neurons."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from aura_dist.evaluation.figures import ratios
from aura_dist.report.evaluations import MEASURES, Estimate, Evaluation, by_prompt
from aura_dist.report.facts import Table
from aura_dist.report.naming import modules_in_short
from aura_dist.report.scored import Neuron

_NEURON_HEADER = {
    "auroc": "AUROC",
    "auroc_se": "error",
    "q_value": "q",
    "mean_positive": "mean with",
    "mean_negative": "mean without",
}
_EXAMPLES = {"shots": "num_fewshot", "examples": "num_examples"}


def results_table(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> Table:
    """One line an evaluation: toxicity of all prompts, perplexity, what lay over the model."""
    plain = plain_of(evaluations)
    first = None if plain is None else plain.perplexity
    toxic, *more = _toxicity(evaluations, "overall", "")
    columns: list[tuple[str, list[str]]] = [
        toxic,
        ("times fewer toxic", [_interval(reduction(e, plain), 1.0, 2) for e in evaluations]),
        ("perplexity", [_interval(e.perplexity, 1.0, 2) for e in evaluations]),
        ("change", [_change(e.perplexity, first) for e in evaluations]),
        *more,
        *_laid_over(evaluations, labels),
    ]
    return _columned(columns, labels)


def _laid_over(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> list[tuple[str, list[str]]]:
    """What the names do not tell by themselves."""
    fitted = [e for e in evaluations if e.method != "none"]
    short = modules_in_short(fitted)
    methods = [e.method for e in evaluations]
    return [
        ("method", methods if methods != list(labels) else ["–"] * len(methods)),
        ("strength", ["–" if e.strength is None else f"{e.strength:g}" for e in evaluations]),
        ("top k", [str(e.top_k or "–") for e in evaluations]),
        ("further", [e.variant or "–" for e in evaluations]),
        ("modules", ["–" if e.modules is None else short[e.modules] for e in evaluations]),
        ("pre-prompt", [_short(e.preprompt) for e in evaluations]),
    ]


def plain_of(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The one without intervention and pre-prompt, or the first of several."""
    return next((e for e in evaluations if e.method == "none" and not e.preprompt), None)


def reduction(one: Evaluation, plain: Evaluation | None) -> Estimate | None:
    """Share of toxic continuations of `plain` ÷ its own, paired over prompts.

    Where the files do not hold every prompt's figures: as it was measured against a baseline of its own.
    """
    if one is plain:
        return None
    theirs, ours = (None if e is None else by_prompt(e) for e in (plain, one))
    if theirs is None or ours is None or len(theirs.maximum) != len(ours.maximum):
        return one.reduction
    found = ratios(theirs, ours)["probability"]
    return None if math.isnan(found["value"]) else Estimate(found["value"], found["low"], found["high"])


def split_table(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> Table:
    """Toxicity by the prompt's own; empty where it was not split."""
    names = {"toxic_prompts": "toxic prompts: ", "nontoxic_prompts": "other prompts: "}
    return _columned([c for group, name in names.items() for c in _toxicity(evaluations, group, name)], labels)


def _toxicity(evaluations: Sequence[Evaluation], group: str, prefix: str) -> list[tuple[str, list[str]]]:
    return [
        (f"{prefix}{what}", [_interval(e.toxic(group, measure), scale, digits) for e in evaluations])
        for measure, (what, scale, digits) in MEASURES.items()
    ]


def _columned(columns: Sequence[tuple[str, list[str]]], labels: Sequence[str]) -> Table:
    """A line a label; columns without a number are left out."""
    kept = [(name, cells) for name, cells in columns if set(cells) - {"–", "0.00"}]
    rows = [(label, *(cells[i] for _, cells in kept)) for i, label in enumerate(labels)] if kept else []
    texts = (0, *(i for i, (name, _) in enumerate(kept, 1) if name in ("method", "further", "modules", "pre-prompt")))
    return Table(("evaluation", *(name for name, _ in kept)), tuple(rows), texts)


def _short(text: str | None) -> str:
    shown = " ".join((text or "–").split())
    return shown if len(shown) <= 40 else shown[:39] + "…"


def _change(one: Estimate | None, base: Estimate | None) -> str:
    return "–" if one is None or base is None else f"{one.value - base.value:+.2f}".replace("+0.00", "0.00")


def _interval(one: Estimate | None, scale: float, digits: int) -> str:
    if one is None:
        return "–"
    shown = _figure(one.value, scale, digits)
    if one.low is None or one.high is None:
        return shown
    return f"{shown} [{_figure(one.low, scale, digits)}, {_figure(one.high, scale, digits)}]"


def _figure(value: float, scale: float, digits: int) -> str:
    return "∞" if math.isinf(value) else f"{scale * value:,.{digits}f}"


def zero_shot_table(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> Table:
    """Task and metric by evaluation, with standard errors; those of other numbers of examples on lines of their own."""
    tasks: dict[tuple[str, ...], None] = {}
    for one in evaluations:
        for task, metrics in one.zero_shot.items():
            for metric, value in metrics.items():
                if not metric.endswith("_stderr") and not metric.startswith("num_") and isinstance(value, int | float):
                    tasks.setdefault((task, metric, *_examples(metrics)))
    there = [(e, label) for e, label in zip(evaluations, labels, strict=True) if e.zero_shot]
    rows = [(*key, *(_metric(e, *key) for e, _ in there)) for key in tasks]
    return Table(("task", "metric", *_EXAMPLES, *(label for _, label in there)), tuple(rows), texts=(0, 1))


def _examples(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """What figures of one task are comparable by: examples in the context, and examples that were asked."""
    return tuple(str(metrics.get(key, "–")) for key in _EXAMPLES.values())


def _metric(one: Evaluation, task: str, metric: str, *examples: str) -> str:
    metrics = one.zero_shot.get(task, {})
    if _examples(metrics) != examples:
        return "–"
    value, error = metrics.get(metric), metrics.get(f"{metric}_stderr")
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.3f}" + (f" ± {error:.3f}" if isinstance(error, int | float) else "")


def neuron_table(neurons: Sequence[Neuron]) -> Table:
    """Best neurons, best first."""
    shown = [name for name in _NEURON_HEADER if any(name in n.values for n in neurons)]
    rows = [
        (str(rank), n.site, str(n.layer), str(n.unit), *(_statistic(name, n.values[name]) for name in shown))
        for rank, n in enumerate(neurons, 1)
    ]
    return Table(("", "module", "layer", "unit", *(_NEURON_HEADER[name] for name in shown)), tuple(rows), texts=(1,))


def _statistic(name: str, value: float) -> str:
    if math.isnan(value):
        return "–"
    if name == "q_value":
        return f"{value:.1e}" if value else "0"  # below what a float64 holds
    return f"{value:#.3g}" if name.startswith("mean") else f"{value:.4f}"
