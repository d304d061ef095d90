"""The background writer: one thread that encodes and writes whole shards, fed by a fixed set of row buffers.

The forward takes a free buffer, fills one row chunk of its columns of every site, and hands it over; the buffer is free
again when it is written. The number of buffers bounds the memory: where the disk is slow the forward waits.

Values of single tokens come batch by batch and site by site, in arrays of their own. The forward waits there as long as
`MAX_WAITING_BYTES` of them wait.
"""

import asyncio
import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import zarr
from numpy.typing import NDArray

from aura_dist.sites.ownership import Interval
from aura_dist.sites.pooling import TOKENS
from aura_dist.sites.site import Site
from aura_dist.store.access import get_sharded
from aura_dist.store.first_token import FirstTokenCounts
from aura_dist.store.record import writing_failed
from aura_dist.store.schema import activation_path
from aura_dist.store.shards import Write, shard_writes
from aura_dist.store.tokens import num_nonfinite

NUM_BUFFERS = 3
MAX_WAITING_BYTES = 256 * 2**20
_POLL_SECONDS = 0.1

# (site, pooling) → [rows of a chunk, columns that are written here]
RowBuffer = dict[tuple[str, str], NDArray[Any]]
Commit = Callable[[int, Mapping[str, int]], None]
Work = Callable[[asyncio.Runner], None]


class ChunkWriter:
    """Writes row chunks and commits tasks, in the order they are handed over; chunks of several tasks may mix.

    Parameters
    ----------
    owned
        Site → intervals of its columns that are written here, whole shards; they are side by side in the buffers.
    commit
        Called with a task's index and the number of its NaN and infinite responses by array, when everything that was
        handed over before is written.
    counts
        Takes the last row of each buffer: how many rows have their value at the first token. None: no such row.
    tokens
        Sites whose values are stored token by token.

    Use as a context manager: leaving it waits until all is written. The first failure stops the writer
    and is raised, as a StoreError, from the next call.
    """

    def __init__(
        self,
        group: zarr.Group,
        owned: Mapping[str, Sequence[Interval]],
        make_buffer: Callable[[], RowBuffer],
        commit: Commit,
        counts: FirstTokenCounts | None = None,
        tokens: Iterable[Site] = (),
    ) -> None:
        self._group = group
        self._owned = owned
        self._commit = commit
        self.counts = counts
        self._free: queue.Queue[RowBuffer] = queue.Queue()
        for _ in range(NUM_BUFFERS):
            self._free.put(buffer := make_buffer())
        self._arrays = {key: get_sharded(group, activation_path(*key)) for key in buffer}
        self._arrays |= {(site.name, TOKENS): get_sharded(group, activation_path(site.name)) for site in tokens}
        self._work: queue.Queue[Work | None] = queue.Queue()
        self._waiting_bytes, self._written = 0, threading.Condition()
        self._failure: BaseException | None = None
        self._nonfinite: defaultdict[int, Counter[str]] = defaultdict(Counter)  # by task
        self._thread = threading.Thread(target=self._run, name="chunk-writer", daemon=True)
        self._thread.start()

    def free_buffer(self) -> RowBuffer:
        """A buffer to fill; waits for one. Raises StoreError if the writer has failed."""
        while True:
            self.check()
            try:
                return self._free.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue

    def write(
        self,
        task: int,
        rows: slice,
        buffer: RowBuffer,
        wait: Callable[[], None],
        keys: Iterable[tuple[str, str]] | None = None,
    ) -> None:
        """Hand over a whole row chunk of a task, of all arrays or of `keys`; do not touch the buffer from here on.

        `wait` blocks until the buffer holds its values, because copies from a GPU may still be under way.
        """
        self.check()
        part = buffer if keys is None else {key: buffer[key] for key in keys if key in buffer}
        self._work.put(partial(self._write_rows, task, rows, buffer, part, wait))

    def write_tokens(self, task: int, site: str, place: int, values_TD: NDArray[Any]) -> None:
        """Hand over a site's values at the tokens of a whole block of a task, all columns, in the stored dtype.

        They begin at `place`, and are not to be touched from here on. Waits while too many wait to be written.
        """
        with self._written:
            while self._waiting_bytes and self._waiting_bytes + values_TD.nbytes > MAX_WAITING_BYTES:
                self.check()
                self._written.wait(_POLL_SECONDS)
            self._waiting_bytes += values_TD.nbytes
        self.check()
        self._work.put(partial(self._write_tokens, task, site, place, values_TD))

    def commit(self, task: int) -> None:
        """Mark `task` as finished once everything handed over before is written."""
        self._work.put(partial(self._finish, task))

    def check(self) -> None:
        """Raise the StoreError with which the writer has failed, if it has."""
        if self._failure is not None:
            raise writing_failed(self._group, self._failure) from self._failure

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            while (work := self._work.get()) is not None:
                if self._failure is not None:
                    continue
                try:
                    work(runner)
                except BaseException as error:  # whatever it is, the run must stop with it
                    self._failure = error

    def _finish(self, task: int, runner: asyncio.Runner) -> None:
        if self.counts is not None:
            self.counts.write(task)
        self._commit(task, dict(self._nonfinite.pop(task, {})))

    def _write_rows(
        self,
        task: int,
        rows: slice,
        buffer: RowBuffer,
        part: RowBuffer,
        wait: Callable[[], None],
        runner: asyncio.Runner,
    ) -> None:
        wait()
        for key, values in part.items():
            self._count_nonfinite(task, key, values[: rows.stop - rows.start])
            if self.counts is not None:
                self.counts.add(task, key, values[-1])
        runner.run(_together(self._writes(rows, part)))
        self._free.put(buffer)

    def _write_tokens(self, task: int, site: str, place: int, values_TD: NDArray[Any], runner: asyncio.Runner) -> None:
        self._count_nonfinite(task, (site, TOKENS), values_TD)
        runner.run(_together(self._token_writes(site, place, values_TD)))
        with self._written:
            self._waiting_bytes -= values_TD.nbytes
            self._written.notify()

    def _token_writes(self, site: str, place: int, values_TD: NDArray[Any]) -> list[Write]:
        """The writes of a block of tokens: one a shard."""
        return list(shard_writes(self._arrays[site, TOKENS], (place, 0), values_TD, ragged=True))

    def _count_nonfinite(self, task: int, key: tuple[str, str], values: NDArray[Any]) -> None:
        if bad := num_nonfinite(values):
            self._nonfinite[task][activation_path(*key)] += bad

    def _writes(self, rows: slice, buffer: RowBuffer) -> list[Write]:
        """The writes of the buffer, site by site: one a shard."""
        writes: list[Write] = []
        for key, values in buffer.items():
            place = 0
            for start, stop in self._owned[key[0]]:
                part = values[: rows.stop - rows.start, place : place + stop - start]
                writes += shard_writes(self._arrays[key], (rows.start, start), part)
                place += stop - start
        return writes

    def __enter__(self) -> "ChunkWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work.put(None)
        self._thread.join()
        if error is None:
            self.check()


async def _together(writes: Sequence[Write]) -> None:
    """All sites at once: one turn of the event loop instead of one for each array."""
    await asyncio.gather(*(write() for write in writes))
