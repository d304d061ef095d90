"""Dask workers as Slurm jobs. The one module that uses private names of dask-jobqueue and of distributed's SpecCluster.

A refused submission is an error of the command, and a job that ends before the work does is submitted again. Dask does
neither: it forgets a lost worker's job only where worker and job share their name (one process a job), forgets no job
whose worker never came, and submits again only at the next change of scale; `cluster.adapt` ignores refusals of
sbatch. So Slurm itself is asked which jobs there are.

Private names, seen with dask-jobqueue 0.9 and distributed 2026.8: `SLURMJob.job_id_regexp` and `job_id`, the job's
number; `cluster._correct_state`, submits the jobs of `worker_spec` that are lacking; `cluster.worker_spec`,
`cluster.workers` and `new_worker_spec`, the jobs by name; `scheduler.stimulus_cancel`, cancels tasks of all clients.
"""

import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from typing import Any

from aura_dist.errors import ClusterError, MissingPackageError, brief
from aura_dist.ranks.process import KEEP_FREED_MEMORY
from aura_dist.ranks.slurm_queue import MISSES, queued_jobs

logger = logging.getLogger(__name__)

SLURM_JOBS = 2
LOOK_SECONDS = 20.0
# After so many submissions in a row from which no worker came, no more are made.
TRIES = 5
# Some sites make sbatch print more, before its own line or instead of it; Dask takes the first digits for the number.
JOB_ID = r"(?m)(?:Submitted batch job |^)(?P<job_id>\d+)(?=;|\s*$| on cluster )"
# Jobs do not get `cluster.SETTINGS`.
_ENVIRONMENT = {**KEEP_FREED_MEMORY, "DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE": "False"}


