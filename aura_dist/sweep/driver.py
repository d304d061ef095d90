"""A sweep in its directory: what is left of it, the loop that runs it, and its table.

What is done is read from files alone: the jobs' state files and what the jobs make. So a sweep can be stopped, run
again, and run with a larger grid.
"""

import csv
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from aura_dist.config.settings import resolve
from aura_dist.config.verbs import VERBS, SweepConfig
from aura_dist.errors import ClusterError, ConfigError, InputError, SweepError
from aura_dist.evaluation.compare import against_plain
from aura_dist.evaluation.results import read_results
from aura_dist.files import replacing, write_whole
from aura_dist.ranks.signals import StopFlag, interruption
from aura_dist.report.rundir import JOBS_FILE
from aura_dist.sweep.graph import Graph, Job, ends, make_graph
from aura_dist.sweep.grid import Cell, make_cells
from aura_dist.sweep.jobs import JobCommand
from aura_dist.sweep.launchers import LAUNCHERS, Launcher
from aura_dist.sweep.stage_specs import STAGE_SPECS, kept, num_ranks
from aura_dist.sweep.table import cell_row, figures

logger = logging.getLogger(__name__)


def read_grid(document: Mapping[str, Any]) -> tuple[list[Cell], Graph]:
    """The cells and jobs of a grid file; ConfigError if it holds what no stage takes."""
    cells = make_cells(document, {stage: {spec.name for spec in fields(VERBS[stage].config)} for stage in STAGE_SPECS})
    return cells, make_graph([resolved_settings(cell) for cell in cells])


def resolved_settings(cell: Cell) -> dict[str, dict[str, Any]]:
    """Stage → checked settings that differ from their defaults, without the paths that the sweep sets."""
    found = {}
    for stage, settings in cell.settings.items():
        paths = STAGE_SPECS[stage].paths  # `resolve` takes any text as a path
        try:
            config: Any = resolve(VERBS[stage].config, {**settings, **paths})
        except ConfigError as error:
            place = ", ".join(f"{name} {value}" for name, value in cell.values.items() if value is not None)
            raise ConfigError(f"{stage} of the cell {place}: {error}") from error
        found[stage] = {
            s.name: getattr(config, s.name) for s in fields(config) if s.name not in paths and config.is_set(s)
        }
    return found


