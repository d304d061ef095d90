"""Jobs of Slurm, submitted as arrays by submitit.

All jobs are submitted at once: Slurm holds each back until those that it needs have ended well (`afterok`), and each
writes its own state file. So they need a driver only to start failed jobs again.
"""

import logging
import math
import re
import shutil
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aura_dist.errors import ClusterError, brief
from aura_dist.ranks.slurm_queue import MISSES, cancel_waiting, queued_jobs
from aura_dist.sweep.jobs import JobCommand
from aura_dist.sweep.slurm_job import DEFAULT_MINUTES, JobTask, make_executor, outside_job, stage_resources
from aura_dist.sweep.stage_specs import STAGE_SPECS

logger = logging.getLogger(__name__)

SQUEUE_SECONDS = 5.0
# after this time `start` returns, so that the sweep looks for ended jobs and signals
SUBMIT_SECONDS = 5.0
# when a full queue is tried again, unless a job ends before; Slurm frees the place of an ended job a little later
FULL_SECONDS = 30.0
# how long Slurm may refuse jobs while none of ours is in its queue
REFUSED_SECONDS = 600.0
# what sbatch says if a user, an account or the cluster may have no more jobs, or an array is too large
_LIMIT = re.compile("submit limit|temporarily|invalid job array", re.IGNORECASE)
# what it says if its controller does not answer; should it have taken the submission, the submission does not count
_NO_ANSWER = re.compile(
    "timed out|unable to contact|connection refused|communication|zero bytes|endpoint is not|unexpected message|"
    "standby",
    re.IGNORECASE,
)
_LOST = "the Slurm job has gone and wrote no end: it was cancelled, killed or out of memory; see {log} and `sacct`"


