"""Marks of the launches that are at work on a store, so that none destroys what another writes.

A mark is an empty Zarr group `at_work-ID` under the store's root. Its attributes say who works; one of them, the beat,
is counted up as long as that process lives. Object stores have neither locks nor exclusive files. So a launch writes
its own mark, then looks for others, and takes its own back if there is one: of two launches, at least one sees the
other.
"""

import json
import logging
import random
import signal
import threading
import time
from _thread import interrupt_main
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any
from uuid import uuid4

import msgspec
from zarr.abc.store import Store
from zarr.buffer import cpu, default_buffer_prototype

from aura_dist.errors import StoreError
from aura_dist.ranks.process import is_running, this_process
from aura_dist.store.zarr_adapter import run_in_zarr

logger = logging.getLogger(__name__)

MARK = "at_work-"
BEAT_SECONDS = 5.0
# a launch on another machine whose beat stands still for so long was killed; NFS may show an old beat for a minute
DEAD_SECONDS = 75.0
# how long a launch waits for one that is at work, because Slurm may requeue a job whose processes are still ending
WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class Mark:
    """Who is at work: the verb, the process (`this_process`), since when, and how often it has beaten."""

    name: str
    verb: str
    process: Mapping[str, Any]
    since: str
    beat: int = 0

    def __str__(self) -> str:
        job = f" (Slurm job {self.process['job']})" if self.process["job"] else ""
        return f"`{self.verb}` of process {self.process['pid']} on {self.process['host']}{job}, since {self.since}"


@contextmanager
def at_work(path: str, store: Store, verb: str, *, against: Collection[str], wait: bool) -> Iterator[None]:
    """Context in which this process marks the store as `verb`'s, once no launch of the verbs `against` is at work.

    StoreError if one is and `wait` is not set, or if it does not end within `WAIT_SECONDS`. Where the store cannot be
    written there is no mark, because nothing of it can be destroyed either.
    """
    mark = Mark(f"{MARK}{uuid4().hex}", verb, this_process(), time.strftime("%Y-%m-%d %H:%M:%S"))
    leaving = threading.Event()
    beating = threading.Thread(target=_beat, args=(store, mark, leaving), name="at-work", daemon=True)
    try:
        if _enter(path, store, mark, against, time.monotonic() + (WAIT_SECONDS if wait else 0)):
            beating.start()
        yield
    finally:
        leaving.set()
        if beating.is_alive():
            beating.join()
        _remove(store, mark)


def others_at_work(store: Store, verb: str) -> str:
    """Who else is at work with `verb`, and what to do; empty if nobody is. Ranks of this launch are no others."""
    with suppress(Exception):  # the error that is about to be raised says more
        launch = this_process()["launch"]
        for mark in _marks(store):
            if mark.verb == verb and mark.process["launch"] != launch and is_running(mark.process) is not False:
                return f"{mark}, is at work on it: wait until that has ended, and run the same command again"
    return ""


def _enter(path: str, store: Store, mark: Mark, against: Collection[str], deadline: float) -> bool:
    """Write the mark once no other stands against it; whether that was possible."""
    seen: dict[str, tuple[int, float]] = {}  # name of a mark → its beat when it was first seen, and when that was
    while _write(store, mark):
        others = [m for m in _marks(store) if m.name != mark.name and m.verb in against]
        states = [_lives(m, seen) for m in others]
        for dead in [m for m, lives in zip(others, states, strict=True) if lives is False]:
            logger.debug("%s was left by %s, which has ended", path, dead)
            _remove(store, dead)
            others.remove(dead)
        if not others:
            return True
        _remove(store, mark)
        if True in states and time.monotonic() >= deadline:
            raise StoreError(
                f"--store {path!r}: expected no other launch at work on it, got {others[0]}; wait until that has "
                "ended, or end it, and run the same command again"
            )
        if not mark.beat:
            mark = replace(mark, beat=1)
            logger.warning("%s: waiting for %s, to end or to give a sign of life", path, others[0])
        time.sleep(random.uniform(0.5, 1.5))  # two launches that saw each other come again one after the other
    return False


def _lives(mark: Mark, seen: dict[str, tuple[int, float]]) -> bool | None:
    """Whether a mark's process lives; None where that cannot be told yet."""
    running = is_running(mark.process)
    if running is not None:
        return running
    beat, since = seen.setdefault(mark.name, (mark.beat, time.monotonic()))
    if mark.beat != beat:
        return True
    return False if time.monotonic() - since > DEAD_SECONDS else None


def _beat(store: Store, mark: Mark, leaving: threading.Event) -> None:
    while not leaving.wait(BEAT_SECONDS):
        with suppress(Exception):  # of a store that cannot be reached for a while
            if mark.name not in [m.name for m in _marks(store)]:
                logger.error("another launch has taken over the store, because this one gave no sign of life")
                interrupt_main(signal.SIGTERM)
                return
            mark = replace(mark, beat=mark.beat + 1)
            _write(store, mark)


def _marks(store: Store) -> list[Mark]:
    """The marks in a store; damaged ones are left out, and maybe one that is written or removed at this moment."""

    async def read() -> list[tuple[str, Any]]:
        names = [name.strip("/") async for name in store.list_dir("") if name.startswith(MARK)]
        return [(name, await store.get(f"{name}/zarr.json", default_buffer_prototype())) for name in sorted(names)]

    found = []
    for name, content in run_in_zarr(read()):
        with suppress(ValueError, KeyError, TypeError, AttributeError, msgspec.ValidationError):
            mark = msgspec.convert({**json.loads(content.to_bytes())["attributes"], "name": name}, Mark)
            if mark.process.keys() >= this_process().keys():
                found.append(mark)
    return found


def _write(store: Store, mark: Mark) -> bool:
    """Write a mark; whether that was possible."""
    attributes = {name: value for name, value in asdict(mark).items() if name != "name"}
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    try:
        run_in_zarr(store.set(f"{mark.name}/zarr.json", cpu.Buffer.from_bytes(json.dumps(group).encode())))
    except (OSError, RuntimeError, ValueError, StoreError) as error:
        logger.debug("the store cannot be marked: %s", error)
        return False
    return True


def _remove(store: Store, mark: Mark) -> None:
    with suppress(OSError, RuntimeError, ValueError, StoreError):
        run_in_zarr(store.delete_dir(mark.name))