@contextmanager
def slurm_cluster(num_workers: int | None, limit: int, options: Mapping[Any, Any]) -> Iterator[Any]:
    """A cluster of Slurm jobs: by default one core, `--memory-limit` and dask-jobqueue's half hour each.

    MissingPackageError if dask-jobqueue is not installed; ClusterError if Slurm is not on this machine, refuses the
    jobs, or ends them again and again before the work is done.
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
        cluster.sync(_submit_lacking, cluster, jobs)
        with _jobs_kept(cluster, jobs):
            yield cluster
    finally:
        _close(cluster)


def _prologue(options: Mapping[Any, Any]) -> list[str]:
    """Lines of the job script before the worker starts: ours, then the user's or, without them, Dask's own."""
    import dask

    given = options.get("job_script_prologue")
    if given is None:
        names = ("jobqueue.slurm.job-script-prologue", "jobqueue.slurm.env-extra")
        given = next(filter(None, (dask.config.get(name, None) for name in names)), [])
    lines = [given] if isinstance(given, str) else list(given)
    return [*(f"export {name}={value}" for name, value in _ENVIRONMENT.items()), *lines]


def _close(cluster: Any) -> None:
    """End the cluster and its jobs; a failure is a warning, so that it does not hide the error that ends the work."""
    try:
        cluster.close()
    except Exception as error:
        logger.warning("slurm: the cluster could not be closed: %s", brief(error))


async def _submit_lacking(cluster: Any, num_jobs: int) -> None:
    """Submit the jobs that are lacking; RuntimeError where sbatch refuses, which `cluster.scale` would ignore."""
    while len(cluster.worker_spec) < num_jobs:
        cluster.worker_spec.update(cluster.new_worker_spec())
    try:
        await cluster._correct_state()
    finally:
        for job in cluster.workers.values():
            if job.status.name == "created":  # refused: otherwise the cluster would not close
                job.status = type(job.status).failed


@contextmanager
def _jobs_kept(cluster: Any, num_jobs: int) -> Iterator[None]:
    """Context in which `num_jobs` jobs are kept in Slurm's queue.

    ClusterError, in place of the body's, if no job is left and no worker came when they were submitted again.
    """
    keeper = _Keeper(cluster, num_jobs)
    thread = threading.Thread(target=keeper.watch, name="slurm-jobs", daemon=True)
    thread.start()
    try:
        yield
    except ClusterError as error:
        if keeper.error is not None:
            raise keeper.error from error
        raise
    finally:
        keeper.ended.set()
        thread.join()


class _Keeper:
    """Looks at Slurm's queue in a thread of its own; changes the cluster within the cluster's event loop."""

    def __init__(self, cluster: Any, num_jobs: int) -> None:
        self.ended = threading.Event()
        self.error: ClusterError | None = None
        self._cluster, self._num_jobs = cluster, num_jobs
        self._missed: dict[str, int] = {}  # by job id: answers of squeue in a row that lacked it
        self._workers: set[str] = set()
        self._tries = 0
        self._refusal = ""

    def watch(self) -> None:
        while not self.ended.wait(LOOK_SECONDS):
            queue = queued_jobs()
            if queue is None:
                continue
            try:
                self._cluster.sync(self._look, queue)
            except Exception as error:  # the jobs that there are may still finish the work
                logger.warning("slurm: jobs that ended could not be replaced: %s", brief(error))

    async def _look(self, queue: set[str]) -> None:
        if self.error is None:
            if set(self._cluster.scheduler.workers) - self._workers:  # a new one has come
                self._tries = 0
            self._workers = set(self._cluster.scheduler.workers)
            await self._forget_ended(queue)
            num_lacking = self._num_jobs - len(self._cluster.workers)
            if num_lacking and self._tries < TRIES:
                await self._submit(num_lacking)
            elif num_lacking == self._num_jobs:
                self.error = ClusterError(
                    f"--dask slurm: expected jobs that last until the work is done; all have ended, and {TRIES} "
                    f"submissions in a row gave no worker ({self._refusal or 'see the output of the jobs'}); fix "
                    "the cause and run `score` again: it does the rest"
                )
        if self.error is not None:  # at every look: tasks may have been handed in since
            self._give_up()

    async def _forget_ended(self, queue: set[str]) -> None:
        """Forget jobs that were refused or have left the queue, but none that has a worker, whatever squeue lists.

        The cluster may forget jobs too, at each `await` here.
        """
        at_work = {worker.name for worker in self._cluster.scheduler.workers.values()}
        jobs = self._cluster.workers
        lacked = [j for name, j in jobs.items() if j.job_id not in queue and not self._names(name) & at_work]
        self._missed = {job.job_id: self._missed.get(job.job_id, 0) + 1 for job in lacked}
        for name in [name for name, j in jobs.items() if j.job_id is None or self._missed.get(j.job_id, 0) >= MISSES]:
            job = jobs.pop(name, None)
            if job is not None:
                await job.close()

    def _names(self, job: str) -> set[str]:
        """The names of a job's workers, as dask-jobqueue makes them."""
        return {f"{job}{suffix}" for suffix in self._cluster.worker_spec[job].get("group", [""])}

    async def _submit(self, num_lacking: int) -> None:
        self._tries += 1
        logger.warning(
            "slurm: %d of %d jobs have ended before the work: submitting as many again (try %d of %d)",
            num_lacking, self._num_jobs, self._tries, TRIES,
        )  # fmt: skip
        self._refusal = ""
        try:
            await _submit_lacking(self._cluster, self._num_jobs)
        except (OSError, RuntimeError, ValueError) as error:
            self._refusal = brief(error)
            logger.warning("slurm: refused: %s", self._refusal)

    def _give_up(self) -> None:
        """Cancel all tasks, so that nobody waits for them."""
        scheduler = self._cluster.scheduler
        for client, state in list(scheduler.clients.items()):
            keys = [task.key for task in state.wants_what]
            scheduler.stimulus_cancel(keys, client, force=True, reason="no-workers", msg="no Slurm job is left")
