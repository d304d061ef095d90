"""One process at a time in a directory."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aura_dist.errors import StoreError

logger = logging.getLogger(__name__)


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Within, no other sweep runs in the directory; gives the lock's descriptor. StoreError if one does.

    A process that inherits the descriptor holds the lock as long as it lives.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a")
    except OSError as error:
        raise StoreError(f"--out {str(out)!r} cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"--out {str(out)!r}: expected no other sweep in it, got one that runs, or a job that it left; "
                "wait for it, or end it"
            ) from error
        except OSError as error:  # as of Lustre mounted without flock
            logger.warning("--out %s cannot be locked (%s): take care that no second sweep runs in it", out, error)
        yield file.fileno()
