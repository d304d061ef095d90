"""Dask's Slurm jobs, kept at their number: one that ends before the work does is submitted again.

Dask forgets a lost worker's job only if it is named as the worker is (one process a job), never a job whose worker
did not come, and submits again only at the next change of scale. `cluster.adapt` goes on in silence where sbatch
refuses. So Slurm itself is asked which jobs there are.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aura_dist.errors import ClusterError, brief
from aura_dist.ranks.slurm_queue import MISSES, queued_jobs

logger = logging.getLogger(__name__)

LOOK_SECONDS = 20.0
# Submissions in a row after which no worker came, before it is left at what there is.
TRIES = 5


async def submit_lacking(cluster: Any, num_jobs: int) -> None:
    """Submit the jobs that are lacking; RuntimeError of sbatch's. `cluster.scale` would not tell of one."""
    while len(cluster.worker_spec) < num_jobs:
        cluster.worker_spec.update(cluster.new_worker_spec())
    try:
        await cluster._correct_state()
    finally:
        for job in cluster.workers.values():
            if job.status.name == "created":  # refused: otherwise the cluster would not close
                job.status = type(job.status).failed


@contextmanager
def jobs_kept(cluster: Any, num_jobs: int) -> Iterator[None]:
    """Context in which so many jobs are kept in Slurm's queue.

    Raises
    ------
    ClusterError
        No job is left, and submitting them again gave no worker: instead of what the context ends with then.
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
            except Exception as error:  # the work may go on with the jobs that there are
                logger.warning("slurm: jobs that ended could not be seen to: %s", brief(error))

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
                    f"submissions in a row gave no worker ({self._refusal or 'see the output of the jobs'}); mend "
                    "that and run `score` again: it does the rest"
                )
        if self.error is not None:  # at every look: tasks may have been handed in since
            self._give_up()

    async def _forget_ended(self, queue: set[str]) -> None:
        """Forget jobs that were refused or are in the queue no more; one with a worker is at work, whatever is listed.

        The cluster forgets jobs too, between two steps of this one.
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
        """Names of a job's workers, as dask-jobqueue gives them."""
        return {f"{job}{suffix}" for suffix in self._cluster.worker_spec[job].get("group", [""])}

    async def _submit(self, num_lacking: int) -> None:
        self._tries += 1
        logger.warning(
            "slurm: %d of %d jobs have ended before the work: submitting as many again (try %d of %d)",
            num_lacking, self._num_jobs, self._tries, TRIES,
        )  # fmt: skip
        self._refusal = ""
        try:
            await submit_lacking(self._cluster, self._num_jobs)
        except (OSError, RuntimeError, ValueError) as error:
            self._refusal = brief(error)
            logger.warning("slurm: refused: %s", self._refusal)

    def _give_up(self) -> None:
        """Cancel all tasks: whoever waits for them waits no longer."""
        scheduler = self._cluster.scheduler
        for client, state in list(scheduler.clients.items()):
            keys = [task.key for task in state.wants_what]
            scheduler.stimulus_cancel(keys, client, force=True, reason="no-workers", msg="no Slurm job is left")
