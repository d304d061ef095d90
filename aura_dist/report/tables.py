"""Everything on the page that is words and numbers: what was run, interventions, results, best neurons, times."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aura_dist.interventions.artifact import method_of
from aura_dist.ranks.progress import clock
from aura_dist.report.comparison import plain_of, reduction
from aura_dist.report.evaluations import MEASURES, Estimate, Evaluation, is_number, judges_of, modules_in_short
from aura_dist.report.rundir import Fitted
from aura_dist.report.scores import Neuron, StoreSummary

DIGEST_LENGTH = 12
_NEURON_HEADER = {
    "auroc": "AUROC", "auroc_se": "error", "q_value": "q",
    "mean_positive": "mean with", "mean_negative": "mean without",
}  # fmt: skip
# column → where in the results, factor, digits
_EFFECTS = {
    "KL divergence": (("side_effects", "divergence", "mean"), 1, 3),
    "its 99th percentile": (("side_effects", "divergence", "percentile_99"), 1, 2),
    "tokens with an open gate (%)": (("side_effects", "gates", "open_tokens"), 100, 1),
    "texts with an open gate (%)": (("side_effects", "gates", "open_texts"), 100, 0),
    "perplexity of non-toxic continuations": (("side_effects", "continuations", "intervened", "token_weighted"), 1, 2),
    "plain": (("side_effects", "continuations", "plain", "token_weighted"), 1, 2),
    "tokens": (("toxicity", "form", "num_tokens"), 1, 1),
    "repetition (%)": (("toxicity", "form", "repetition"), 100, 1),
}
_EXAMPLES = {"shots": "num_fewshot", "examples": "num_examples"}


@dataclass(frozen=True)
class Table:
    """Cells as shown; the columns in `texts` (by index) are aligned left, numbers right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: tuple[int, ...] = (0,)


def facts_of(store: StoreSummary) -> list[tuple[str, str]]:
    """Terms and descriptions of a store: model, data, rows, modules, settings, versions."""
    spec, config = store.spec, store.attributes.get("config", {})
    model, under = spec.model, spec.intervention
    revision = f" at {model['revision']}" if model.get("revision") else ""
    facts = [
        ("model", f"{model['name']}{revision}, {model['class']}"),
        ("fingerprint", str(model["fingerprint"])[:DIGEST_LENGTH]),
        ("forward", f"{spec.dtype}{_launch(config, store)}"),
        ("data", f"{spec.data['path']} ({_digest(spec.data)}), column {spec.data.get('text_column', 'text')}"),
        ("rows", _rows(store)),
        ("sampling", _sampling(spec.data)),
        ("tokens", f"{store.mean_tokens:.1f} a text on average, cut at {spec.max_tokens}"),
        ("modules", f"{', '.join(config.get('modules', []))}: {len(spec.sites):,} with {store.num_neurons:,} neurons"),
        ("pooling", ", ".join(spec.poolings)),
        ("tokens kept", f"every token's values at {len(spec.tokens):,} modules" if spec.tokens else ""),
        ("scores", _basis(store.basis)),
        ("collected under", f"{under.get('method')} at strength {under.get('strength'):g}" if under else ""),
        ("not finite", f"{store.num_nonfinite:,} responses are NaN or infinite" if store.num_nonfinite else ""),
        ("not captured", f"{len(spec.uncaptured):,} parameters of experts of a mixture" if spec.uncaptured else ""),
        ("versions", ", ".join(f"{k} {v}" for k, v in store.attributes.get("versions", {}).items())),
        ("store", store.path),
    ]
    return [(term, text) for term, text in facts if text]


def _launch(config: Mapping[str, Any], store: StoreSummary) -> str:
    times = store.collected
    where = f" on {times['ranks']} {times['device']} rank{'s' * (times['ranks'] != 1)}" if "ranks" in times else ""
    return f", {config['sharding']}{where}" if "sharding" in config else where


def _digest(identity: Mapping[str, Any]) -> str:
    return f"sha256 {str(identity.get('sha256'))[:DIGEST_LENGTH]}"


def _rows(store: StoreSummary) -> str:
    classes = [f"{yes:,} {concept} and {no:,} not" for concept, (yes, no) in store.classes.items()]
    missing = store.num_missing_tasks
    unfinished = f"; {missing:,} of {store.num_tasks:,} tasks are not collected yet" if missing else ""
    return f"{store.num_rows:,}: {'; '.join(classes)}{unfinished}"


