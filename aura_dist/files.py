"""Files that are whole at any time, and a directory that one process uses at a time."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aura_dist.errors import StoreError

logger = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; the new file replaces `path` if the context ends without an error.

    So a reader sees the old file or the new one, never a part. The name holds this process's number, because several
    processes may write the same file. Raises OSError where the file cannot be written or renamed.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


def write_whole(path: Path, text: str) -> None:
    """Replace the file with this text in UTF-8, in one step; OSError if it cannot be written."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Hold the lock of a sweep's directory and yield its file descriptor; StoreError if another sweep holds it.

    A process that inherits the descriptor holds the lock until it ends.
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
