"""Cells and their figures as rows of one table, and a sweep in words.

The columns: the grid's names; `state`, `reason`, `seconds`, `attempts` and `output` of the cell; the figures of its
results file, by their path in it (`perplexity.token_weighted`); and, for a cell with an intervention whose grid has one
with `method: none` that is evaluated by the same settings, once both are done:

    against_plain.times_less_toxic.value, .low, .high   share of toxic continuations of the plain model ÷ that of this
                                                        cell, with its 95 % interval, paired over prompts; 2 is half as
                                                        much, infinite none at all
    against_plain.perplexity_increase                   token-weighted perplexity of this cell − that of the plain model
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from aura_dist.sweep.graph import Graph, Job
from aura_dist.sweep.grid import STAGES, Cell

# of a results file: settings and provenance, which the grid or the files beside it say
_NOT_FIGURES = frozenset({"aura_dist", "config", "intervention", "versions", "model_fingerprint"})


def figures(results: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers, truth values and texts of a results file, flat: `perplexity.token_weighted` → 21.3."""
    found: dict[str, Any] = {}
    for name, value in results.items():
        if not prefix and name in _NOT_FIGURES:
            continue
        if isinstance(value, Mapping):
            found |= figures(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, bool | int | float | str):
            found[prefix + name] = value
    return found


def show(value: Any) -> Any:
    """A grid's value as one table cell: lists as their words."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def cell_row(cell: Cell, chain: Sequence[Job], states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A cell's row without its figures: grid values, how it stands and why, what it took, where it is.

    Parameters
    ----------
    chain
        The cell's jobs, first to last.
    states
        Id of a job → its state file's content.
    """
    of = [states[job.id] for job in chain]
    failed = next(((j, s) for j, s in zip(chain, of, strict=True) if s["state"] == "failed"), None)
    if of[-1]["state"] == "done":
        state, failed = "done", None
    elif failed is not None:
        state = "failed"
    else:
        state = "running" if any(s["state"] == "running" for s in of) else "waiting"
    return {
        **{name: show(value) for name, value in cell.values.items()},
        "state": state,
        "reason": f"{failed[0].id}: {failed[1]['reason']}" if failed else None,
        "seconds": of[-1]["seconds"],
        "attempts": of[-1]["attempts"],
        "output": chain[-1].product,
    }


def render_plan(cells: Sequence[Cell], graph: Graph, left: Sequence[Job], cost: Mapping[str, str]) -> str:
    """Cells, jobs and costs, for the terminal.

    Parameters
    ----------
    left
        Jobs that are not done.
    cost
        Id of a collection or an evaluation that is left → what it takes, in words. Evaluations that take the same
        are one line.
    """
    names = list(cells[0].values)
    table = [names, *([_text(cell.values[name]) for name in names] for cell in cells)]
    widths = [max(len(row[i]) for row in table) for i in range(len(names))]
    lines = [f"{len(cells)} cells", *("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table), ""]
    total, waiting = (Counter(job.stage for job in jobs) for jobs in (graph.jobs.values(), left))
    lines.append(f"{sum(total.values())} jobs, {sum(waiting.values())} to run")
    lines += [f"  {stage:<9}{total[stage]:>5}, {waiting[stage]} to run" for stage in STAGES if total[stage]]
    collections = {job.id: cost[job.id] for job in left if job.stage == "collect" and job.id in cost}
    evaluations = Counter(cost[job.id] for job in left if job.stage == "evaluate" and job.id in cost)
    if collections:
        lines += ["", "collections to run, by `plan`", *(f"  {job}: {words}" for job, words in collections.items())]
    if evaluations:
        lines += ["", "evaluations to run", *(f"  {number}, each {words}" for words, number in evaluations.items())]
    return "\n".join(lines)


def _text(value: Any) -> str:
    return "–" if value is None else str(show(value))
