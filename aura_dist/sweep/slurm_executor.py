"""submitit's executors: what a sweep's jobs ask of Slurm, and the environment that they are submitted from."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aura_dist.errors import ConfigError, MissingPackageError, brief
from aura_dist.sweep.grid import STAGES

# Slurm's warning; submitit's own choice, USR2, would kill the stages, which Slurm signals too
WARNING = "USR1"
# any number of time limits is well as long as the job gets on, which its state tells
MAX_TIMEOUTS = 1000
# submitit's own choice, 5 minutes, is less than large models take to load
DEFAULT_MINUTES = 60
_RANKED = ("collect", "evaluate")
# other words for how many tasks a job has; submitit lets its own win
_COUNTS = {"slurm_nodes", "slurm_tasks_per_node", "slurm_ntasks_per_node"}
# since Slurm 22.05 a step has one core a task unless it is told, whatever the job has
_ALL_CORES = 'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi'


def stage_resources(resources: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The parameters of one stage's jobs; `score` and `fit` are single processes."""
    own = resources.get(stage) or {}
    if not isinstance(own, Mapping):
        raise ConfigError(f"resources: {stage}: expected keys and values, got {own!r}")
    found = {**{name: value for name, value in resources.items() if name not in STAGES}, **own}
    if "slurm_time" in found:  # submitit reads it again as a number when the time is up
        raise ConfigError(f"resources: expected timeout_min (minutes), got slurm_time {found['slurm_time']!r}")
    if stage in _RANKED:
        return found
    return {**{name: v for name, v in found.items() if name not in _COUNTS}, "nodes": 1, "tasks_per_node": 1}


def make_executor(folder: Path, stage: str, resources: Mapping[str, Any], after: Sequence[str] = ()) -> Any:
    """submitit's executor for jobs of one stage; ConfigError for a parameter that it does not know.

    They wait until the Slurm jobs `after` have ended well, and leave the queue once one of those has not. A dependency
    among `resources` is for jobs that wait for no other job of the sweep.
    """
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = WARNING  # read when submitit is imported, here and in the job
    try:
        import submitit
    except ImportError as error:
        raise MissingPackageError("--launcher slurm", "submitit", "slurm") from error
    parameters = {"name": f"aura-{stage}", "timeout_min": DEFAULT_MINUTES, **stage_resources(resources, stage)}
    python = parameters.pop("slurm_python", None)
    try:
        parameters["slurm_setup"] = [_ALL_CORES, *_lines(parameters.get("slurm_setup"))]
        if teardown := _lines(parameters.get("slurm_teardown")):  # its own exit code must not stand for the stage's
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
    except (ValueError, TypeError, NameError, RuntimeError, AssertionError) as error:  # the last of types
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
    """Within, the variables of the Slurm job that this process may run in are gone: submitted jobs would inherit them.

    A driver's memory beside a job's own memory per core, for one, lets every `srun` fail.
    """
    inside = "SLURM_JOB_ID" in os.environ
    names = [n for n in os.environ if inside and n.startswith(("SLURM_", "SRUN_")) and n != "SLURM_CONF"]
    inherited = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(inherited)
