"""Jobs through Slurm, submitted as arrays by submitit. A job keeps its own state file, so that it needs no driver."""

import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
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
_LOST = "the Slurm job is gone without a word: cancelled, killed or out of memory; see {log} and `sacct`"


class SlurmLauncher:
    """Submits jobs, one array a stage, and follows them.

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

    def __init__(self, directory: Path, resources: Mapping[str, Any]) -> None:
        if shutil.which("sbatch") is None:
            raise ClusterError("--launcher slurm: expected Slurm's sbatch on this machine, found none; use local")
        self._directory = directory
        # all of them now: what is wrong with the last stage's shows before the first is run
        self._executors = {stage: make_executor(directory / "slurm", stage, resources) for stage in STAGES}
        self._watched: dict[str, _Watched] = {}
        self._asked = 0.0

    @property
    def room(self) -> int:
        """Jobs that can be submitted now: Slurm's queue holds any number; `slurm_array_parallelism` limits it."""
        return 1000

    def adopt(self, commands: Sequence[JobCommand]) -> list[str]:
        """Jobs of an earlier run of the sweep that are still in the queue."""
        ids = {c: self._id_path(c).read_text().strip() for c in commands if self._id_path(c).exists()}
        listed: set[str] | None = queued_jobs() if ids else set()
        if listed is None:
            raise ClusterError(
                "squeue: expected the jobs in the queue, got no answer; try again later: a job that is still there "
                "would be started twice"
            )
        for command, slurm_id in ids.items():  # one that has said its end leaves the queue, and may be tried again
            if slurm_id in listed and command.state.state in ("queued", "running"):
                self._watched[command.job] = _Watched(command, slurm_id)
        return list(self._watched)

    def start(self, commands: Sequence[JobCommand]) -> None:
        for stage in dict.fromkeys(command.stage for command in commands):
            mine = [command for command in commands if command.stage == stage]
            executor = self._executors[stage]
            for command in mine:
                command.write(command.state.submitted())
            try:
                with outside_job(), executor.batch():
                    submitted = [executor.submit(JobTask(command)) for command in mine]
                ids = [job.job_id for job in submitted]
            except Exception as error:  # of submitit's and of sbatch's own kinds
                raise ClusterError(f"sbatch refused the jobs of {stage}: {brief(error)}") from error
            for command, slurm_id in zip(mine, ids, strict=True):
                self._id_path(command).write_text(f"{slurm_id}\n")
                self._watched[command.job] = _Watched(command, slurm_id)
            logger.info("%s: %d jobs submitted as %s", stage, len(mine), ids[0].partition("_")[0])

    def ended(self) -> list[str]:
        """Names of the jobs that have ended since the last call."""
        ended = [job for job, entry in self._watched.items() if entry.command.state.state in ("done", "failed")]
        ended += [job for job in self._gone() if job not in ended]
        for job in ended:
            del self._watched[job]
        return ended

    def stop(self) -> str:
        """Leave the jobs in the queue."""
        if not self._watched:
            return ""
        arrays = sorted({entry.slurm_id.partition("_")[0] for entry in self._watched.values()})
        return f"; {len(self._watched)} jobs stay in Slurm's queue (to end them: scancel {' '.join(arrays)})"

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
            if entry.missed >= MISSES and state.state not in ("done", "failed"):
                entry.command.write(state.lost(_LOST.format(log=state.log)))
                found.append(job)
        return found

    def _id_path(self, command: JobCommand) -> Path:
        return command.config.with_suffix(".slurm")


@dataclass
class _Watched:
    """A job in Slurm's queue, and how many answers of squeue in a row lacked it."""

    command: JobCommand
    slurm_id: str
    missed: int = 0


class JobTask:
    """What submitit runs within a Slurm job, on every task of its step; task 0 keeps the state.

    The stage is a process of its own on each task, and forms its ranks from Slurm's variables. Slurm's warning
    reaches it too; it ends between two batches, and submitit queues the job again.
    """

    def __init__(self, command: JobCommand) -> None:
        self.command = command
        self._process: subprocess.Popen[str] | None = None

    def __call__(self) -> int:
        leads = os.environ.get("SLURM_PROCID", "0") == "0"
        if leads:
            self.command.begin()
        with self.command.open_log() as log:
            self._process = self.command.start(log)
            before = signal.signal(signal.SIGTERM, self._forward)
            try:
                code = self._process.wait()
            finally:
                signal.signal(signal.SIGTERM, before)
        if leads:
            self.command.end(code)
        return code

    def _forward(self, number: int, frame: FrameType | None) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def checkpoint(self) -> Any:
        """submitit's call at Slurm's warning: end the stage, and say with what the requeued job begins."""
        from submitit.helpers import DelayedSubmission

        code = 0 if self._process is None else _ended(self._process)
        interrupted = 128 + getattr(signal, f"SIG{WARNING}")
        self.command.end(code if code == 0 else interrupted)
        return None if code == 0 else DelayedSubmission(JobTask(self.command))


def _ended(process: "subprocess.Popen[str]") -> int:
    """Exit code of a process after the warning; not through `wait`, whose lock the interrupted call holds."""
    try:
        os.kill(process.pid, getattr(signal, f"SIG{WARNING}"))
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    except (ProcessLookupError, ChildProcessError):  # waited for already
        return 1 if process.returncode is None else process.returncode
    assert found is not None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
