"""Jobs through Slurm, submitted as arrays by submitit.

All jobs are submitted at once: Slurm holds each back until those that it needs have ended well (`afterok`), and each
keeps its own state file. So they need no driver, but for trying again what failed.
"""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from aura_dist.core.grid import STAGES
from aura_dist.errors import ClusterError, brief
from aura_dist.runtime.job_command import JobCommand
from aura_dist.runtime.slurm_executor import WARNING, make_executor, outside_job
from aura_dist.runtime.slurm_queue import MISSES, queued_jobs

logger = logging.getLogger(__name__)

SQUEUE_SECONDS = 5.0
# sbatch's words where a user, an account or the cluster has as many jobs as it may
_LIMIT = re.compile("submit limit|temporarily", re.IGNORECASE)
_LOST = "the Slurm job is gone without a word: cancelled, killed or out of memory; see {log} and `sacct`"


class SlurmLauncher:
    """Submits jobs, those of a stage that wait for the same jobs as one array, and follows them.

    Parameters
    ----------
    directory
        Of the sweep; Slurm's and submitit's own files go into its `slurm`.
    resources
        Parameters of submitit's AutoExecutor; a mapping under a stage's name is for that stage.

    Raises
    ------
    ClusterError, ConfigError
        There is no Slurm here, or a parameter is unknown.
    """

    poll_seconds = 1.0
    # Slurm holds back what waits for another job
    chains = True

    def __init__(self, directory: Path, resources: Mapping[str, Any]) -> None:
        if shutil.which("sbatch") is None:
            raise ClusterError("--launcher slurm: expected Slurm's sbatch on this machine, found none; use local")
        self._directory, self._resources = directory / "slurm", resources
        for stage in STAGES:  # what is wrong with the last stage's shows before the first is run
            make_executor(self._directory, stage, resources)
        self._watched: dict[str, _Watched] = {}
        self._asked = 0.0
        self._full = False

    @property
    def room(self) -> int:
        """Jobs that can be submitted now: any number, until Slurm says that it takes no more."""
        return 0 if self._full else 1000

    def adopt(self, commands: Sequence[JobCommand]) -> list[str]:
        """Jobs of an earlier run of the sweep that are in the queue, and wait there for no job that is not."""
        queued, left = still_queued(commands), {c.job for c in commands}
        for command in commands:  # each after those it needs
            if command in queued and all(need not in left or need in self._watched for need in command.needs):
                self._watched[command.job] = _Watched(command, queued[command])
        return list(self._watched)

    def start(self, commands: Sequence[JobCommand]) -> list[str]:
        """Submit jobs, each after those it needs; the names of those that are in the queue then."""
        arrays: dict[tuple[str, ...], list[JobCommand]] = {}
        for command in commands:
            arrays.setdefault((command.stage, *command.needs), []).append(command)
        return [job for mine in arrays.values() for job in self._submit(mine)]

    def _submit(self, commands: Sequence[JobCommand]) -> list[str]:
        """One array of jobs of the same stage and needs, or what of it the queue has room for."""
        if self._full:
            return []
        stage, needs = commands[0].stage, commands[0].needs
        after = [self._watched[need].slurm_id for need in needs if need in self._watched]
        executor = make_executor(self._directory, stage, self._resources, after)
        for command in commands:
            command.write(command.state.submitted())
        try:
            with outside_job(), executor.batch():
                submitted = [executor.submit(JobTask(command, command.state.submission)) for command in commands]
            ids = [job.job_id for job in submitted]
        except Exception as error:  # of submitit's and of sbatch's own kinds
            full = _LIMIT.search(str(error)) is not None
            if full and len(commands) > 1:  # there may be room for some of them
                middle = len(commands) // 2
                return self._submit(commands[:middle]) + self._submit(commands[middle:])
            if not (full and self._watched):
                raise ClusterError(f"sbatch refused the jobs of {stage}: {brief(error)}") from error
            logger.info("%s: Slurm takes no more jobs (%s); the others once some have ended", stage, brief(error))
            self._full = True
            return []
        for command, slurm_id in zip(commands, ids, strict=True):
            command.slurm_id.write_text(f"{slurm_id}\n")
            self._watched[command.job] = _Watched(command, slurm_id)
        waiting = f", after {' '.join(after)}" if after else ""
        logger.info("%s: %d jobs submitted as %s%s", stage, len(commands), ids[0].partition("_")[0], waiting)
        return [command.job for command in commands]

    def withdraw(self, commands: Sequence[JobCommand]) -> None:
        """Take back jobs that wait for one that failed: Slurm drops them; should one run, it does nothing."""
        for command in commands:
            self._watched.pop(command.job, None)
            command.write(command.state.renewed())

    def ended(self) -> list[str]:
        """Names of the jobs that have ended since the last call."""
        ended = [job for job, entry in self._watched.items() if entry.command.state.state in ("done", "failed")]
        ended += [job for job in self._gone() if job not in ended]
        for job in ended:
            del self._watched[job]
        self._full = self._full and not ended
        return ended

    def stop(self) -> str:
        """Leave the jobs in the queue."""
        if not self._watched:
            return ""
        words = scancel_words(entry.slurm_id for entry in self._watched.values())
        return f"; {len(self._watched)} jobs stay in Slurm's queue (to end them: {words})"

    def _gone(self) -> list[str]:
        """Jobs that left the queue without an end of their own; writes that they failed."""
        if time.monotonic() - self._asked < SQUEUE_SECONDS:
            return []
        self._asked = time.monotonic()
        listed = queued_jobs()
        found = []
        for job, entry in self._watched.items():
            entry.missed = 0 if listed is None or entry.slurm_id in listed else entry.missed + 1
            state = entry.command.state
            # while it waits for another, Slurm drops it only because of that one, which is then told itself
            waits = any(need in self._watched for need in entry.command.needs)
            if entry.missed >= MISSES and not waits and state.state not in ("done", "failed"):
                entry.command.write(state.lost(_LOST.format(log=state.log)))
                found.append(job)
        return found


