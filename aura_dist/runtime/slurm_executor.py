"""submitit's executors: what a sweep's jobs ask of Slurm, and the environment that they are submitted from."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aura_dist.core.grid import STAGES
from aura_dist.errors import ConfigError, brief

# Slurm's warning; submitit's own choice, USR2, would kill the stages, which Slurm signals too
WARNING = "USR1"
# a collection goes on where it was: any number of time limits is well
MAX_TIMEOUTS = 1000
_RANKED = ("collect", "evaluate")
# since Slurm 22.05 a step has one core a task unless it is told, whatever the job has
_ALL_CORES = 'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi'


def stage_resources(resources: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The parameters of one stage's jobs; `score` and `fit` are single processes."""
    own = resources.get(stage) or {}
    if not isinstance(own, Mapping):
        raise ConfigError(f"resources: {stage}: expected keys and values, got {own!r}")
    found = {**{name: value for name, value in resources.items() if name not in STAGES}, **own}
    return found if stage in _RANKED else {**found, "nodes": 1, "tasks_per_node": 1}


def make_executor(folder: Path, stage: str, resources: Mapping[str, Any], after: Sequence[str] = ()) -> Any:
    """submitit's executor for jobs of one stage; ConfigError for a parameter that it does not know.

    They wait until the Slurm jobs `after` have ended well, and leave the queue once one of those has not. A dependency
    among `resources` is for jobs that wait for no other job of the sweep.
    """
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = WARNING  # read when submitit is imported, here and in the job
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("--launcher slurm needs submitit: pip install 'aura-dist[slurm]'") from error
    parameters = {"name": f"aura-{stage}", **stage_resources(resources, stage)}
    setup = parameters.get("slurm_setup") or []
    parameters["slurm_setup"] = [_ALL_CORES, *([setup] if isinstance(setup, str) else setup)]
    teardown = parameters.get("slurm_teardown")
    if teardown:  # its own exit code must not stand for the stage's
        parameters["slurm_teardown"] = [
            "code=$?",
            *([teardown] if isinstance(teardown, str) else teardown),
            "exit $code",
        ]
    try:
        if after:
            parameters.pop("slurm_dependency", None)
            parameters["slurm_additional_parameters"] = {
                **dict(parameters.get("slurm_additional_parameters") or {}),
                "dependency": f"afterok:{':'.join(after)}",
                "kill-on-invalid-dep": "yes",
            }
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=MAX_TIMEOUTS)
        executor.update_parameters(**parameters)
    except (ValueError, TypeError, NameError, RuntimeError) as error:
        raise ConfigError(f"resources of {stage}: {brief(error)}") from error
    return executor


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
