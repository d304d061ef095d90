"""A sweep's job within Slurm: what it asks for, how submitit submits it, and what runs in it."""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from aura_dist.errors import ConfigError, MissingPackageError, brief
from aura_dist.sweep.jobs import JobCommand
from aura_dist.sweep.stage_specs import STAGE_SPECS

# Slurm's warning before the time is up. submitit would choose USR2, which kills the stages: Slurm signals them too.
WARNING = "USR1"
# no limit, because the job's state tells whether it still progresses
MAX_TIMEOUTS = 1000
# submitit would choose 5 minutes, and large models take longer to load
DEFAULT_MINUTES = 60
# how long a node of a network file system may show an older file under a name (NFS: acdirmax)
CACHED_SECONDS = 60.0
# other names for a job's number of tasks, which would win over submitit's own
_COUNTS = {"slurm_nodes", "slurm_tasks_per_node", "slurm_ntasks_per_node"}
# since Slurm 22.05 a step has one core a task unless this variable is set, however many the job has
_ALL_CORES = 'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi'


def stage_resources(resources: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The parameters of one stage's jobs; jobs of a stage without ranks are single processes."""
    own = resources.get(stage) or {}
    if not isinstance(own, Mapping):
        raise ConfigError(f"resources: {stage}: expected keys and values, got {own!r}")
    found = {**{name: value for name, value in resources.items() if name not in STAGE_SPECS}, **own}
    if "slurm_time" in found:  # submitit reads it as a number when the time is up
        raise ConfigError(f"resources: expected timeout_min (minutes), got slurm_time {found['slurm_time']!r}")
    if STAGE_SPECS[stage].ranked:
        return found
    return {**{name: v for name, v in found.items() if name not in _COUNTS}, "nodes": 1, "tasks_per_node": 1}


def planned_launch(resources: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """How Slurm would start a stage's job, as flags of `plan`."""
    asked = {name.removeprefix("slurm_"): value for name, value in stage_resources(resources, stage).items()}
    tasks = asked.get("tasks_per_node", asked.get("ntasks_per_node", 1))
    counts = [asked.get("nodes", 1), tasks]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ConfigError(f"resources: nodes, tasks_per_node: expected integers of at least 1, got {counts}")
    gpu = any(("gpu" in name or name == "gres") and value for name, value in asked.items())
    return {"world_size": math.prod(counts), **({"device": "cuda"} if gpu else {})}


def make_executor(folder: Path, stage: str, resources: Mapping[str, Any], after: Sequence[str] = ()) -> Any:
    """submitit's executor for jobs of one stage; ConfigError for a parameter that it does not know.

    The jobs wait until the Slurm jobs `after` have ended well, and leave the queue if one of those has not. A
    dependency among `resources` is for jobs that wait for no other job of the sweep.
    """
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = WARNING  # submitit reads it when imported, here and in the job
    try:
        import submitit
    except ImportError as error:
        raise MissingPackageError("--launcher slurm", "submitit", "slurm") from error
    parameters = {"name": f"aura-{stage}", "timeout_min": DEFAULT_MINUTES, **stage_resources(resources, stage)}
    python = parameters.pop("slurm_python", None)
    try:
        parameters["slurm_setup"] = [_ALL_CORES, *_lines(parameters.get("slurm_setup"))]
        if teardown := _lines(parameters.get("slurm_teardown")):  # the job's exit code must be the stage's
            parameters["slurm_teardown"] = ["code=$?", *teardown, "exit $code"]
        if isinstance(words := parameters.get("slurm_srun_args"), str):
            parameters["slurm_srun_args"] = shlex.split(words)
        if after:
            parameters.pop("slurm_dependency", None)
            parameters["slurm_additional_parameters"] = {
                **dict(parameters.get("slurm_additional_parameters") or {}),
                "dependency": f"afterok:{':'.join(after)}",
                "kill-on-invalid-dep": "yes",
            }
        executor = submitit.AutoExecutor(
            folder=folder, cluster="slurm", slurm_max_num_timeout=MAX_TIMEOUTS, slurm_python=python
        )
        executor.update_parameters(**parameters)
    except (ValueError, TypeError, NameError, RuntimeError, AssertionError) as error:  # the last for a wrong type
        raise ConfigError(f"resources of {stage}: {brief(error)}") from error
    return executor


def _lines(given: Any) -> list[str]:
    """Shell commands given as one text or several; TypeError for anything else."""
    found = [given] if isinstance(given, str) else list(given or [])
    if not all(isinstance(line, str) for line in found):
        raise TypeError(f"expected shell commands, got {given!r}")
    return found


@contextmanager
def outside_job() -> Iterator[None]:
    """Remove the variables of the Slurm job that this process may run in, because submitted jobs would inherit them.

    For example every `srun` fails where a driver's memory is set beside a job's own memory per core.
    """
    inside = "SLURM_JOB_ID" in os.environ
    names = [n for n in os.environ if inside and n.startswith(("SLURM_", "SRUN_")) and n != "SLURM_CONF"]
    inherited = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(inherited)


class JobTask:
    """What submitit runs in a Slurm job, on every task of its step; task 0 writes the state file.

    Each task runs the stage as a process of its own, which takes its rank from Slurm's variables. Slurm's warning
    reaches the stage too: it ends between two batches, and submitit queues the job again.

    A driver that was killed while it submitted does not know its jobs, and the next driver submits them again. So
    only the submission that the state file names runs and writes the state.
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
        if self.command.state.state == "done":  # the node failed as the job ended, and Slurm queued it again
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
            sys.exit(code if code > 0 else 128 - code)  # so that Slurm does not start what waits for this job
        return code

    def _counts_soon(self) -> bool:
        """Whether this submission counts; waits as long as a node may show an older state file."""
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
        """End the stage at Slurm's warning, when submitit calls this; what the job runs when it is queued again."""
        from submitit.helpers import DelayedSubmission

        interrupted = 128 + getattr(signal, f"SIG{WARNING}")
        code = interrupted if self._process is None else _ended(self._process)
        if not self._counts():
            return None
        if self.command.state.state == "running":
            self.command.end(code if code == 0 else interrupted)
        if code == 0:
            sys.exit()  # done as the warning came: submitit would let the job fail, and all that waits for it
        if self.command.state.state == "failed":  # interrupted too often without progress
            return None
        return DelayedSubmission(JobTask(self.command, self.submission))


def _own_id() -> str:
    """The id of the Slurm job that this process is in, as squeue writes it."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def _ended(process: "subprocess.Popen[str]") -> int:
    """Exit code of a process after the warning; not by `wait`, because the interrupted call holds its lock."""
    try:
        os.kill(process.pid, getattr(signal, f"SIG{WARNING}"))
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    except (ProcessLookupError, ChildProcessError):  # waited for already
        return 1 if process.returncode is None else process.returncode
    assert found is not None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
