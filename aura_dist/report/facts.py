"""What was run, as terms and their descriptions, and as tables: numbers in words, nothing drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aura_dist.interventions.artifact import method_of
from aura_dist.report.evaluations import Evaluation
from aura_dist.report.rundir import Fitted
from aura_dist.report.scored import StoreSummary

DIGEST_LENGTH = 12


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; those of columns in `texts` (by index) are set left, numbers right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: tuple[int, ...] = (0,)


def facts_of(store: StoreSummary) -> list[tuple[str, str]]:
    """Terms and descriptions of a store: model, data, rows, modules, settings, versions."""
    spec, config = store.spec, store.attributes.get("config", {})
    model = spec.model
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
        ("scores", _basis(store.basis)),
    ]
    if spec.intervention is not None:
        under = spec.intervention
        facts.append(("collected under", f"{under.get('method')} at strength {under.get('strength'):g}"))
    if store.num_nonfinite:
        facts.append(("not finite", f"{store.num_nonfinite:,} responses are NaN or infinite"))
    if spec.uncaptured:
        facts.append(("not captured", f"{len(spec.uncaptured):,} parameters of experts of a mixture"))
    facts.append(("versions", ", ".join(f"{k} {v}" for k, v in store.attributes.get("versions", {}).items())))
    facts.append(("store", store.path))
    return [(term, text) for term, text in facts if text]


def _launch(config: Mapping[str, Any], store: StoreSummary) -> str:
    times = store.collected
    where = f" on {times['ranks']} {times['device']} rank{'s' * (times['ranks'] != 1)}" if "ranks" in times else ""
    return f", {config['sharding']}{where}" if "sharding" in config else where


def _digest(identity: Mapping[str, Any]) -> str:
    return f"sha256 {str(identity.get('sha256'))[:DIGEST_LENGTH]}"


def _rows(store: StoreSummary) -> str:
    classes = [f"{yes:,} {concept} and {no:,} not" for concept, (yes, no) in store.classes.items()]
    missing = store.num_tasks - store.num_done_tasks
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
    return without_single_run(Table(header, tuple(rows), texts=(0, 1, 2, 3, 4)))


def without_single_run(table: Table) -> Table:
    """The table without its first column where that names the same run in every row."""
    if len({row[0] for row in table.rows}) != 1:
        return table
    texts = tuple(i - 1 for i in table.texts if i)
    return Table(table.header[1:], tuple(row[1:] for row in table.rows), texts)


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if _plain(value) else str(value)


def _plain(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def stage_times(stores: Sequence[tuple[str, StoreSummary]]) -> Table:
    """How long collection and scoring took, and how fast they went: (run, store)."""
    rows = []
    for run, store in stores:
        for stage, times, what in (("collect", store.collected, "tokens"), ("score", store.scored, "neurons")):
            if times.get("seconds"):
                workers = times.get("ranks", times.get("workers"))
                amount, speed = f"{int(times[what]):,} {what}", f"{times[what] / times['seconds']:,.0f} {what}/s"
                took, launches = duration(times["seconds"]), str(times["launches"])
                rows.append((run, stage, took, amount, speed, str(workers), launches))
    header = ("run", "stage", "time", "done", "speed", "workers", "launches")
    return without_single_run(Table(header, tuple(rows), texts=(0, 1)))


def duration(seconds: float) -> str:
    """A time in the units that a reader would choose."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def evaluation_times(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> Table:
    """Seconds of each part of each evaluation."""
    parts = ("load", "generation", "scoring", "perplexity", "zero_shot", "total")
    there = [p for p in parts if any(p in e.seconds for e in evaluations)]
    rows = []
    for one, label in zip(evaluations, labels, strict=True):
        if one.seconds:
            rate = one.seconds.get("continuations_per_second")
            spent = [f"{one.seconds[p]:,.1f}" if p in one.seconds else "–" for p in there]
            rows.append((label, *spent, "–" if rate is None else f"{rate:,.1f}"))
    names = [p.replace("_", "-") for p in there]
    return Table(("evaluation", *(f"{n} (s)" for n in names), "continuations/s"), tuple(rows))
