"""What is in Slurm's queue. It is asked of `squeue`: many sites lack Slurm's accounting, and so `sacct`."""

import logging
import os
import subprocess
from collections.abc import Sequence

logger = logging.getLogger(__name__)

# A requeued or ending job may be missing from one answer.
MISSES = 2


def queued_jobs() -> set[str] | None:
    """Ids of this user's jobs in the queue, running ones too, array tasks one by one; None if Slurm does not answer.

    A job that squeue leaves out counts as gone. So it is asked for hidden partitions too, and without the filters and
    formats that users set for themselves; and by the user's number: not all that a container runs as have a name.
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
    """Take jobs that wait out of the queue, as far as Slurm answers: they hold places that others may need."""
    for start in range(0, len(slurm_ids), 500):
        try:
            subprocess.run(
                ["scancel", "--state=PENDING", *slurm_ids[start : start + 500]],
                capture_output=True, timeout=60, check=False,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            logger.debug("scancel: %s", error)