class SlurmLauncher:
    """Submits jobs and follows them; a `Launcher`. Jobs of a stage that wait for the same jobs are one array.

    The files of Slurm and submitit are in `directory`/slurm. `resources` are parameters of submitit's AutoExecutor; a
    mapping under a stage's name is for that stage alone. ClusterError if there is no Slurm here, ConfigError if a
    parameter is unknown.
    """

    poll_seconds = 1.0
    chains = True

    def __init__(self, directory: Path, resources: Mapping[str, Any]) -> None:
        if shutil.which("sbatch") is None:
            raise ClusterError("--launcher slurm: expected Slurm's sbatch on this machine, found none; use local")
        self._directory, self._resources = directory / "slurm", resources
        for stage in STAGE_SPECS:  # so that an error in the last stage's resources shows before the first is run
            make_executor(self._directory, stage, resources)
        unlimited = [stage for stage in STAGE_SPECS if "timeout_min" not in stage_resources(resources, stage)]
        if unlimited:
            names = ", ".join(unlimited)
            logger.warning("resources: no timeout_min: jobs of %s may run for %d minutes", names, DEFAULT_MINUTES)
        self._watched: dict[str, _Watched] = {}
        self._asked = 0.0
        self._full_until = -math.inf
        self._refused_since: float | None = None
        self._has_taken = False

    @property
    def room(self) -> int:
        """More than any sweep has, until Slurm refuses a job."""
        return 0 if time.monotonic() < self._full_until else 1000

    def adopt(self, commands: Sequence[JobCommand]) -> list[str]:
        """Follow the jobs that are in the queue, unless they wait for a job that is not; their ids."""
        queued, left = still_queued(commands), {c.job for c in commands}
        self._name_strangers(left)
        for command in commands:  # each after those it needs
            needs = left.intersection(command.needs)
            if command in queued and needs <= self._watched.keys():
                self._watched[command.job] = _Watched(command, queued[command], waits=bool(needs))
                self._has_taken = True
        return list(self._watched)

    def _name_strangers(self, known: Container[str]) -> None:
        """Warn of this sweep's jobs in the queue that no cell of the present grid waits for."""
        folder = self._directory.parent
        others = [JobCommand(folder, p.stem, "") for p in (folder / "jobs").glob("*.slurm") if p.stem not in known]
        with suppress(ClusterError):  # only a warning depends on the answer
            if found := still_queued(others):
                logger.warning(
                    "%d jobs in Slurm's queue are of an earlier grid, and no cell waits for them (to end them: %s)",
                    len(found), scancel_words(found.values()),
                )  # fmt: skip

    def start(self, commands: Sequence[JobCommand]) -> list[str]:
        """Submit jobs, each after those it needs; the ids of those that Slurm took."""
        arrays: dict[tuple[str, ...], list[JobCommand]] = {}
        for command in commands:
            arrays.setdefault((command.stage, *command.needs), []).append(command)
        started: list[str] = []
        began = time.monotonic()
        for mine in arrays.values():
            started += self._submit(mine)
            if time.monotonic() - began > SUBMIT_SECONDS:
                break
        return started

    def _submit(self, commands: Sequence[JobCommand]) -> list[str]:
        """Submit jobs of the same stage and needs as one array, or as many of them as the queue has room for."""
        stage, needs = commands[0].stage, commands[0].needs
        states = {need: replace(commands[0], job=need).state.state for need in needs}
        if not self.room or "failed" in states.values():  # `ended` will report the failure
            return []
        waits = [need for need in needs if states[need] != "done"]  # Slurm forgets a job soon after its end
        if not self._watched.keys() >= set(waits):  # a needed job could not be submitted
            return []
        after = [self._watched[need].slurm_id for need in waits]
        executor = make_executor(self._directory, stage, self._resources, after)
        for command in commands:
            command.slurm_id.unlink(missing_ok=True)  # of an earlier submission
            command.write(command.state.submitted())
        try:
            with outside_job(), executor.batch():
                submitted = [executor.submit(JobTask(command, command.state.submission)) for command in commands]
            ids = [job.job_id for job in submitted]
        except Exception as error:  # submitit and sbatch have kinds of their own
            if len(commands) > 1 and _LIMIT.search(str(error)) and not _NO_ANSWER.search(str(error)):
                middle = len(commands) // 2
                return self._submit(commands[:middle]) + self._submit(commands[middle:])
            return self._wait(stage, error)
        for command, slurm_id in zip(commands, ids, strict=True):
            command.slurm_id.write_text(f"{slurm_id}\n")
            self._watched[command.job] = _Watched(command, slurm_id, waits=bool(after))
        self._has_taken, self._refused_since = True, None
        waiting = f", after {' '.join(after)}" if after else ""
        logger.info("%s: %d jobs submitted as %s%s", stage, len(commands), ids[0].partition("_")[0], waiting)
        return [command.job for command in commands]

    def _wait(self, stage: str, error: Exception) -> list[str]:
        """Submit no job now; ClusterError if Slurm will hardly take one later."""
        now = time.monotonic()
        self._refused_since = now if self._refused_since is None else self._refused_since
        lasts = not self._watched and now - self._refused_since > REFUSED_SECONDS
        # a controller that does not answer may be restarting, and a queue that took jobs of ours may have room again
        passes = _NO_ANSWER.search(str(error)) or (self._has_taken and _LIMIT.search(str(error)))
        if lasts or not passes:
            raise ClusterError(f"sbatch refused the jobs of {stage}: {brief(error)}") from error
        logger.info("Slurm takes no more jobs now (%s); the others later", brief(error))
        self._full_until = time.monotonic() + FULL_SECONDS
        return []

    def withdraw(self, commands: Sequence[JobCommand]) -> None:
        """Take back jobs that wait for one that failed. Their submissions no longer count, so one ends at once."""
        for command in commands:
            command.write(command.state.renewed())
            command.slurm_id.unlink(missing_ok=True)
        cancel_waiting([self._watched.pop(c.job).slurm_id for c in commands if c.job in self._watched])

    def ended(self) -> list[str]:
        """Ids of the jobs that have ended since the last call."""
        ended = [job for job, entry in self._watched.items() if entry.command.state.state in ("done", "failed")]
        ended += [job for job in self._gone() if job not in ended]
        for job in ended:
            del self._watched[job]
        if ended:
            self._full_until = -math.inf
        return ended

    def stop(self) -> str:
        """Leave the jobs in the queue, and say so."""
        if not self._watched:
            return ""
        words = scancel_words(entry.slurm_id for entry in self._watched.values())
        return f"; {len(self._watched)} jobs stay in Slurm's queue (to end them: {words})"

    def _gone(self) -> list[str]:
        """Jobs that left the queue before they wrote an end; writes that they failed, or wait to be submitted."""
        if time.monotonic() - self._asked < SQUEUE_SECONDS:
            return []
        self._asked = time.monotonic()
        listed = queued_jobs()
        found = []
        for job, entry in self._watched.items():
            entry.missed = 0 if listed is None or entry.slurm_id in listed else entry.missed + 1
            state = entry.command.state
            entry.waits &= state.state != "running"
            if entry.missed < MISSES or state.state in ("done", "failed"):
                continue
            if any(need in self._watched for need in entry.command.needs):
                entry.waits = False  # cancelled itself, or dropped for a needed job, which is then reported
            elif entry.waits and state.state == "queued":
                # Slurm dropped it, because a needed job is done but did not end well for Slurm
                entry.command.write(replace(state, submission=""))
                found.append(job)
            else:
                entry.command.write(state.lost(_LOST.format(log=state.log)))
                found.append(job)
        return found


@dataclass
class _Watched:
    """A job in Slurm's queue; how many answers of squeue in a row lacked it; whether it waits for other jobs."""

    command: JobCommand
    slurm_id: str
    missed: int = 0
    waits: bool = False


def still_queued(commands: Sequence[JobCommand]) -> dict[JobCommand, str]:
    """Jobs that wait or run in Slurm's queue → their Slurm ids; ClusterError if Slurm does not answer."""
    waiting = [c for c in commands if c.slurm_id.exists() and c.state.submission]
    # a job that wrote its end is leaving the queue, and may be started again
    ids = {c: c.slurm_id.read_text().strip() for c in waiting if c.state.state in ("queued", "running")}
    listed: set[str] | None = queued_jobs() if ids else set()
    if listed is None:
        raise ClusterError(
            f"squeue: expected an answer whether {len(ids)} jobs of this sweep are in Slurm's queue, got none: they "
            "would be started twice; try again where squeue answers, or, if they are gone, remove "
            f"{next(iter(ids)).slurm_id.parent}/*.slurm"
        )
    return {command: slurm_id for command, slurm_id in ids.items() if slurm_id in listed}


def scancel_words(slurm_ids: Iterable[str]) -> str:
    """The command that ends these jobs, with the whole of their arrays."""
    return "scancel " + " ".join(sorted({slurm_id.partition("_")[0] for slurm_id in slurm_ids}))
