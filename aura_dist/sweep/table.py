"""Cells and their figures as rows of one table, and a sweep in words. Pure functions.

The columns are the grid's names; `state`, `reason`, `seconds`, `attempts` and `output` of the cell; and the figures of
its results file, named by their path in it (`perplexity.token_weighted`). A cell with an intervention has more columns
if the grid has `method: none` evaluated by the same settings, once both are done:

    against_plain.times_less_toxic.value, .low, .high   share of toxic continuations of the plain model ÷ the cell's
                                                        share, with a 95 % interval paired over prompts; 2 means half
                                                        as many toxic continuations, infinite means none
    against_plain.perplexity_increase, …_low, …_high    token-weighted perplexity of the cell − the plain model's
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from aura_dist.sweep.graph import Graph, Job, ends
from aura_dist.sweep.grid import Cell
from aura_dist.sweep.stage_specs import STAGE_SPECS

# settings and provenance, which the grid's columns or the files beside the results hold
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


def cell_row(cell: Cell, chain: Sequence[Job], states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A cell's row without its figures: grid values, state and reason, time and attempts, and where the output is.

    `chain` holds the cell's jobs, first to last, and `states` each job's state file.
    """
    failed = next((job for job in chain if states[job.id]["state"] == "failed"), None)
    if all(states[job.id]["state"] == "done" for job in ends(chain)):
        state, failed = "done", None
    elif failed is not None:
        state = "failed"
    else:
        state = "running" if any(states[job.id]["state"] == "running" for job in chain) else "waiting"
    return {
        **{name: _as_cell(value) for name, value in cell.values.items()},
        "state": state,
        "reason": f"{failed.id}: {states[failed.id]['reason']}" if failed else None,
        "seconds": states[chain[-1].id]["seconds"],
        "attempts": states[chain[-1].id]["attempts"],
        "output": chain[-1].product,
    }


def render_plan(cells: Sequence[Cell], graph: Graph, left: Sequence[Job], cost: Mapping[str, str]) -> str:
    """Cells, jobs and costs, for the terminal; `left` are the jobs that are not done, `cost` their costs in words."""
    names = list(cells[0].values)
    table = [names, *([_text(cell.values[name]) for name in names] for cell in cells)]
    widths = [max(len(row[i]) for row in table) for i in range(len(names))]
    lines = [f"{len(cells)} cells", *("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table), ""]
    total, waiting = (Counter(job.stage for job in jobs) for jobs in (graph.jobs.values(), left))
    lines.append(f"{sum(total.values())} jobs, {sum(waiting.values())} to run")
    lines += [f"  {stage:<9}{total[stage]:>5}, {waiting[stage]} to run" for stage in STAGE_SPECS if total[stage]]
    for stage, spec in STAGE_SPECS.items():
        costs = {job.id: cost[job.id] for job in left if job.stage == stage and job.id in cost}
        if spec.cost_alike:
            shown = [f"  {number}, each {words}" for words, number in Counter(costs.values()).items()]
        else:
            shown = [f"  {job}: {words}" for job, words in costs.items()]
        lines += ["", spec.cost_heading, *shown] if shown else []
    return "\n".join(lines)


def _as_cell(value: Any) -> Any:
    """A grid's value as one cell of the table: a list as its words."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    return "–" if value is None else str(_as_cell(value))