@dataclass
class _Watched:
    """A job in Slurm's queue, and how many answers of squeue in a row lacked it."""

    command: JobCommand
    slurm_id: str
    missed: int = 0


def still_queued(commands: Sequence[JobCommand]) -> dict[JobCommand, str]:
    """Jobs that wait or run in Slurm's queue, with their numbers there; ClusterError if Slurm does not say."""
    waiting = [c for c in commands if c.slurm_id.exists() and c.state.submission]
    # one that has said its end leaves the queue, and may be tried again
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
    """The command that ends these jobs, their whole arrays."""
    return "scancel " + " ".join(sorted({slurm_id.partition("_")[0] for slurm_id in slurm_ids}))


class JobTask:
    """What submitit runs within a Slurm job, on every task of its step; task 0 keeps the state.

    The stage is a process of its own on each task, and forms its ranks from Slurm's variables. Slurm's warning
    reaches it too; it ends between two batches, and submitit queues the job again.

    A driver that was killed while it submitted knows nothing of its jobs, and the next one starts theirs anew: only
    the `submission` that the state names runs, and only it writes the state.
    """

    def __init__(self, command: JobCommand, submission: str) -> None:
        self.command = command
        self.submission = submission
        self._process: subprocess.Popen[str] | None = None

    def __call__(self) -> int:
        leads = os.environ.get("SLURM_PROCID", "0") == "0"
        if not self._counts():
            print(f"{self.command.job}: this submission does not count any more; nothing is done", flush=True)
            return 0
        if leads:
            self.command.slurm_id.write_text(f"{_own_id()}\n")
            self.command.begin()
        with self.command.open_log() as log:
            self._process = self.command.start(log)
            before = signal.signal(signal.SIGTERM, self._forward)
            try:
                code = self._process.wait()
            finally:
                signal.signal(signal.SIGTERM, before)
        if leads and self._counts():
            self.command.end(code)
        if leads and code:
            sys.exit(code if code > 0 else 128 - code)  # for Slurm: what waits for this job must not start
        return code

    def _counts(self) -> bool:
        return self.command.state.submission == self.submission

    def _forward(self, number: int, frame: FrameType | None) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def checkpoint(self) -> Any:
        """submitit's call at Slurm's warning: end the stage, and say with what the requeued job begins."""
        from submitit.helpers import DelayedSubmission

        code = 0 if self._process is None else _ended(self._process)
        interrupted = 128 + getattr(signal, f"SIG{WARNING}")
        if not self._counts():
            return None
        self.command.end(code if code == 0 else interrupted)
        if code == 0:
            sys.exit()  # done as it was warned: submitit would let the job fail, and all that waits for it
        return DelayedSubmission(JobTask(self.command, self.submission))


def _own_id() -> str:
    """The number of the job that this process is in, as squeue writes it."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def _ended(process: "subprocess.Popen[str]") -> int:
    """Exit code of a process after the warning; not through `wait`, whose lock the interrupted call holds."""
    try:
        os.kill(process.pid, getattr(signal, f"SIG{WARNING}"))
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    except (ProcessLookupError, ChildProcessError):  # waited for already
        return 1 if process.returncode is None else process.returncode
    assert found is not None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
