"""Where a sweep's jobs run: what the sweep asks of a launcher, and the table of launchers.

A new launcher is a file with a class that fulfils `Launcher`, and a row of `LAUNCHERS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from aura_dist.sweep.jobs import JobCommand
from aura_dist.sweep.local import LocalLauncher
from aura_dist.sweep.slurm import SlurmLauncher
from aura_dist.sweep.slurm_job import planned_launch

if TYPE_CHECKING:
    from aura_dist.config.verbs import SweepConfig


class Launcher(Protocol):
    """Starts jobs and follows them until they end; it, or the job's own process, writes the state file."""

    # between two calls of `ended`
    poll_seconds: float
    # whether it takes jobs before those that they need are done, and starts each in its turn
    chains: bool

    @property
    def room(self) -> int:
        """How many jobs `start` may be given now."""

    def adopt(self, commands: Sequence[JobCommand]) -> list[str]:
        """Follow the jobs that an earlier run of the sweep started; their ids. ClusterError if one could run twice."""

    def start(self, commands: Sequence[JobCommand]) -> list[str]:
        """Start jobs, each after those it needs, as far as there is room; their ids. ClusterError if none can start."""

    def withdraw(self, commands: Sequence[JobCommand]) -> None:
        """Take back jobs that wait for one that failed."""

    def ended(self) -> list[str]:
        """Ids of the jobs that have ended since the last call; their state files say how."""

    def stop(self) -> str:
        """End the jobs or leave them, because a person ends the sweep; what to add to the message."""


@dataclass(frozen=True)
class LauncherSpec:
    """One choice of `--launcher`."""

    summary: str
    # from the sweep's settings and the descriptor of its directory's lock
    make: Callable[["SweepConfig", int], Launcher]
    # whether the command of a job starts the job's ranks itself
    starts_ranks: bool
    # how a stage's job would be started, as flags of `plan`
    planned: Callable[["SweepConfig", str], Mapping[str, Any]]


LAUNCHERS = {
    "local": LauncherSpec(
        "processes of this machine",
        lambda config, lock: LocalLauncher(config.jobs, lock),
        starts_ranks=True,
        planned=lambda config, stage: {"world_size": config.ranks},
    ),
    "slurm": LauncherSpec(
        "jobs of Slurm, submitted by submitit",
        lambda config, lock: SlurmLauncher(Path(config.out), config.resources),
        starts_ranks=False,
        planned=lambda config, stage: planned_launch(config.resources, stage),
    ),
}
