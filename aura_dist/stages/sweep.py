"""sweep: a grid of settings → jobs that share what they have in common → one table. Never imports torch.

Data flow: grid file → cells → graph of jobs → a launcher runs each job as `aura-dist STAGE`, after those that it needs
→ state files and results → table. All of it is in `sweep/`.
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from aura_dist.config.verbs import CollectConfig, PlanConfig, SweepConfig
from aura_dist.errors import ConfigError
from aura_dist.files import locked
from aura_dist.ranks.signals import StopFlag
from aura_dist.sweep.cost import dry_run
from aura_dist.sweep.driver import Sweep, read_grid
from aura_dist.sweep.launchers import LAUNCHERS

# what `plan` takes beside the settings of a collection
_PLANNING = {spec.name for spec in fields(PlanConfig)} - {spec.name for spec in fields(CollectConfig)}


def run(config: SweepConfig, document: Mapping[str, Any]) -> None:
    """Run what is left of the grid; SweepError with a reason if cells failed."""
    document = {**document, "grid": config.grid}  # which may be in the verb's section
    cells, graph = read_grid(document)
    sweep, launcher = Sweep(config, cells, graph), LAUNCHERS[config.launcher]
    if config.dry_run:
        left = {job.id: sweep.settings(job) for job in sweep.left()}
        top = {name: value for name, value in document.items() if name in _PLANNING}
        plan = {**top, **(document.get("plan") or {})}
        print(dry_run(cells, graph, left, plan, partial(launcher.planned, config)))
        return
    if "://" in config.out:
        raise ConfigError(f"--out: expected a directory that all machines of the sweep see, got {config.out!r}")
    with locked(Path(config.out)) as lock, StopFlag() as stop, stop.deferred():
        sweep.prepare(document)
        sweep.work(launcher.make(config, lock), stop)
    sweep.report()
