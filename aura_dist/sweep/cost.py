"""What is left of a sweep, and what it would take: `sweep --dry-run`. Never imports torch; planning is asked for."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from aura_dist.errors import ConfigError
from aura_dist.sweep.graph import Graph
from aura_dist.sweep.grid import Cell
from aura_dist.sweep.job_cost import Cost, plan_costs
from aura_dist.sweep.slurm_executor import stage_resources
from aura_dist.sweep.table import render_plan


def dry_run(
    cells: Sequence[Cell],
    graph: Graph,
    left: Mapping[str, Mapping[str, Any]],
    plan: Mapping[str, Any],
    launch: int | Mapping[str, Any],
) -> str:
    """Cells, jobs, and what the collections and evaluations that are left would take.

    Parameters
    ----------
    left
        Id of a job that is not done → its settings, with its paths.
    plan
        The file's settings of `plan`.
    launch
        Ranks of a job on this machine, or what jobs ask of Slurm.
    """
    planned = {name: value for name, value in plan.items() if name not in ("data", "store")}
    wanted: dict[str, tuple[str, dict[str, Any]]] = {}
    for job, settings in left.items():
        stage = graph.jobs[job].stage
        if stage == "collect":
            wanted[job] = stage, {**settings, **planned, **planned_launch(launch, stage)}
        elif stage == "evaluate":
            gpu = {"device": "cuda"} if "device_memory" in planned else {}
            wanted[job] = stage, {**settings, "tflops": planned.get("tflops"), **gpu, **planned_launch(launch, stage)}
    costs = plan_costs(wanted)
    text = render_plan(cells, graph, [graph.jobs[job] for job in left], {job: c.words for job, c in costs.items()})
    total = Cost.total(costs.values()).words if costs else "0 GPU-hours"
    note = "scoring, fits, sampling and scorers are not in it" if left else "nothing is left"
    return f"{text}\n\n{total} in all, if ranks are busy all the time; {note}"


def planned_launch(launch: int | Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Plan's flags that say how a collection or an evaluation would be started."""
    if isinstance(launch, int):
        return {"world_size": launch}
    resources = {name.removeprefix("slurm_"): value for name, value in stage_resources(launch, stage).items()}
    tasks = resources.get("tasks_per_node", resources.get("ntasks_per_node", 1))
    counts = [resources.get("nodes", 1), tasks]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ConfigError(f"resources: nodes, tasks_per_node: expected integers of at least 1, got {counts}")
    gpu = any(("gpu" in name or name == "gres") and value for name, value in resources.items())
    return {"world_size": math.prod(counts), **({"device": "cuda"} if gpu else {})}
