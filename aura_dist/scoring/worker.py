"""A worker's part of scoring: read a chunk column, score it, write it, on any machine that sees the store."""

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache, reduce
from math import ceil
from operator import add
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.errors import StoreError
from aura_dist.scoring.columns import statistics_by_concept
from aura_dist.scoring.scores import MARKER, Column, score_path
from aura_dist.store.access import (
    chunk_name,
    errors_of_writing,
    get_array,
    in_whole_chunks,
    missing_chunks,
    open_group,
    prepare_write,
    read_array,
)
from aura_dist.store.schema import activation_path
from aura_dist.store.zarr_adapter import read_into, run_in_zarr, set_values

_thread = threading.local()

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Source:
    """What all tasks of a run share: the store and the rows to score, as runs [start, stop)."""

    path: str
    runs: Runs
    # unique to this run: a worker that outlives it must not use its handles on a store that was replaced since
    token: str


@dataclass(frozen=True)
class Scored:
    """A task's report: how many neurons have a NaN response and so no score, and where the time went."""

    num_unscored: int
    read_seconds: float
    compute_seconds: float
    write_seconds: float

    def __add__(self, other: "Scored") -> "Scored":
        return Scored(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


def score_columns(source: Source, columns: Sequence[Column]) -> Scored:
    """Read, score and write chunk columns, one after the other in the memory of one.

    StoreError if a chunk is missing or damaged, and then nothing is written for its column; or if a score cannot be.
    """
    try:
        return reduce(add, (_score_column(source, column) for column in columns))
    except StoreError as error:
        # without its cause: not every library's errors can be sent to another process
        bare = StoreError(str(error))
    raise bare


def _score_column(source: Source, column: Column) -> Scored:
    start = time.perf_counter()
    labels_CN = _labels(source)
    values_NM = read_columns(source, column.site, column.pooling, slice(column.start, column.stop))
    read = time.perf_counter()
    made = statistics_by_concept(values_NM, labels_CN, column.statistics)
    del values_NM
    computed = time.perf_counter()
    with errors_of_writing(source.path, "a score"):
        _write(source, column, made)
    return Scored(_num_unscored(made), read - start, computed - read, time.perf_counter() - computed)


def _num_unscored(made: Mapping[str, NDArray[Any]]) -> int:
    """Neurons with NaN among the responses that some concept labels."""
    if "num_distinct" in made:
        return int(np.count_nonzero((made["num_distinct"] == 0).any(axis=0)))
    return int(np.count_nonzero(np.isnan(next(iter(made.values()))).any(axis=0)))


def _write(source: Source, column: Column, made: Mapping[str, NDArray[Any]]) -> None:
    """Write all statistics at once, then the marker that makes them count, in zarr's event loop.

    A loop of our own for each column, with its threads, would take longer than the writing.
    """
    arrays = {name: _opened(source, score_path(column.site, column.pooling, name)) for name in (*made, MARKER)}
    writes = [prepare_write(arrays[name], (0, column.start), values) for name, values in made.items()]

    async def write_all() -> None:
        # all end before an error is raised, so that none still writes when the column counts as failed
        for error in await asyncio.gather(*(write() for write in writes), return_exceptions=True):
            if error is not None:
                raise error
        await set_values(arrays[MARKER], column.index, column.marker)

    run_in_zarr(write_all())


def read_columns(source: Source, site: str, pooling: str, columns: slice) -> NDArray[Any]:
    """[N, M] responses of some neurons in the rows to score; StoreError with a chunk's path if one is unusable."""
    array = _opened_whole(source, activation_path(site, pooling))
    # a missing chunk would read as fill values
    for chunk in missing_chunks(array, (c for c, _ in _chunks_of(array, source.runs, columns))):
        raise StoreError(f"the chunk {chunk_name(array, chunk)!r} is missing; {_AGAIN}")
    try:
        return _read_runs(array, source.runs, columns)
    except StoreError:  # the store could not be reached
        raise
    except Exception:  # the codec pipeline raises its own kinds, which do not name the chunk
        for chunk, region in _chunks_of(array, source.runs, columns):
            try:
                array[region]
            except Exception as error:
                raise StoreError(f"the chunk {chunk_name(array, chunk)!r} is damaged: {error}; {_AGAIN}") from error
        raise


_AGAIN = "collect again with --overwrite"


def _read_runs(array: "zarr.Array[Any]", runs: Runs, columns: slice) -> NDArray[Any]:
    """The rows of `runs`, in this thread's own memory: valid until the thread reads again.

    Whole chunks are read, because parts of them would not be checked: runs are whole row chunks, except at the array's
    last row, and `columns` are whole chunk columns, except at its last column.
    """
    rows_chunk, width = array.chunks
    stops = [ceil(stop / rows_chunk) * rows_chunk for _, stop in runs]
    num_rows = sum(whole_stop - start for (start, _), whole_stop in zip(runs, stops, strict=True))
    whole_columns = slice(columns.start, ceil(columns.stop / width) * width)
    num_columns = whole_columns.stop - whole_columns.start
    values_NM = _own_memory(num_rows * num_columns * array.dtype.itemsize).view(array.dtype)
    values_NM = values_NM.reshape(num_rows, num_columns)
    filled = 0
    for (start, _), stop in zip(runs, stops, strict=True):
        part = values_NM[filled : filled + stop - start]
        read_into(array, (slice(start, stop), whole_columns), part)
        filled += stop - start
    kept_NM = values_NM[: sum(stop - start for start, stop in runs), : columns.stop - columns.start]
    return kept_NM if kept_NM.flags.c_contiguous else np.ascontiguousarray(kept_NM)


def _own_memory(num_bytes: int) -> NDArray[np.uint8]:
    """Memory that a thread reuses for every column, because clearing fresh pages took half of the time of reading."""
    memory: NDArray[np.uint8] | None = getattr(_thread, "memory", None)
    if memory is None or memory.size < num_bytes:
        memory = _thread.memory = None  # freed before the new is allocated
        memory = _thread.memory = np.empty(num_bytes, np.uint8)
    return memory[:num_bytes]


def _chunks_of(
    array: "zarr.Array[Any]", runs: Runs, columns: slice
) -> Iterator[tuple[tuple[int, int], tuple[slice, slice]]]:
    """Index and region of every chunk that holds some of `columns` in `runs`, which are runs of whole row chunks."""
    rows, width = array.chunks
    for start, stop in runs:
        for r in range(start // rows, ceil(stop / rows)):
            for c in range(columns.start // width, ceil(columns.stop / width)):
                yield (r, c), (slice(r * rows, (r + 1) * rows), slice(c * width, (c + 1) * width))


@lru_cache(maxsize=1)
def _opened_group(source: Source) -> zarr.Group:
    return open_group(source.path)


@lru_cache(maxsize=256)
def _opened(source: Source, name: str) -> "zarr.Array[Any]":
    """A worker's handle on an array, kept because opening takes longer than reading a chunk."""
    return get_array(_opened_group(source), name)


@lru_cache(maxsize=256)
def _opened_whole(source: Source, name: str) -> "zarr.Array[Any]":
    return in_whole_chunks(_opened(source, name))


@lru_cache(maxsize=1)
def _labels(source: Source) -> NDArray[np.int8]:
    """[C, N] labels of the rows to score."""
    labels_NC = read_array(_opened_group(source), "samples/label")
    return np.ascontiguousarray(np.concatenate([labels_NC[start:stop] for start, stop in source.runs]).T)


def compile_kernels() -> None:
    """Compile the kernel now, or read it from numba's cache, so that the first column need not."""
    statistics_by_concept(np.array([[0.1], [0.2]], np.float32), np.array([[1, 0]], dtype=np.int8), ["auroc"])
