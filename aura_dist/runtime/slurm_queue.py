"""What is in Slurm's queue. It is asked of `squeue`: many sites lack Slurm's accounting, and so `sacct`."""

import getpass
import logging
import subprocess

logger = logging.getLogger(__name__)

# A requeued or ending job may be missing from one answer.
MISSES = 2


def queued_jobs() -> set[str] | None:
    """Ids of this user's jobs in the queue, running ones too, array tasks one by one; None if Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("squeue: %s", error)
        return None
    return set(done.stdout.split())
