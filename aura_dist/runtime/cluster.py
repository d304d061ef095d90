"""Dask workers for scoring: threads of this process, or processes of this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aura_dist.errors import ConfigError

if TYPE_CHECKING:
    from distributed import Client

KINDS = ("threads", "processes")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_settings(kind: str, memory_limit: str) -> int:
    """The memory limit in bytes; ConfigError as `dask_client` raises it, before any worker is started."""
    if kind not in KINDS:
        raise ConfigError(f"--dask: expected one of {', '.join(KINDS)}, got {kind!r}")
    from dask.utils import parse_bytes

    try:
        return int(parse_bytes(memory_limit))
    except ValueError as error:
        raise ConfigError(f"--memory-limit: expected a size such as 4GB, got {memory_limit!r}") from error


@contextmanager
def dask_client(kind: str, num_workers: int | None, memory_limit: str) -> "Iterator[Client]":
    """A client of a local cluster: `threads` share this process, `processes` have one thread each.

    Parameters
    ----------
    kind
        `threads` or `processes`.
    num_workers
        Threads or processes; by default as many as cores.
    memory_limit
        Of each worker, as Dask reads it: `4GB`, `500MiB`.

    Raises
    ------
    ConfigError
        `kind` is neither, or `memory_limit` is not a size.
    """
    limit = check_settings(kind, memory_limit)
    from distributed import Client, LocalCluster

    count = num_workers or available_cores()
    workers, threads = (1, count) if kind == "threads" else (count, 1)
    with (
        LocalCluster(
            processes=kind == "processes",
            memory_limit=limit,
            dashboard_address=None,
            silence_logs=logging.ERROR,
            n_workers=workers,
            threads_per_worker=threads,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