class Sweep:
    """The jobs of a sweep, their states and results."""

    def __init__(self, config: SweepConfig, cells: Sequence[Cell], graph: Graph) -> None:
        self._config, self._cells, self._graph = config, cells, graph
        self._out = Path(config.out)
        ranks = config.ranks if LAUNCHERS[config.launcher].starts_ranks else 1
        self._commands = {
            job.id: JobCommand(
                self._out, job.id, job.stage, job.needs, num_ranks(job.stage, job.settings, ranks),
                partial(kept, job.stage, self._out / job.product),
            )
            for job in graph.jobs.values()
        }  # fmt: skip
        self._compared: dict[str, dict[str, float]] = {}
        for job in graph.jobs.values():
            self._check_processes(job)

    def _check_processes(self, job: Job) -> None:
        """ConfigError if the launcher would start several processes of a job that must be one."""
        launcher, spec = LAUNCHERS[self._config.launcher], STAGE_SPECS[job.stage]
        if launcher.starts_ranks or not spec.ranked or num_ranks(job.stage, job.settings, 2) == 2:
            return
        started = launcher.planned(self._config, job.stage)["world_size"]
        if started > 1:
            raise ConfigError(
                f"resources: expected nodes 1 and tasks_per_node 1 for {job.stage} with {spec.single_with!r}, got "
                f"{started} processes; give both in a section {job.stage!r} of the resources, and all GPUs to the one"
            )

    def left(self) -> list[Job]:
        """Jobs that are not done and that some cell still needs, each after those that it needs."""
        wanted = self._graph.ends
        left: list[Job] = []
        for job in reversed(list(self._graph.jobs.values())):
            if job.id in wanted and not self._is_done(job):
                wanted |= {*job.needs}
                left.append(job)
        return left[::-1]

    def _is_done(self, job: Job) -> bool:
        """Whether its state says so, and what it made exists; results must be whole."""
        if self._commands[job.id].state.state != "done":
            return False
        has_results = STAGE_SPECS[job.stage].has_results
        return self._results(job.id) is not None if has_results else (self._out / job.product).exists()

    def prepare(self, document: Mapping[str, Any]) -> None:
        """Write the grid, the ids of its jobs, and every job's settings."""
        (self._out / "jobs").mkdir(exist_ok=True)
        write_whole(self._out / "sweep.yaml", yaml.safe_dump(dict(document), sort_keys=False))
        write_whole(self._out / JOBS_FILE, json.dumps(list(self._graph.jobs), indent=2) + "\n")
        for job in self._graph.jobs.values():
            write_whole(self._commands[job.id].config, yaml.safe_dump(self.settings(job), sort_keys=False))

    def settings(self, job: Job) -> dict[str, Any]:
        """A job's settings with its paths."""
        return {**job.settings, **{name: str(self._out / path) for name, path in job.paths.items()}}

    def work(self, launcher: Launcher, stop: StopFlag) -> None:
        """Start jobs while the launcher has room, until none is left; RunInterruptedError at a signal."""
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
                if stop.received is None:  # else Ctrl-C has ended sbatch
                    raise
            if not running and not ready:
                break
            time.sleep(launcher.poll_seconds)
            if stop.received is not None:
                note = launcher.stop()
                self.write_table()
                raise interruption(stop.received, note)
            for job_id in launcher.ended():
                if job_id not in running:  # withdrawn in this loop
                    continue
                running.remove(job_id)
                if self._settle(job_id, left) != "done":  # it failed, or Slurm dropped it: its descendants wait
                    waiting = [job.id for job in self._graph.descendants(job_id) if job.id in running]
                    launcher.withdraw([self._commands[name] for name in waiting])
                    running.difference_update(waiting)
        self.write_table()

    def _queue(self, job: Job) -> None:
        """Make a job wait for its first attempt; rename damaged results, because `evaluate` would not replace them."""
        product = self._out / job.product
        if STAGE_SPECS[job.stage].has_results and product.exists() and self._results(job.id) is None:
            product.replace(product.with_name(f"{product.name}.damaged"))
        command = self._commands[job.id]
        command.write(command.state.renewed())

    def _settle(self, job_id: str, left: dict[str, Job]) -> str:
        """Remove from `left` a job that is done, or failed too often with all that waits for it; the job's state."""
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
        if job_id in self._graph.ends:
            self.write_table()
        return state.state

    def rows(self) -> list[dict[str, Any]]:
        """The table, one row a cell."""
        states = {job: asdict(command.state) for job, command in self._commands.items()}
        rows = []
        for cell, chain in zip(self._cells, self._graph.chains, strict=True):
            row = cell_row(cell, chain, states)
            measured = [job.id for job in ends(chain) if STAGE_SPECS[job.stage].has_results]
            found: dict[str, Any] = {}
            for job_id in measured if row["state"] == "done" else ():
                found |= {**figures(self._results(job_id) or {}), **self._against_plain(job_id, states)}
            rows.append({**row, **found, **row})  # a figure never replaces one of the row's own columns
        return rows

    def _results(self, job_id: str) -> dict[str, Any] | None:
        """The results file of a job; None if it is missing or damaged."""
        try:
            return read_results(str(self._out / self._graph.jobs[job_id].product))
        except InputError:
            return None

    def _against_plain(self, job_id: str, states: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """Columns that compare an evaluation with the plain model's; none before that one is done."""
        plain = self._graph.plain(job_id)
        if plain is None or states[plain]["state"] != "done":
            return {}
        if job_id not in self._compared:  # kept: it takes thousands of draws, and every cell's end writes the table
            theirs, ours = self._results(plain), self._results(job_id)
            if theirs is None or ours is None:
                return {}
            found = against_plain(theirs, ours)
            self._compared[job_id] = {f"against_plain.{name}": value for name, value in found.items()}
        return self._compared[job_id]

    def write_table(self) -> None:
        """Replace table.parquet and table.csv."""
        import pandas as pd
        from pandas.api.types import is_object_dtype

        table = pd.DataFrame(self.rows()).convert_dtypes()
        for name in filter(lambda n: is_object_dtype(table[n]), table):  # of several types, of which Parquet takes one
            table[name] = table[name].map(str, na_action="ignore").astype("string")
        with replacing(self._out / "table.parquet") as aside:
            table.to_parquet(aside, index=False)
        write_whole(self._out / "table.csv", table.to_csv(index=False, quoting=csv.QUOTE_MINIMAL))

    def report(self) -> None:
        """Log how many cells are done; SweepError if some failed."""
        rows = self.rows()
        failed = [row for row in rows if row["state"] == "failed"]
        logger.info("wrote %s: %d of %d cells done", self._out / "table.parquet", len(rows) - len(failed), len(rows))
        names = list(self._cells[0].values)
        for row in failed:
            logger.error("failed: %s: %s", ", ".join(f"{name} {row[name]}" for name in names), row["reason"])
        if failed:
            raise SweepError(
                f"{len(failed)} of {len(rows)} cells failed, the first by {failed[0]['reason']}; "
                "remove the cause and run the same command, which does what is left"
            )


def startable(left: Iterable[Job], running: Iterable[str], *, chains: bool) -> list[Job]:
    """Jobs of `left` that can be started: those they need are done, or, if the launcher `chains` jobs, started too.

    `left` holds the jobs that are not done, each after those that it needs, and `running` the ids of those started.
    """
    jobs, started = {job.id: job for job in left}, set(running)
    found = []
    for job in jobs.values():
        waits = {need for need in job.needs if need in jobs}
        if job.id not in started and waits <= (started if chains else set()):
            found.append(job)
            started.add(job.id)
    return found
