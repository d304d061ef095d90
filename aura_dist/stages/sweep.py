"""sweep: a grid of settings → jobs that share what they have in common → one table. Never imports torch.

Data flow: grid file → cells → graph of jobs (`sweep/`) → a launcher starts each job as `aura-dist STAGE` once what it
needs is done, or leaves that to Slurm, and keeps a state file of it → results files → table. What is done is read from
these files alone, so that a sweep can be stopped and started again, and grown.
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from aura_dist.config.settings import resolve
from aura_dist.config.verbs import VERBS, CollectConfig, PlanConfig, SweepConfig
from aura_dist.errors import ClusterError, ConfigError, SweepError
from aura_dist.ranks.signals import StopFlag, interruption
from aura_dist.report.rundir import JOBS_FILE
from aura_dist.store.lock import locked
from aura_dist.sweep.cost import dry_run
from aura_dist.sweep.graph import Graph, Job, make_graph
from aura_dist.sweep.grid import STAGES, Cell, make_cells
from aura_dist.sweep.job_command import JobCommand
from aura_dist.sweep.local import LocalLauncher
from aura_dist.sweep.progress import kept
from aura_dist.sweep.results import SweepResults, replace_text
from aura_dist.sweep.slurm import SlurmLauncher

logger = logging.getLogger(__name__)

# ranks share what these stages do
_RANKED = ("collect", "evaluate")
_PLACES = {"store": "sweep.zarr", "out": "sweep", "intervention": None}
# what `plan` takes beside the settings of a collection
_PLANNING = {spec.name for spec in fields(PlanConfig)} - {spec.name for spec in fields(CollectConfig)}


def run(config: SweepConfig, document: Mapping[str, Any]) -> None:
    """Run what is left of the grid; SweepError that names a reason if cells failed."""
    known = {stage: {spec.name for spec in fields(VERBS[stage].config)} for stage in STAGES}
    document = {**document, "grid": config.grid}  # it may stand in the section of this verb
    cells = make_cells(document, known)
    graph = make_graph(cells, [resolved_settings(cell) for cell in cells])
    if config.dry_run:
        sweep = Sweep(config, cells, graph)
        left = {job.id: sweep.settings(job) for job in sweep.left()}
        launch = config.ranks if config.launcher == "local" else config.resources
        top = {name: value for name, value in document.items() if name in _PLANNING}
        print(dry_run(cells, graph, left, {**top, **(document.get("plan") or {})}, launch))
        return
    if "://" in config.out:
        raise ConfigError(f"--out: expected a directory that all machines of the sweep see, got {config.out!r}")
    out = Path(config.out)
    with locked(out) as lock, StopFlag() as stop, stop.deferred():
        sweep = Sweep(config, cells, graph)
        sweep.prepare(document)
        launcher = (
            LocalLauncher(config.jobs, lock) if config.launcher == "local" else SlurmLauncher(out, config.resources)
        )
        sweep.work(launcher, stop)
    sweep.report()


def resolved_settings(cell: Cell) -> dict[str, dict[str, Any]]:
    """Stage → checked settings that differ from their defaults."""
    found = {}
    for stage, settings in cell.settings.items():
        specs = fields(VERBS[stage].config)
        names = {spec.name for spec in specs}
        # `intervention` of a collection is the user's; of an evaluation it is what the sweep fits
        places = {k: v for k, v in _PLACES.items() if k in names and not (stage == "collect" and k == "intervention")}
        try:
            config: Any = resolve(VERBS[stage].config, {**settings, **places})
        except ConfigError as error:
            place = ", ".join(f"{name} {value}" for name, value in cell.values.items() if value is not None)
            raise ConfigError(f"{stage} of the cell {place}: {error}") from error
        defaults = {s.name: s.default if s.default_factory is MISSING else s.default_factory() for s in specs}
        values = {name: getattr(config, name) for name in names - set(places)}
        found[stage] = {name: value for name, value in values.items() if value != defaults[name]}
    return found


class Sweep:
    """The jobs of a sweep and how they stand, by their files."""

    def __init__(self, config: SweepConfig, cells: list[Cell], graph: Graph) -> None:
        self._config, self._cells, self._graph = config, cells, graph
        self._out = Path(config.out)
        local = config.launcher == "local"
        self._commands = {
            job.id: JobCommand(
                self._out, job.id, job.stage, job.needs, config.ranks if local and job.stage in _RANKED else 1,
                partial(kept, job.stage, self._out / job.product),
            )
            for job in graph.jobs.values()
        }  # fmt: skip
        self._results = SweepResults(self._out, cells, graph)

    def is_done(self, job: Job) -> bool:
        """Whether it said so, and what it made is there; results, whole."""
        return self._commands[job.id].state.state == "done" and self._results.is_there(job)

    def left(self) -> list[Job]:
        """Jobs that are not done and that some cell still needs, each after those that it needs."""
        wanted: set[str] = set()
        for job in reversed(list(self._graph.jobs.values())):
            if (job.id in self._graph.last or job.id in wanted) and not self.is_done(job):
                wanted |= {job.id, *job.needs}
        return [job for job in self._graph.jobs.values() if job.id in wanted and not self.is_done(job)]

    def prepare(self, document: Mapping[str, Any]) -> None:
        """Write the grid, the names of its jobs, and every job's settings."""
        (self._out / "jobs").mkdir(exist_ok=True)
        replace_text(self._out / "sweep.yaml", yaml.safe_dump(dict(document), sort_keys=False))
        replace_text(self._out / JOBS_FILE, json.dumps(list(self._graph.jobs), indent=2) + "\n")
        for job in self._graph.jobs.values():
            replace_text(self._commands[job.id].config, yaml.safe_dump(self.settings(job), sort_keys=False))

    def settings(self, job: Job) -> dict[str, Any]:
        """Of a job, with its paths."""
        return {**job.settings, **{name: str(self._out / path) for name, path in job.paths.items()}}

    def work(self, launcher: LocalLauncher | SlurmLauncher, stop: StopFlag) -> None:
        """Start jobs as the launcher can take them, until none is left, or RunInterruptedError at a signal."""
        left = {job.id: job for job in self.left()}
        running = set(launcher.adopt([self._commands[job] for job in left]))
        for job in left.values():
            if job.id not in running:
                self._queue(job)
        logger.info("%d cells: %d jobs, %d to run", len(self._cells), len(self._graph.jobs), len(left))
        while True:
            ready = startable(left.values(), running, chains=launcher.chains)
            try:
                running |= set(launcher.start([self._commands[job.id] for job in ready[: launcher.room]]))
            except ClusterError:
                self.write_table()
                if stop.received is None:  # Ctrl-C ends sbatch too
                    raise
            if not running and not ready:
                break
            time.sleep(launcher.poll_seconds)
            if stop.received is not None:
                note = launcher.stop()
                self.write_table()
                raise interruption(stop.received, note)
            for job_id in launcher.ended():
                if job_id not in running:  # withdrawn with one before it
                    continue
                running.remove(job_id)
                if self._settle(job_id, left) != "done":  # also of one that Slurm dropped, with all that waits for it
                    waiting = [job.id for job in self._graph.descendants(job_id) if job.id in running]
                    launcher.withdraw([self._commands[name] for name in waiting])
                    running.difference_update(waiting)
        self.write_table()

    def _queue(self, job: Job) -> None:
        """As if it had not been tried."""
        self._results.set_aside(job)
        command = self._commands[job.id]
        command.write(command.state.renewed())

    def _settle(self, job_id: str, left: dict[str, Job]) -> str:
        """Take a job that is done off the list, one that failed too often with all that waits for it; its state."""
        state = self._commands[job_id].state
        if state.state == "done":
            del left[job_id]
            logger.info("%s: done in %.0f s; %d jobs left", job_id, state.seconds, len(left))
        elif state.state == "failed" and state.attempts > self._config.retries:
            logger.error("%s failed: %s", job_id, state.reason)
            for lost in [job_id, *(job.id for job in self._graph.descendants(job_id))]:
                left.pop(lost, None)
        elif state.state == "failed":
            logger.warning("%s failed, to be tried again: %s", job_id, state.reason)
        if job_id in self._graph.last:
            self.write_table()
        return state.state

    def rows(self) -> list[dict[str, Any]]:
        """The table: a row a cell."""
        states = {job: asdict(command.state) for job, command in self._commands.items()}
        return self._results.rows(states)

    def write_table(self) -> None:
        """Replace table.parquet and table.csv."""
        self._results.write(self.rows())

    def report(self) -> None:
        """Say how the cells stand; SweepError if some failed."""
        rows = self.rows()
        failed = [row for row in rows if row["state"] == "failed"]
        logger.info("wrote %s: %d of %d cells done", self._out / "table.parquet", len(rows) - len(failed), len(rows))
        names = list(self._cells[0].values)
        for row in failed:
            logger.error("failed: %s: %s", ", ".join(f"{name} {row[name]}" for name in names), row["reason"])
        if failed:
            raise SweepError(
                f"{len(failed)} of {len(rows)} cells failed, the first by {failed[0]['reason']}; "
                "mend the cause and run the same command: it does what is left"
            )


def startable(left: Iterable[Job], running: Iterable[str], *, chains: bool) -> list[Job]:
    """Jobs that can be started: what they need is done, or, if the launcher `chains` jobs, started too.

    Parameters
    ----------
    left
        Jobs that are not done, each after those that it needs.
    running
        Those that are started already.
    """
    jobs, started = {job.id: job for job in left}, set(running)
    found = []
    for job in jobs.values():
        waits = {need for need in job.needs if need in jobs}
        if job.id not in started and waits <= (started if chains else set()):
            found.append(job)
            started.add(job.id)
    return found