def _sampling(data: Mapping[str, Any]) -> str:
    how = dict(data.get("sampling") or {})
    parts = [f"seed {how['seed']}"] if "seed" in how else []
    if how.get("match_length"):
        parts.append("negatives drawn with the positives’ token lengths")
    if data.get("threshold") is not None:
        parts.append(f"positive from a score of {data['threshold']:g}")
    if data.get("clean_negatives"):
        parts.append(f"no negatives that are {', '.join(data['clean_negatives'])}")
    return ", ".join(parts)


def _basis(basis: Mapping[str, Any]) -> str:
    if not basis:
        return "none yet: run aura-dist score"
    if basis.get("partial"):
        return f"of {basis['num_rows']:,} of {basis['total_rows']:,} rows: partial"
    return f"of all {basis['num_rows']:,} rows"


def intervention_table(fitted: Sequence[tuple[str, Fitted]]) -> Table:
    """The interventions of all runs: (run, intervention)."""
    rows = []
    for run, one in fitted:
        parameters = dict(one.meta.get("parameters") or {})
        shown = ", ".join(f"{k} {_value(v)}" for k, v in parameters.items() if v is not None)
        method = method_of(one.meta)
        share = one.num_changed / one.num_neurons if one.num_neurons else 0.0
        changed = f"{one.num_changed:,}", f"{share:.1%}"
        rows.append((run, one.name, method, str(one.meta.get("concept") or "–"), shown or "–", *changed))
    header = ("run", "intervention", "method", "concept", "parameters", "neurons changed", "share")
    return _without_single_run(Table(header, tuple(rows), texts=(0, 1, 2, 3, 4)))


def _without_single_run(table: Table) -> Table:
    """The table without its first column where that names the same run in every row."""
    if len({row[0] for row in table.rows}) != 1:
        return table
    texts = tuple(i - 1 for i in table.texts if i)
    return Table(table.header[1:], tuple(row[1:] for row in table.rows), texts)


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if is_number(value) else str(value)


def stage_times(stores: Sequence[tuple[str, StoreSummary]]) -> Table:
    """How long collection and scoring took, and how fast they were: (run, store)."""
    rows = []
    for run, store in stores:
        for stage, times, what in (("collect", store.collected, "tokens"), ("score", store.scored, "neurons")):
            if seconds := times.get("seconds"):
                took = f"{seconds:.1f} s" if seconds < 120 else clock(seconds)
                amount, speed = f"{int(times[what]):,} {what}", f"{times[what] / seconds:,.0f} {what}/s"
                workers, launches = times.get("ranks", times.get("workers")), times["launches"]
                rows.append((run, stage, took, amount, speed, str(workers), str(launches)))
    header = ("run", "stage", "time", "done", "speed", "workers", "launches")
    return _without_single_run(Table(header, tuple(rows), texts=(0, 1)))


def evaluation_times(evaluations: Sequence[Evaluation]) -> Table:
    """Seconds of each part of each evaluation."""
    parts = ("load", "generation", "scoring", "perplexity", "zero_shot", "total")
    there = [p for p in parts if any(p in e.seconds for e in evaluations)]
    rows = []
    for one in evaluations:
        if one.seconds:
            rate = one.seconds.get("continuations_per_second")
            spent = [f"{one.seconds[p]:,.1f}" if p in one.seconds else "–" for p in there]
            rows.append((one.label, *spent, "–" if rate is None else f"{rate:,.1f}"))
    names = [p.replace("_", "-") for p in there]
    return Table(("evaluation", *(f"{n} (s)" for n in names), "continuations/s"), tuple(rows))


def results_table(evaluations: Sequence[Evaluation]) -> Table:
    """One line an evaluation: toxicity of all prompts, perplexity, intervention and pre-prompt."""
    plain = plain_of(evaluations)
    first = None if plain is None else plain.perplexity
    toxic, *more = _toxicity(evaluations, "overall", "")
    columns: list[tuple[str, list[str]]] = [
        toxic,
        ("times fewer toxic", [_interval(reduction(e, plain), 1.0, 2) for e in evaluations]),
        *(column for judge in judges_of(evaluations) for column in _judged(evaluations, judge)),
        ("perplexity", [_interval(e.perplexity, 1.0, 2) for e in evaluations]),
        ("change", [_change(e.perplexity, first) for e in evaluations]),
        *more,
        *_applied(evaluations),
    ]
    return _columned(columns, evaluations)


