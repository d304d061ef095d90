"""Dask workers as Slurm jobs: a refusal of theirs is an error of the command, and their number is kept."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from typing import Any

from aura_dist.errors import ClusterError, MissingPackageError, brief
from aura_dist.ranks.process import KEEP_FREED_MEMORY
from aura_dist.scoring.slurm_keeper import jobs_kept, submit_lacking

logger = logging.getLogger(__name__)

SLURM_JOBS = 2
# Sites let sbatch say more, before its own line or in its place; Dask takes the first digit for the job's number.
JOB_ID = r"(?m)(?:Submitted batch job |^)(?P<job_id>\d+)(?=;|\s*$| on cluster )"
# As in `cluster.SETTINGS`, which jobs do not get.
_ENVIRONMENT = {**KEEP_FREED_MEMORY, "DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE": "False"}


@contextmanager
def slurm_cluster(num_workers: int | None, limit: int, options: Mapping[Any, Any]) -> Iterator[Any]:
    """A cluster of Slurm jobs: by default one core, `--memory-limit` and dask-jobqueue's half hour each.

    Raises
    ------
    MissingPackageError
        dask-jobqueue is not installed.
    ClusterError
        Slurm is not on this machine, refuses the jobs, or ends them again and again before the work is done.
    """
    try:
        from dask_jobqueue.slurm import SLURMCluster, SLURMJob
    except ImportError as error:
        raise MissingPackageError("--dask slurm", "dask-jobqueue", "slurm") from error
    if shutil.which("sbatch") is None:
        raise ClusterError("--dask slurm: expected Slurm's sbatch on this machine, found none")
    defaults = {"cores": 1, "processes": 1, "memory": f"{limit}B"}
    made: dict[str, Any] = {**defaults, **options, "job_script_prologue": _prologue(options)}
    cluster = SLURMCluster(job_cls=type("SLURMJob", (SLURMJob,), {"job_id_regexp": JOB_ID}), **made)
    try:
        count = num_workers or SLURM_JOBS
        logger.info("slurm: asked for %d workers; the job script:\n%s", count, cluster.job_script())
        jobs = ceil(count / int(made["processes"]))
        cluster.sync(submit_lacking, cluster, jobs)
        with jobs_kept(cluster, jobs):
            yield cluster
    finally:
        _close(cluster)


def _prologue(options: Mapping[Any, Any]) -> list[str]:
    """Lines of the job script before the worker starts: ours, then the user's, else those of Dask's configuration."""
    import dask

    given = options.get("job_script_prologue")
    if given is None:
        names = ("jobqueue.slurm.job-script-prologue", "jobqueue.slurm.env-extra")
        given = next(filter(None, (dask.config.get(name, None) for name in names)), [])
    lines = [given] if isinstance(given, str) else list(given)
    return [*(f"export {name}={value}" for name, value in _ENVIRONMENT.items()), *lines]


def _close(cluster: Any) -> None:
    """End the cluster and its jobs; nothing that goes wrong then hides why it ends."""
    try:
        cluster.close()
    except Exception as error:
        logger.warning("slurm: the cluster could not be closed: %s", brief(error))
