"""Scores of a store: arrays made once, filled one chunk column at a time, each by one task.

```
scores/<site>/<pooling>/auroc    [concept, neuron] float64, chunked as the activations' columns
scores/<site>/<pooling>/scored   [chunk column] uint8, one chunk each: written after the column's scores
```
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.core.auroc import auroc_by_concept
from aura_dist.errors import StoreError
from aura_dist.store.access import chunk_name, get_array, missing_chunks, open_group, read_array
from aura_dist.store.record import unfinished
from aura_dist.store.schema import StoreSpec, activation_path, codecs, tasks_of

STATISTICS = ("auroc",)


@dataclass(frozen=True)
class Column:
    """One chunk column of one site and pooling: what one task scores."""

    site: str
    pooling: str
    index: int
    start: int
    stop: int


def score_path(site: str, pooling: str, name: str) -> str:
    return f"scores/{site}/{pooling}/{name}"


def check_finished(path: str, group: zarr.Group, spec: StoreSpec) -> None:
    """StoreError with the number of missing rows, if collection has not finished."""
    left = set(unfinished(group))
    if left:
        tokens = read_array(group, "samples/num_tokens")
        rows = sum(t.stop - t.start for t in tasks_of(tokens, spec.tokens_per_batch) if t.index in left)
        raise StoreError(
            f"--store {path!r}: {rows} of {len(tokens)} rows are missing; run the same `collect` to finish it"
        )


def prepare(group: zarr.Group, spec: StoreSpec) -> list[Column]:
    """Make the score arrays that are not there yet; the chunk columns that are not scored yet."""
    columns = []
    for site in spec.sites:
        for pooling in spec.poolings:
            width = get_array(group, activation_path(site.name, pooling)).chunks[1]
            marker = score_path(site.name, pooling, "scored")
            if marker not in group:
                _make_arrays(group, len(spec.concepts), site.name, pooling, site.width, width)
            scored = read_array(group, marker)
            columns += [
                Column(site.name, pooling, int(i), int(i) * width, min((int(i) + 1) * width, site.width))
                for i in np.flatnonzero(scored == 0)
            ]
    return columns


def _make_arrays(group: zarr.Group, concepts: int, site: str, pooling: str, width: int, chunk: int) -> None:
    for statistic in STATISTICS:
        group.create_array(
            score_path(site, pooling, statistic),
            shape=(concepts, width),
            chunks=(concepts, chunk),
            dtype="float64",
            fill_value=np.nan,
            compressors=codecs(),
            dimension_names=("concept", "neuron"),
            config={"write_empty_chunks": True},
        )
    # the marker comes last: where it stands, the statistics' arrays stand
    group.create_array(
        score_path(site, pooling, "scored"),
        shape=(ceil(width / chunk),),
        chunks=(1,),
        dtype="uint8",
        fill_value=0,
        dimension_names=("chunk_column",),
    )


def score_column(path: str, column: Column) -> int:
    """Read, score and write one chunk column; the number of neurons in it without a score.

    Raises
    ------
    StoreError
        A chunk is missing or damaged; nothing is written.
    """
    labels_CN = _labels(path)
    values_NM = read_columns(path, column.site, column.pooling, slice(column.start, column.stop))
    auroc_CM = auroc_by_concept(values_NM, labels_CN)
    _opened_array(path, score_path(column.site, column.pooling, "auroc"))[:, column.start : column.stop] = auroc_CM
    _opened_array(path, score_path(column.site, column.pooling, "scored"))[column.index] = 1
    return int(np.isnan(auroc_CM).any(axis=0).sum())


def read_columns(path: str, site: str, pooling: str, columns: slice) -> NDArray[Any]:
    """[N, M] responses of some neurons; StoreError with a chunk's path if it is missing or damaged."""
    array = _opened_array(path, activation_path(site, pooling))
    # a missing chunk would read as fill values without a word
    for chunk in missing_chunks(array, (c for c, _ in _chunks_of(array, columns))):
        raise StoreError(f"the chunk {chunk_name(array, chunk)!r} is missing; {_AGAIN}")
    try:
        return np.asarray(array[:, columns])
    except StoreError:  # the store could not be reached
        raise
    except Exception:  # the codec pipeline raises its own kinds: find the chunk
        for chunk, region in _chunks_of(array, columns):
            try:
                array[region]
            except Exception as error:
                raise StoreError(f"the chunk {chunk_name(array, chunk)!r} is damaged: {error}; {_AGAIN}") from error
        raise


_AGAIN = "collect again with --overwrite"


def _chunks_of(array: "zarr.Array[Any]", columns: slice) -> Iterator[tuple[tuple[int, int], tuple[slice, slice]]]:
    """Index and region of every chunk that holds some of `columns`."""
    rows, width = array.chunks
    for r in range(ceil(array.shape[0] / rows)):
        for c in range(columns.start // width, ceil(columns.stop / width)):
            yield (r, c), (slice(r * rows, (r + 1) * rows), slice(c * width, (c + 1) * width))


@lru_cache(maxsize=1)
def _opened_group(path: str) -> zarr.Group:
    return open_group(path)


@lru_cache(maxsize=256)
def _opened_array(path: str, name: str) -> "zarr.Array[Any]":
    """A worker's handle on an array: opening costs more than scoring a column."""
    return get_array(_opened_group(path), name)


@lru_cache(maxsize=1)
def _labels(path: str) -> NDArray[np.int8]:
    """[C, N] labels of a store."""
    return np.ascontiguousarray(read_array(_opened_group(path), "samples/label").T)


def forget_handles() -> None:
    """Drop what workers in this process hold open: the store may be made anew at the same path."""
    for cached in (_opened_group, _opened_array, _labels):
        cached.cache_clear()


def compile_kernels() -> None:
    """Compile the kernel now (or read it from numba's cache), rather than within the first column."""
    labels_CN = np.array([[1, 0]], dtype=np.int8)
    auroc_by_concept(np.array([[0.1], [0.2]], dtype=np.float32), labels_CN)
