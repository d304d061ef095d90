"""What runs within a Slurm job of a sweep: a stage as a process, its state file, Slurm's warning."""

import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

from aura_dist.sweep.job_command import JobCommand
from aura_dist.sweep.slurm_executor import WARNING

# how long network file systems let a node answer from its cache what a name stands for (NFS: acdirmax)
CACHED_SECONDS = 60.0


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
        if not self._counts_soon():
            print(f"{self.command.job}: this submission does not count any more; nothing is done", flush=True)
            return 0
        if self.command.state.state == "done":  # the node failed as it ended, and Slurm queued it again
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

    def _counts_soon(self) -> bool:
        """Whether this submission counts; a node may show an older state file as long as it caches names."""
        end = time.monotonic() + CACHED_SECONDS
        while not self._counts() and time.monotonic() < end:
            time.sleep(1.0)
        return self._counts()

    def _counts(self) -> bool:
        return self.command.state.submission == self.submission

    def _forward(self, number: int, frame: FrameType | None) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def checkpoint(self) -> Any:
        """submitit's call at Slurm's warning: end the stage, and say with what the requeued job begins."""
        from submitit.helpers import DelayedSubmission

        interrupted = 128 + getattr(signal, f"SIG{WARNING}")
        code = interrupted if self._process is None else _ended(self._process)
        if not self._counts():
            return None
        if self.command.state.state == "running":
            self.command.end(code if code == 0 else interrupted)
        if code == 0:
            sys.exit()  # done as it was warned: submitit would let the job fail, and all that waits for it
        if self.command.state.state == "failed":  # time and again, without getting on
            return None
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
