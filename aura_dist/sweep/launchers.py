"""Where a sweep's jobs run: what the sweep asks of a launcher, and the table of those that there are.

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
    """Starts jobs and follows them until they end. A job's own process, or the launcher, writes its state file.

    Attributes
    ----------
    poll_seconds
        Time between two calls of `ended`.
    chains
        Whether it takes jobs before those that they need are done, and starts each in its turn.
    """

    @property
    def poll_seconds(self) -> float: ...

    @property
    def chains(self) -> bool: ...

    @property
    def room(self) -> int:
        """How many jobs `start` may be given now."""

    def adopt(self, commands: Sequence[JobCommand]) -> list[str]:
        """Follow those of the jobs that an earlier run of the sweep started and that have not ended; their ids.

        ClusterError if such a job might be started twice.
        """

    def start(self, commands: Sequence[JobCommand]) -> list[str]:
        """Start jobs, each after those that it needs; ids of those started, because there may be less room than jobs.

        ClusterError if no more jobs can ever be started.
        """

    def withdraw(self, commands: Sequence[JobCommand]) -> None:
        """Take back jobs that wait for one that failed."""

    def ended(self) -> list[str]:
        """Ids of the jobs that have ended since the last call; their state files say how."""

    def stop(self) -> str:
        """A person ends the sweep: end its jobs or leave them; what to add to the message."""


@dataclass(frozen=True)
class LauncherSpec:
    """One choice of `--launcher`.

    Attributes
    ----------
    summary
        For the help text.
    make
        The launcher, from the sweep's settings and the descriptor of its directory's lock.
    ranks
        How many processes the command of a job that can have several starts itself.
    planned
        How a stage's job would be started, as flags of `plan`.
    """

    summary: str
    make: Callable[["SweepConfig", int], Launcher]
    ranks: Callable[["SweepConfig"], int]
    planned: Callable[["SweepConfig", str], Mapping[str, Any]]


LAUNCHERS = {
    "local": LauncherSpec(
        summary="processes of this machine",
        make=lambda config, lock: LocalLauncher(config.jobs, lock),
        ranks=lambda config: config.ranks,
        planned=lambda config, stage: {"world_size": config.ranks},
    ),
    "slurm": LauncherSpec(
        summary="jobs of Slurm, submitted by submitit",
        make=lambda config, lock: SlurmLauncher(Path(config.out), config.resources),
        ranks=lambda config: 1,
        planned=lambda config, stage: planned_launch(config.resources, stage),
    ),
}
