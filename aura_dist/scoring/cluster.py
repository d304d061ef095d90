"""Dask workers for scoring: threads of this process, processes of this machine, Slurm jobs, or a running cluster.

Workers never spill to disk: a task returns a few numbers, so a worker's memory holds only the work it is doing.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from aura_dist.errors import ClusterError, ConfigError, brief
from aura_dist.ranks.process import KEEP_FREED_MEMORY, available_cores
from aura_dist.scoring.slurm_workers import slurm_cluster
from aura_dist.units import parse_bytes

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

LOCAL_KINDS = ("threads", "processes")
SCHEMES = ("tcp://", "tls://")
CONNECT_SECONDS = 30
LOOPBACK = "127.0.0.1"
SETTINGS = {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    # A worker keeps a task's memory for the next one, so a worker that paused until it shrinks would wait for ever.
    "distributed.worker.memory.pause": False,
    # Slurm may end workers often without any fault of a task.
    "distributed.scheduler.allowed-failures": 10,
    **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in KEEP_FREED_MEMORY.items()},
}
# Run first in a worker's process: Ctrl-C reaches every process of a terminal, but this process ends its workers.
IGNORE_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


def check_settings(kind: str, memory_limit: str, flag: str = "--memory-limit") -> int:
    """The memory limit in bytes; ConfigError as `dask_client` raises it, before any worker is started."""
    if kind not in (*LOCAL_KINDS, "slurm") and not kind.startswith(SCHEMES):
        raise ConfigError(f"--dask: expected one of {', '.join(LOCAL_KINDS)}, slurm, tcp://HOST:PORT, got {kind!r}")
    limit = parse_bytes(memory_limit, flag, "4GB")
    if limit <= 0:
        raise ConfigError(f"{flag}: expected a size above 0, got {memory_limit!r}")
    return limit


def worker_shape(kind: str, num_workers: int | None, memory_limit: str, slurm: Mapping[Any, Any]) -> tuple[int, int]:
    """Memory in bytes and threads of one worker that `dask_client` starts; ConfigError if a setting is wrong."""
    limit = check_settings(kind, memory_limit)
    if slurm and kind != "slurm":
        raise ConfigError(f"--slurm: expected it with --dask slurm, got it with --dask {kind}; leave it out")
    if num_workers is not None and kind.startswith(SCHEMES):
        raise ConfigError(f"--num-workers: expected none, because the cluster runs already, got {num_workers}")
    if kind == "threads":
        return limit, num_workers or available_cores()
    if kind != "slurm":
        return limit, 1
    for name in ("cores", "processes"):
        value = slurm.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"--slurm: expected {name} to be an integer of at least 1, got {value!r}")
    if not isinstance(slurm.get("walltime", ""), str):
        raise ConfigError(f"--slurm: expected walltime in quotes, as '1:00:00', got the number {slurm['walltime']!r}")
    processes = int(slurm.get("processes", 1))
    memory = check_settings(kind, str(slurm["memory"]), "--slurm memory") if "memory" in slurm else limit
    return memory // processes, max(1, int(slurm.get("cores", 1)) // processes)


@contextmanager
def dask_client(
    kind: str, num_workers: int | None, memory_limit: str, slurm: Mapping[Any, Any] | None = None
) -> "Iterator[Client]":
    """A client of the cluster; a cluster that was started here ends with the context, one that ran before does not.

    `kind` is `threads` of this process; `processes` of this machine, one thread each; `slurm`, jobs through
    dask-jobqueue, with the options `slurm` of its `SLURMCluster`; or the address of a scheduler that runs,
    `tcp://HOST:PORT` or `tls://HOST:PORT`, with TLS as Dask's configuration says (`distributed.comm.tls`).
    `num_workers` are threads, processes or jobs, by default as many as cores, or two jobs. `memory_limit` is of each
    worker that is started.

    ConfigError if a setting is not one of these, ClusterError if workers cannot be started or the scheduler reached.
    """
    limit = check_settings(kind, memory_limit)
    import dask
    from distributed import Client

    with ExitStack() as stack:
        stack.enter_context(dask.config.set(SETTINGS))
        if kind == "processes":
            preload = [*dask.config.get("distributed.worker.preload"), IGNORE_INTERRUPTS]
            stack.enter_context(dask.config.set({"distributed.worker.preload": preload}))
        try:
            cluster: Any = kind
            if kind in LOCAL_KINDS:
                cluster = stack.enter_context(_local(kind, num_workers, limit))
            elif kind == "slurm":
                cluster = stack.enter_context(slurm_cluster(num_workers, limit, slurm or {}))
            client = stack.enter_context(Client(cluster, timeout=CONNECT_SECONDS))
        except (OSError, TimeoutError, RuntimeError, ValueError, TypeError) as error:
            raise ClusterError(f"--dask {kind}: expected a cluster that answers: {brief(error)}") from error
        if client.dashboard_link and find_spec("bokeh"):  # which draws the dashboard
            logger.info("dashboard: %s", _reachable(client.dashboard_link, client.scheduler.address))
        yield client


def _reachable(link: str, scheduler_address: str) -> str:
    """A dashboard's link; a scheduler within this process names an address at which it does not listen."""
    protocol, place = scheduler_address.split("://")
    return link.replace(place.partition("/")[0], LOOPBACK) if protocol == "inproc" else link


def _local(kind: str, num_workers: int | None, limit: int) -> Any:
    from distributed import LocalCluster

    count = num_workers or available_cores()
    workers, threads = (1, count) if kind == "threads" else (count, 1)
    return LocalCluster(
        processes=kind == "processes",
        memory_limit=limit,
        dashboard_address=f"{LOOPBACK}:0",  # None would be port 8787, another's maybe
        # a task's error reaches the user as it is, in one line
        silence_logs=logging.ERROR if logger.isEnabledFor(logging.DEBUG) else logging.CRITICAL,
        n_workers=workers,
        threads_per_worker=threads,
    )
