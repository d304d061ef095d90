"""This process: its log, its memory, its cores, and the directories that it may write to."""

import ctypes
import logging
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path
from typing import Any

# glibc's mallopt(3)
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MAPPED_BYTES = 2**26
# `keep_freed_memory` for a process that is yet to start: Dask's own settings have workers return all memory at once
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**62), "MALLOC_MMAP_THRESHOLD_": str(_MAPPED_BYTES)}

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MEMORY = Path("/proc/meminfo")


def configure_logging(*, debug: bool = False) -> None:
    """Send the package's messages to standard error, one line each; call before torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch reports a lost connection with stack traces
    logger = logging.getLogger("aura_dist")
    logger.handlers[:] = [logging.StreamHandler()]
    logger.handlers[0].setFormatter(_format(""))
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    # DeepSpeed says this in every process without a GPU; our own message names the device
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Within the context an environment variable has this value, for a library that reads it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def server_key() -> str | None:
    """The key that servers of models ask for, from the variable that their clients share."""
    return os.environ.get("OPENAI_API_KEY") or None


def aws_variables() -> dict[str, str]:
    """The variables that clients of S3 share."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def configure_rank(rank: int, world_size: int) -> None:
    """Among several ranks, put the rank in front of each line, and log only warnings of all but rank 0."""
    logger = logging.getLogger("aura_dist")
    if world_size == 1:
        return
    for handler in logger.handlers:
        handler.setFormatter(_format(f"[rank {rank}] "))
    if rank and logger.level == logging.INFO:
        logger.setLevel(logging.WARNING)


def _format(prefix: str) -> logging.Formatter:
    return logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S")


def keep_freed_memory() -> None:
    """Reuse freed memory, because the system clears every page that it hands out again.

    A forward on the CPU frees and takes tens of megabytes in every layer. glibc maps such blocks one by one, and
    clearing their pages took a fifth of the time of large batches. In the heap, and in huge pages, they cost nothing;
    the longest batches run first, so that the heap has its full size from the beginning. Blocks of 64 MB and more,
    mostly weights, are still mapped one by one, because holes of their size would waste memory. Call before torch
    allocates. Does nothing where the C library is not glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Give the system what was freed, between phases whose blocks differ in size: the later one would not reuse it.

    Does nothing where the C library is not glibc.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def available_cores() -> int:
    """Cores that this process may use: by its affinity, and by the CPU time that its control groups give it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(ceil, _cpu_quotas())]))


def _cpu_quotas(root: Path = CGROUPS, groups: Path = OWN_CGROUPS) -> Iterator[float]:
    """CPUs that this process's control groups, and those around them, limit it to; versions 1 and 2 (`man 7 cgroups`).

    Within a container the paths may be those of the host; then the container's own group is at the root.
    """
    lines = groups.read_text().splitlines() if groups.is_file() else []
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        own = Path(path.lstrip("/"))
        for group in (own, *own.parents):
            with suppress(OSError, ValueError, ZeroDivisionError):
                if not controllers:
                    quota, period = (root / group / "cpu.max").read_text().split()
                elif "cpu" in controllers.split(","):
                    place = root / controllers if (root / controllers).is_dir() else root / "cpu"
                    quota, period = ((place / group / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
                else:
                    break
                if int(quota) > 0:  # ValueError for `max`
                    yield int(quota) / int(period)


def local_ranks() -> int:
    """Ranks of this launch on this machine, as the launcher says; where it does not, all may be here."""
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    here = os.environ.get("LOCAL_WORLD_SIZE") or (tasks[0] if tasks else os.environ.get("WORLD_SIZE", "1"))
    return max(1, int(here)) if here.isdecimal() else 1


def free_memory(root: Path = CGROUPS, groups: Path = OWN_CGROUPS) -> int:
    """Bytes of memory that are free on this machine, at most what this process's control groups allow it."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", MEMORY.read_text()) if MEMORY.is_file() else None
    limits = [1024 * int(found[1]) if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    lines = groups.read_text().splitlines() if groups.is_file() else []
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        own = Path(path.lstrip("/"))
        for group in (own, *own.parents):
            with suppress(OSError, ValueError):  # ValueError for `max`
                limits.append(
                    int((root / "memory" / group / "memory.limit_in_bytes").read_text())
                    if controllers
                    else int((root / group / "memory.max").read_text())
                )
    return min(limits)


def this_process() -> dict[str, Any]:
    """What tells this process from every other, for another process or a person, on any machine.

    `space` names the machine's start and the table of process numbers, which a container may have of its own; it is
    empty where neither can be told. All ranks of a launch have the same `launch`.
    """
    host, pid = platform.node(), os.getpid()
    ranks = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    launch = ranks if os.environ.get("WORLD_SIZE", "1") != "1" else f"{host} {pid}"
    job = os.environ.get("SLURM_JOB_ID", "")
    return {"host": host, "pid": pid, "began": _began(pid), "space": _process_space(), "job": job, "launch": launch}


def is_running(process: Mapping[str, Any]) -> bool | None:
    """Whether the process that `this_process` described still runs; None where that cannot be told from here."""
    if not process["space"] or process["space"] != _process_space():
        return None
    return bool(_began(process["pid"]) == process["began"])


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine's start (`man 5 proc`); empty if it has ended."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""


def _process_space() -> str:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def cache_dir() -> Path:
    """The user's cache directory of aura_dist (`$XDG_CACHE_HOME/aura_dist`, by default `~/.cache/aura_dist`)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "aura_dist"


def extensions_dir() -> Path:
    """Directory of DeepSpeed's compiled parts: `$TORCH_EXTENSIONS_DIR`, by default in this Python environment.

    Sets the variable, which torch reads, so that all ranks build and find them in one place. Puts this environment's
    programs on the path, because torch looks there for its builder.
    """
    programs, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if programs not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (programs, path)))
    directory = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions")))
    directory.mkdir(parents=True, exist_ok=True)
    return directory
