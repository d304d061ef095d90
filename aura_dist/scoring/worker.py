"""A worker's part of scoring: read chunk columns, score them, write their span, on any machine that sees the store."""

import threading
import time
from collections.abc import Mapping, Sequence
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
from aura_dist.scoring.scores import Span, score_path, write_span
from aura_dist.store.access import errors_of_writing, get_sharded, open_group, read_array
from aura_dist.store.schema import activation_path
from aura_dist.store.shards import ShardError, read_chunks

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


def score_spans(source: Source, spans: Sequence[Span]) -> Scored:
    """Read and score the chunk columns of spans one after the other in the memory of one; write each span at once.

    StoreError if a chunk is missing or damaged, and then nothing is written for its span; or if a score cannot be.
    """
    try:
        return reduce(add, (_score_span(source, span) for span in spans))
    except StoreError as error:
        # without its cause: not every library's errors can be sent to another process
        bare = StoreError(str(error))
    raise bare


def _score_span(source: Source, span: Span) -> Scored:
    read = computed = 0.0
    labels_CN, parts = _labels(source), []
    for columns in span.columns():
        start = time.perf_counter()
        values_NM = read_columns(source, span.site, span.pooling, columns)
        read -= start - (start := time.perf_counter())
        parts.append(statistics_by_concept(values_NM, labels_CN, span.statistics))
        del values_NM
        computed += time.perf_counter() - start
    start = time.perf_counter()
    made = {name: np.concatenate([part[name] for part in parts], axis=1) for name in span.statistics}
    with errors_of_writing(source.path, "a score"):
        array = _opened(source, score_path(span.site, span.pooling))
        write_span(_opened_group(source), array, slice(span.start, span.stop), made)
    return Scored(_num_unscored(made), read, computed, time.perf_counter() - start)


def _num_unscored(made: Mapping[str, NDArray[Any]]) -> int:
    """Neurons with NaN among the responses that some concept labels."""
    if "num_distinct" in made:
        return int(np.count_nonzero((made["num_distinct"] == 0).any(axis=0)))
    return int(np.count_nonzero(np.isnan(next(iter(made.values()))).any(axis=0)))


def read_columns(source: Source, site: str, pooling: str, columns: slice) -> NDArray[Any]:
    """[N, M] responses of some neurons in the rows to score; StoreError with a chunk's path if one is unusable."""
    try:
        return _read_runs(_opened(source, activation_path(site, pooling)), source.runs, columns)
    except ShardError as error:
        raise StoreError(f"{error}; {_AGAIN}") from error


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
        read_chunks(array, (slice(start, stop), whole_columns), part, complete=True)
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


@lru_cache(maxsize=1)
def _opened_group(source: Source) -> zarr.Group:
    return open_group(source.path, to_write=True)


@lru_cache(maxsize=256)
def _opened(source: Source, name: str) -> "zarr.Array[Any]":
    """A worker's handle on an array, kept because opening takes longer than reading a chunk."""
    return get_sharded(_opened_group(source), name)


@lru_cache(maxsize=1)
def _labels(source: Source) -> NDArray[np.int8]:
    """[C, N] labels of the rows to score."""
    labels_NC = read_array(_opened_group(source), "samples/label")
    return np.ascontiguousarray(np.concatenate([labels_NC[start:stop] for start, stop in source.runs]).T)


def compile_kernels() -> None:
    """Compile the kernel now, or read it from numba's cache, so that the first column need not."""
    statistics_by_concept(np.array([[0.1], [0.2]], np.float32), np.array([[1, 0]], dtype=np.int8), ["auroc"])
