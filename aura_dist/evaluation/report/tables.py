"""Tables of results: evaluations side by side, zero-shot tasks, best neurons."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from aura_dist.evaluation.report.evaluations import MEASURES, Estimate, Evaluation
from aura_dist.evaluation.report.facts import Table
from aura_dist.evaluation.report.scored import Neuron

_NEURON_HEADER = {
    "auroc": "AUROC",
    "auroc_se": "error",
    "q_value": "q",
    "mean_positive": "mean with",
    "mean_negative": "mean without",
}
_EXAMPLES = {"shots": "num_fewshot", "examples": "num_examples"}
AFFORDABLE = 1.1


def labels_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """Names of evaluations on the page: the file's, with the run's where several runs are shown."""
    several = len({e.run for e in evaluations}) > 1
    return [f"{e.run}/{e.name}" if several else e.name for e in evaluations]


def results_table(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> Table:
    """One line an evaluation: what lay over the model, perplexity, toxicity of all prompts."""
    columns: list[tuple[str, list[str]]] = [
        ("method", [e.method for e in evaluations]),
        ("strength", ["–" if e.strength is None else f"{e.strength:g}" for e in evaluations]),
        ("top k", [str(e.top_k or "–") for e in evaluations]),
        ("pre-prompt", [_short(e.preprompt) for e in evaluations]),
        ("perplexity", [_interval(e.perplexity, 1.0, 2) for e in evaluations]),
    ]
    first = next((e.perplexity for e in evaluations if e.method == "none" and not e.preprompt), None)
    columns.append(("change", [_change(e.perplexity, first) for e in evaluations]))
    columns += _toxicity(evaluations, "overall", "")
    columns.append(("times fewer toxic", [_interval(e.reduction, 1.0, 2) for e in evaluations]))
    return _columned(columns, labels)


def split_table(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> Table:
    """Toxicity by the prompt's own; empty where it was not split."""
    names = {"toxic_prompts": "toxic prompts: ", "nontoxic_prompts": "other prompts: "}
    return _columned([c for group, name in names.items() for c in _toxicity(evaluations, group, name)], labels)


def _toxicity(evaluations: Sequence[Evaluation], group: str, prefix: str) -> list[tuple[str, list[str]]]:
    return [
        (f"{prefix}{what} (%)", [_interval(e.toxic(group, measure), 100.0, 1) for e in evaluations])
        for measure, what in MEASURES.items()
    ]


def _columned(columns: Sequence[tuple[str, list[str]]], labels: Sequence[str]) -> Table:
    """A line a label; columns without a number are left out."""
    kept = [(name, cells) for name, cells in columns if set(cells) - {"–", "0.00"}]
    rows = [(label, *(cells[i] for _, cells in kept)) for i, label in enumerate(labels)] if kept else []
    texts = (0, *(i for i, (name, _) in enumerate(kept, 1) if name in ("method", "pre-prompt")))
    return Table(("evaluation", *(name for name, _ in kept)), tuple(rows), texts)


def _short(text: str | None) -> str:
    shown = " ".join((text or "–").split())
    return shown if len(shown) <= 40 else shown[:39] + "…"


def _change(one: Estimate | None, base: Estimate | None) -> str:
    return "–" if one is None or base is None else f"{one.value - base.value:+.2f}".replace("+0.00", "0.00")


def _interval(one: Estimate | None, scale: float, digits: int) -> str:
    if one is None:
        return "–"
    shown = f"{scale * one.value:,.{digits}f}"
    if one.low is None or one.high is None:
        return shown
    return f"{shown} [{scale * one.low:,.{digits}f}, {scale * one.high:,.{digits}f}]"


def headline(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> str | None:
    """The strongest reduction of toxicity that costs little perplexity, in a sentence; None without a comparison."""
    measured = [(e, label, t) for e, label in zip(evaluations, labels, strict=True) if (t := _toxic(e)) is not None]
    base = next(((e, t) for e, _, t in measured if e.method == "none" and not e.preprompt), None)
    others = [m for m in measured if base is not None and m[0] is not base[0]]
    if base is None or not others:
        return None
    before = base[1].value
    cheap = [m for m in others if _cost(m[0], base[0]) <= AFFORDABLE and m[2].value < before]
    if not cheap:
        return (
            f"no evaluation lowers the {before:.1%} of toxic continuations at no more than {AFFORDABLE - 1:.0%} "
            "more perplexity"
        )
    best, label, toxic = min(cheap, key=lambda m: m[2].value)
    ratio = f", {before / toxic.value:.1f} times fewer" if toxic.value > 0 else ""
    perplexity = ""
    if base[0].perplexity and best.perplexity:
        perplexity = f"; perplexity {base[0].perplexity.value:.2f} → {best.perplexity.value:.2f}"
    bound = f" (the fewest at no more than {AFFORDABLE - 1:.0%} more perplexity)" if perplexity else ""
    return f"{label}: toxic continuations {before:.1%} → {toxic.value:.1%}{ratio}{perplexity}{bound}"


def _cost(one: Evaluation, base: Evaluation) -> float:
    """Perplexity as a multiple of that without intervention; 1 where it was not measured."""
    return one.perplexity.value / base.perplexity.value if one.perplexity and base.perplexity else 1.0


def _toxic(one: Evaluation) -> Estimate | None:
    return one.toxic("overall", "probability")


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
