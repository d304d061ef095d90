"""The background writer: one thread that encodes and writes whole chunks, fed by a fixed set of row buffers.

The forward takes a free buffer, fills one row chunk of every site, and hands it over; the writer gives it back
once it is written. The number of buffers bounds the memory: a slow disk makes the forward wait, never grow.
"""

import asyncio
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.errors import StoreError
from aura_dist.store.access import get_array
from aura_dist.store.record import commit
from aura_dist.store.schema import StoreSpec, activation_path

logger = logging.getLogger(__name__)

NUM_BUFFERS = 3
_POLL_SECONDS = 0.1

# (site, pooling) → [rows of a chunk, width]
RowBuffer = dict[tuple[str, str], NDArray[Any]]


class ChunkWriter:
    """Writes row chunks and commits tasks, in the order they are handed over.

    Use as a context manager: leaving it waits until all is written. The first failure stops the writer
    and is raised, as a StoreError, from the next call.
    """

    def __init__(self, group: zarr.Group, spec: StoreSpec, make_buffer: Callable[[], RowBuffer]) -> None:
        self._group = group
        self._arrays = {
            (s.name, p): get_array(group, activation_path(s.name, p)) for s in spec.sites for p in spec.poolings
        }
        self._free: queue.Queue[RowBuffer] = queue.Queue()
        for _ in range(NUM_BUFFERS):
            self._free.put(make_buffer())
        self._work: queue.Queue[tuple[str, Any] | None] = queue.Queue()
        self._failure: BaseException | None = None
        self.nonfinite: Counter[str] = Counter(cast(dict[str, int], group.attrs.get("nonfinite", {})))
        self._thread = threading.Thread(target=self._run, name="chunk-writer", daemon=True)
        self._thread.start()

    def free_buffer(self) -> RowBuffer:
        """A buffer to fill; waits for one. Raises StoreError if the writer has failed."""
        while True:
            self._raise_failure()
            try:
                return self._free.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue

    def write(self, start: int, stop: int, buffer: RowBuffer) -> None:
        """Hand over rows [start, stop) of every site, a whole row chunk; the buffer is the writer's from here on."""
        self._raise_failure()
        self._work.put(("rows", (start, stop, buffer)))

    def commit(self, task: int) -> None:
        """Mark `task` as finished once everything handed over before is written."""
        self._work.put(("commit", task))

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            while (item := self._work.get()) is not None:
                if self._failure is not None:
                    continue
                try:
                    self._do(runner, *item)
                except BaseException as error:  # whatever it is, the run must stop with it
                    self._failure = error

    def _do(self, runner: asyncio.Runner, what: str, item: Any) -> None:
        if what == "commit":
            commit(self._group, item)
            return
        start, stop, buffer = item
        found = Counter[str]()
        for (site, pooling), values in buffer.items():
            rows = values[: stop - start]
            bad = rows.size - int(np.count_nonzero(np.isfinite(rows)))
            if bad:
                found[activation_path(site, pooling)] += bad
        runner.run(self._write(slice(start, stop), buffer))
        if found:
            self.nonfinite.update(found)
            self._group.attrs["nonfinite"] = dict(self.nonfinite)
        self._free.put(buffer)

    async def _write(self, rows: slice, buffer: RowBuffer) -> None:
        """All sites at once: one turn of the event loop instead of one for each array."""
        await asyncio.gather(
            *(
                self._arrays[key].async_array.setitem((rows, slice(None)), values[: rows.stop - rows.start])
                for key, values in buffer.items()
            )
        )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise StoreError(
                f"--store {self._group.store_path}: writing failed: {self._failure}; "
                "mend that and run the same command again: finished tasks are kept"
            ) from self._failure

    def __enter__(self) -> "ChunkWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work.put(None)
        self._thread.join()
        if error is None:
            self._raise_failure()
