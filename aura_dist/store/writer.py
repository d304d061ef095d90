"""The background writer: one thread that encodes and writes whole shards, fed by a fixed set of row buffers.

The forward takes a free buffer, fills one row chunk of its columns of every site, and hands it over; the buffer is free
again when it is written. The number of buffers bounds the memory: where the disk is slow the forward waits.
"""

import asyncio
import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.sites.ownership import Interval
from aura_dist.store.access import get_sharded
from aura_dist.store.first_token import FirstTokenCounts
from aura_dist.store.record import writing_failed
from aura_dist.store.schema import activation_path
from aura_dist.store.shards import Write, shard_writes

NUM_BUFFERS = 3
_POLL_SECONDS = 0.1

# (site, pooling) → [rows of a chunk, columns that are written here]
RowBuffer = dict[tuple[str, str], NDArray[Any]]
Commit = Callable[[int, Mapping[str, int]], None]


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
    ) -> None:
        self._group = group
        self._owned = owned
        self._commit = commit
        self.counts = counts
        self._free: queue.Queue[RowBuffer] = queue.Queue()
        for _ in range(NUM_BUFFERS):
            self._free.put(buffer := make_buffer())
        self._arrays = {key: get_sharded(group, activation_path(*key)) for key in buffer}
        self._work: queue.Queue[tuple[Any, ...] | None] = queue.Queue()
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
        self._work.put((task, rows, buffer, part, wait))

    def commit(self, task: int) -> None:
        """Mark `task` as finished once everything handed over before is written."""
        self._work.put((task,))

    def check(self) -> None:
        """Raise the StoreError with which the writer has failed, if it has."""
        if self._failure is not None:
            raise writing_failed(self._group, self._failure) from self._failure

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            while (item := self._work.get()) is not None:
                if self._failure is not None:
                    continue
                try:
                    self._do(runner, item)
                except BaseException as error:  # whatever it is, the run must stop with it
                    self._failure = error

    def _do(self, runner: asyncio.Runner, item: tuple[Any, ...]) -> None:
        if len(item) == 1:
            (task,) = item
            if self.counts is not None:
                self.counts.write(task)
            self._commit(task, dict(self._nonfinite.pop(task, {})))
            return
        task, rows, buffer, part, wait = item
        wait()
        for key, values in part.items():
            written = values[: rows.stop - rows.start]
            bad = written.size - int(np.count_nonzero(np.isfinite(written)))
            if bad:
                self._nonfinite[task][activation_path(*key)] += bad
            if self.counts is not None:
                self.counts.add(task, key, values[-1])
        runner.run(_together(self._writes(rows, part)))
        self._free.put(buffer)

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
