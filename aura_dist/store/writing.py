"""Writing whole chunks, every one of them: a chunk that is not there counts as lost."""

from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.array import AsyncArray
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import LocalStore

from aura_dist.errors import AuraError, StoreError, brief
from aura_dist.store.access import plain_codecs

Write = Callable[[], Coroutine[Any, Any, None]]


def prepare_write(array: "zarr.Array[Any]", start: tuple[int, ...], values: NDArray[Any]) -> Write:
    """What writes `values` from `start` on: whole chunks, or as far as the array reaches.

    The Rust pipeline leaves out chunks that hold fill values alone (zarrs 0.2.3, whatever `write_empty_chunks` says):
    Python's writes these, one after the other. Prepared outside of zarr's event loop, as all that opens arrays: another
    thread may hold the lock on opening, and wait for the loop.
    """
    assert all(first % chunk == 0 for first, chunk in zip(start, array.chunks, strict=True)), (start, array.chunks)
    left_out = list(_chunks_of_fill_values(array, values)) if isinstance(array.store, LocalStore) else []
    plain = _by_python(array) if left_out else array

    def region(part: Sequence[slice]) -> tuple[slice, ...]:
        return tuple(slice(first + s.start, first + s.stop) for first, s in zip(start, part, strict=True))

    async def write() -> None:
        await array.async_array.setitem(region([slice(0, n) for n in values.shape]), values)
        for part in left_out:
            await plain.async_array.setitem(region(part), values[part])

    return write


def _chunks_of_fill_values(array: "zarr.Array[Any]", values: NDArray[Any]) -> Iterator[tuple[slice, ...]]:
    """Parts of `values` that are chunks of the array and hold its fill value alone; told by their first values."""
    is_fill = np.isnan if np.isnan(array.fill_value) else array.fill_value.__eq__
    for index in np.argwhere(is_fill(values[tuple(slice(None, None, chunk) for chunk in array.chunks)])).tolist():
        bounds = zip(index, array.chunks, values.shape, strict=True)
        part = tuple(slice(i * chunk, min((i + 1) * chunk, n)) for i, chunk, n in bounds)
        if is_fill(values[part]).all():
            yield part


def _by_python(array: "zarr.Array[Any]") -> "zarr.Array[Any]":
    """A handle on the same array by Python's pipeline."""
    assert isinstance(array.metadata, ArrayV3Metadata)
    with plain_codecs():
        return zarr.Array(AsyncArray(array.metadata, array.store_path, array.async_array.config))


@contextmanager
def errors_of_writing(store: str, what: str = "") -> Iterator[None]:
    """Within, what keeps the store, or `what` of it, from being written is raised as a StoreError."""
    try:
        yield
    except AuraError:
        raise
    # RuntimeError: the Rust pipeline's, for a full disk; ValueError: opened for reading, as it cannot be written
    except (OSError, RuntimeError, ValueError) as error:
        name = f"--store {store!r}" + (f": {what}" if what else "")
        raise StoreError(
            f"{name} cannot be written: {brief(error)}; mend that and run the same command again"
        ) from error
