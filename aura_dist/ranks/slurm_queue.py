"""Slurm's queue, by `squeue`: many sites have no accounting, which `sacct` needs."""

import logging
import os
import subprocess
from collections.abc import Sequence

logger = logging.getLogger(__name__)

# A requeued or ending job may be missing from one answer.
MISSES = 2


def queued_jobs() -> set[str] | None:
    """Ids of this user's waiting and running jobs, array tasks one by one; None if Slurm does not answer.

    A job that squeue leaves out counts as gone. So squeue shows hidden partitions too, and no variable of the user's
    filters or formats its answer. The user is a number, because a user of a container may have no name.
    """
    command = ["squeue", "--all", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%i"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env)
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("squeue: %s", error)
        return None
    return set(done.stdout.split())


def cancel_waiting(slurm_ids: Sequence[str]) -> None:
    """Remove waiting jobs from the queue if Slurm answers, because other jobs may need their places."""
    for start in range(0, len(slurm_ids), 500):
        try:
            subprocess.run(
                ["scancel", "--state=PENDING", *slurm_ids[start : start + 500]],
                capture_output=True, timeout=60, check=False,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            logger.debug("scancel: %s", error)