def _judged(evaluations: Sequence[Evaluation], judge: str) -> list[tuple[str, list[str]]]:
    """The first two columns as a further scorer sees them."""
    seen = [e.by_judge(judge) for e in evaluations]
    plain = plain_of(seen)
    (name, toxic), *_ = _toxicity(seen, "overall", "")
    fewer = [_interval(reduction(e, plain), 1.0, 2) for e in seen]
    return [(f"{name} by {judge}", toxic), (f"times fewer by {judge}", fewer)]


def _applied(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[str]]]:
    """Intervention and pre-prompt, as far as the labels do not show them."""
    short = modules_in_short([e for e in evaluations if e.is_fitted])
    methods = [e.method for e in evaluations]
    return [
        ("method", methods if methods != [e.label for e in evaluations] else ["–"] * len(methods)),
        ("strength", ["–" if e.strength is None else f"{e.strength:g}" for e in evaluations]),
        ("top k", [str(e.top_k or "–") for e in evaluations]),
        ("further", [e.variant or "–" for e in evaluations]),
        ("modules", ["–" if e.modules is None else short[e.modules] for e in evaluations]),
        ("pre-prompt", [_short(e.preprompt) for e in evaluations]),
    ]


def split_table(evaluations: Sequence[Evaluation]) -> Table:
    """Toxicity by the prompt's own; empty where no evaluation has that."""
    names = {"toxic_prompts": "toxic prompts: ", "nontoxic_prompts": "other prompts: "}
    return _columned([c for group, name in names.items() for c in _toxicity(evaluations, group, name)], evaluations)


def effects_table(evaluations: Sequence[Evaluation]) -> Table:
    """Side effects, the form of continuations, and how far scorers agree; empty where no evaluation has any of them."""
    figures: list[tuple[str, tuple[str, ...], float, int]] = [
        *((name, path, scale, digits) for name, (path, scale, digits) in _EFFECTS.items()),
        *(
            (name, ("toxicity", "judges", judge, figure), 100, 1)
            for judge in judges_of(evaluations)
            for name, figure in ((f"agrees with {judge} (%)", "agreement"), (f"toxic to {judge} too (%)", "both_toxic"))
        ),
    ]
    columns = [
        (name, [_interval(e.measured(*path), scale, digits) for e in evaluations])
        for name, path, scale, digits in figures
    ]
    return _columned(columns, evaluations)


def _toxicity(evaluations: Sequence[Evaluation], group: str, prefix: str) -> list[tuple[str, list[str]]]:
    return [
        (f"{prefix}{what}", [_interval(e.toxic(group, measure), scale, digits) for e in evaluations])
        for measure, (what, scale, digits) in MEASURES.items()
    ]


def _columned(columns: Sequence[tuple[str, list[str]]], evaluations: Sequence[Evaluation]) -> Table:
    """A line an evaluation; columns without a number are left out."""
    kept = [(name, cells) for name, cells in columns if set(cells) - {"–", "0.00"}]
    rows = [(e.label, *(cells[i] for _, cells in kept)) for i, e in enumerate(evaluations)] if kept else []
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


def zero_shot_table(evaluations: Sequence[Evaluation]) -> Table:
    """Task and metric by evaluation, with standard errors; each number of examples has a line of its own."""
    tasks: dict[tuple[str, ...], None] = {}
    for one in evaluations:
        for task, metrics in one.zero_shot.items():
            for metric, value in metrics.items():
                if not metric.endswith("_stderr") and not metric.startswith("num_") and isinstance(value, int | float):
                    tasks.setdefault((task, metric, *_examples(metrics)))
    there = [e for e in evaluations if e.zero_shot]
    rows = [(*key, *(_metric(e, *key) for e in there)) for key in tasks]
    return Table(("task", "metric", *_EXAMPLES, *(e.label for e in there)), tuple(rows), texts=(0, 1))


def _examples(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """Examples in the context, and examples that were asked: figures of a task compare where both are the same."""
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
