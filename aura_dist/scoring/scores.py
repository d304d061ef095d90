"""Scores of a store: the rows that they are made from, the arrays that hold them, and which of them are there.

```
scores                      attributes: see `Basis`
scores/<site>/<pooling>     [statistic, concept, neuron] float64, attribute `statistics`: the names of the first dim's
                            places. A file holds a *span*: all statistics of a run of whole chunk columns
```
The first place is `made`, a bit mask of the statistics that a span has: bit i for statistic i of the table. So a file
itself says what is in it, and the one task that makes a span writes its file whole. To add statistics, a task reads the
file and writes it again. Files have room for `ROOM` statistics, so that the array may grow by those that are new in the
table. q-values need every p-value of the model, so one process adds them at the end.

Stores of schema 3 are read: an array a statistic, with a *marker*, the bit masks of all chunk columns, and `adjusted`,
an attribute of `scores` that holds the poolings with q-values.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any
from uuid import uuid4

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.errors import ConfigError, InputError, StoreError
from aura_dist.scoring.statistics import STATISTICS
from aura_dist.store.access import (
    damaged,
    errors_of_writing,
    get_array,
    get_sharded,
    is_current,
    is_there,
    read_array,
    read_region,
)
from aura_dist.store.consolidated import forget_consolidated
from aura_dist.store.grid import columns_per_span
from aura_dist.store.record import TIMES
from aura_dist.store.schema import DONE, ArrayLayout, StoreSpec, activation_path, create_arrays, tasks_of
from aura_dist.store.shards import PARTIAL, shard_writes
from aura_dist.store.zarr_adapter import run_in_zarr

logger = logging.getLogger(__name__)

MADE = "made"
ROOM = 32  # places of the first dim in a file
BITS = {name: 1 << i for i, name in enumerate(STATISTICS)}
# Made at the end: a statistic that needs the whole model → the one that it is made from, and the function.
OVER_MODEL = {s.name: s.over_model for s in STATISTICS.values() if s.over_model is not None}


@dataclass(frozen=True)
class Basis:
    """The rows that scores are made from; written into the attributes of `scores`."""

    partial: bool  # whether rows are missing
    num_rows: int
    total_rows: int  # when the store is finished
    digest: str  # sha256 over which tasks were finished: scores that were made from others are replaced
    runs: tuple[tuple[int, int], ...]  # the rows as runs [start, stop)


def basis_of(path: str, group: zarr.Group, spec: StoreSpec, *, partial: bool) -> Basis:
    """The rows to score.

    InputError if the texts have no labels. StoreError if rows are missing and `partial` is not set, or if a concept has
    one class among those that are there.
    """
    spec.check_labelled(path)
    tokens, done = read_array(group, "samples/num_tokens"), read_array(group, DONE)
    runs: list[tuple[int, int]] = []
    for task in tasks_of(tokens, spec.tokens_per_batch):
        if done[task.index]:
            joins = bool(runs) and runs[-1][1] == task.start
            runs[-1:] = [(runs[-1][0], task.stop)] if joins else [*runs[-1:], (task.start, task.stop)]
    num_rows = sum(stop - start for start, stop in runs)
    missing = len(tokens) - num_rows
    if missing and not partial:
        raise StoreError(
            f"--store {path!r}: {missing} of {len(tokens)} rows are missing; run the same `collect` to finish it, "
            "or score what is there with --partial"
        )
    _check_classes(path, spec, read_array(group, "samples/label"), runs)
    return Basis(missing > 0, num_rows, len(tokens), hashlib.sha256(done.tobytes()).hexdigest(), tuple(runs))


def _check_classes(path: str, spec: StoreSpec, labels_NC: NDArray[np.int8], runs: list[tuple[int, int]]) -> None:
    there = np.concatenate([np.arange(*run) for run in runs] or [np.empty(0, np.int64)])
    for c, concept in enumerate(spec.concepts):
        counts = [int((labels_NC[there, c] == value).sum()) for value in (1, 0)]
        if 0 in counts:
            raise StoreError(
                f"--store {path!r}: concept {concept!r} has {counts[0]} positive and {counts[1]} negative rows among "
                f"the {len(there)} that are there; expected one of each or more: collect more rows"
            )


@dataclass(frozen=True)
class Span:
    """Neurons [start, stop) of one site and pooling, whole chunk columns, and the statistics to make of them."""

    site: str
    pooling: str
    index: int
    start: int
    stop: int
    chunk: int  # columns of a chunk of responses
    statistics: tuple[str, ...]

    @property
    def num_columns(self) -> int:
        """Number of chunk columns."""
        return ceil((self.stop - self.start) / self.chunk)

    def columns(self) -> Iterator[slice]:
        """The neurons of each chunk column."""
        for start in range(self.start, self.stop, self.chunk):
            yield slice(start, min(start + self.chunk, self.stop))

    def precedes(self, other: "Span") -> bool:
        """Whether `other` is the next span of the same site and pooling."""
        return (self.site, self.pooling, self.index + 1) == (other.site, other.pooling, other.index)


@dataclass(frozen=True)
class Pending:
    """What one site and pooling lacks: `missing[i]` holds the bits of the statistics that span i lacks."""

    site: str
    pooling: str
    width: int
    chunk: int
    span: int
    item_bytes: int
    missing: NDArray[np.uint64]

    @property
    def num_columns(self) -> int:
        return sum(span.num_columns for span in self.spans())

    @property
    def num_neurons(self) -> int:
        return sum(span.stop - span.start for span in self.spans())

    def spans(self) -> Iterator[Span]:
        for i in np.flatnonzero(self.missing).tolist():
            names = tuple(name for name, bit in BITS.items() if bit & int(self.missing[i]))
            stop = min((i + 1) * self.span, self.width)
            yield Span(self.site, self.pooling, i, i * self.span, stop, self.chunk, names)


def span_bytes(num_concepts: int, num_columns: int) -> int:
    """Bytes that a worker holds of a span: its statistics by chunk column, side by side, and as the file holds them."""
    return 3 * 8 * (1 + len(STATISTICS)) * num_concepts * num_columns


def score_path(site: str, pooling: str) -> str:
    return f"scores/{site}/{pooling}"


def resolve_statistics(names: Sequence[str]) -> tuple[str, ...]:
    """Statistics to make, in the table's order: all if none is named, else those named and those they are made from.

    ConfigError if one is unknown.
    """
    for name in names:
        if name not in STATISTICS:
            raise ConfigError(f"--statistics: expected some of {', '.join(STATISTICS)}, got {name!r}")
    wanted = set(names or STATISTICS) | {OVER_MODEL[name][0] for name in names if name in OVER_MODEL}
    return tuple(name for name in STATISTICS if name in wanted)


def begin(group: zarr.Group, basis: Basis) -> bool:
    """Make `scores` ready for `basis`; returns whether scores of other rows were there and are discarded.

    They are removed before the attributes name the new basis, so that no score of other rows counts for it if this is
    interrupted.
    """
    scores = _scores_of(group)
    had_scores = scores is not None and "digest" in scores.attrs
    if scores is not None and scores.attrs.get("digest") == basis.digest:
        return False
    forget_consolidated(group)
    del group["scores"]  # also where its description alone is lost
    group.create_group("scores", attributes={**asdict(basis), TIMES: {}})
    return had_scores


def discard(group: zarr.Group, paths: Sequence[str] | None = None) -> None:
    """Remove the scores at some paths, by default all, damaged ones too.

    Where all go, their attributes go first, so that none counts if this is interrupted.
    """
    forget_consolidated(group)
    if paths is not None:
        for path in paths:
            del group[path]
        return
    with suppress(StoreError):  # a damaged description goes with the rest
        if (scores := _scores_of(group)) is not None:
            scores.attrs.put({})
    del group["scores"]


def is_scored(group: zarr.Group, spec: StoreSpec, basis: Basis, names: Sequence[str]) -> bool:
    """Whether every neuron has these statistics, made from the rows of `basis`."""
    sites = [(site.name, pooling) for site in spec.sites for pooling in spec.poolings]
    same = score_attributes(group).get("digest") == basis.digest
    return same and all(set(names) <= set(scored_statistics(group, *site)) for site in sites)


def pending(group: zarr.Group, spec: StoreSpec, names: Sequence[str], *, overwrite: bool = False) -> list[Pending]:
    """What every site and pooling lacks of `names`, in model order; those that lack nothing are left out.

    With `overwrite` as if no score were there.
    """
    wanted = np.uint64(sum(BITS[name] for name in names if name not in OVER_MODEL))
    found = []
    for site in spec.sites:
        for pooling in spec.poolings:
            responses = get_array(group, activation_path(site.name, pooling))
            if responses.shape[1] != site.width:
                raise damaged(group, responses.path, f"it has {responses.shape[1]} columns, not {site.width}")
            chunk = responses.chunks[1]
            span = columns_per_span(site.width, chunk)
            made = np.zeros(ceil(site.width / span), np.uint64)
            if not overwrite and is_there(group, score_path(site.name, pooling)):
                made, span = _made(group, site.name, pooling)
            item = Pending(site.name, pooling, site.width, chunk, span, responses.dtype.itemsize, wanted & ~made)
            if item.missing.any():
                found.append(item)
    return found


def count_columns(group: zarr.Group, spec: StoreSpec) -> tuple[int, int]:
    """Number of chunk columns that have some statistic, and of all chunk columns."""
    scored = total = 0
    for site in spec.sites:
        for pooling in spec.poolings:
            chunk = get_array(group, activation_path(site.name, pooling)).chunks[1]
            total += ceil(site.width / chunk)
            if is_there(group, score_path(site.name, pooling)):
                made, span = _made(group, site.name, pooling)
                starts = np.flatnonzero(made) * span
                scored += int(np.ceil((np.minimum(starts + span, site.width) - starts) / chunk).sum())
    return scored, total


def score_layout(num_concepts: int, width: int, chunk: int) -> ArrayLayout:
    """Layout of the scores of one site and pooling, with `chunk` columns in a chunk of its responses."""
    names = (MADE, *STATISTICS)
    assert len(names) <= ROOM, names
    shape, span = (len(names), num_concepts, width), columns_per_span(width, chunk)
    chunks, shards, dims = (1, num_concepts, span), (ROOM, num_concepts, span), ("statistic", "concept", "neuron")
    return ArrayLayout(shape, chunks, "float64", dims, np.nan, shards, names)


def make_array(group: zarr.Group, spec: StoreSpec, site: str, pooling: str) -> None:
    """Make the array of one site and pooling if it is not there yet, or lacks statistics that the table has."""
    path = score_path(site, pooling)
    if is_there(group, path) and STATISTICS.keys() <= set(_names(group, get_sharded(group, path))):
        return
    responses = get_array(group, activation_path(site, pooling))
    layout = score_layout(len(spec.concepts), responses.shape[1], responses.chunks[1])
    with errors_of_writing(str(group.store_path), "a score"):
        create_arrays(group, {path: layout}, replace=True)


def write_span(group: zarr.Group, array: "zarr.Array[Any]", columns: slice, made: Mapping[str, NDArray[Any]]) -> None:
    """Add statistics, name → [C, span], to those of a span, and write its file again."""
    names = _names(group, array)
    held = read_region(group, array, (slice(0, len(names)), slice(0, array.shape[1]), columns))
    for name, values in made.items():
        held[names.index(name)] = values
    held[0] = _as_bits(held[0]) | np.uint64(sum(BITS[name] for name in made))
    for write in shard_writes(array, (0, 0, columns.start), held, f".{uuid4().hex}{PARTIAL}"):  # Dask may run it twice
        run_in_zarr(write())


def _names(group: zarr.Group, array: "zarr.Array[Any]") -> list[str]:
    """Names of the first dim's places; StoreError if the array does not say them."""
    names = array.attrs.get("statistics")
    if not isinstance(names, list) or len(names) != array.shape[0] or names[0] != MADE:
        raise damaged(group, array.path, f"its attribute `statistics` is {names!r}")
    return list(map(str, names))


def _as_bits(made: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Bit masks from how they are stored: NaN where a span is missing."""
    return np.nan_to_num(made).astype(np.uint64)


def _made(group: zarr.Group, site: str, pooling: str) -> tuple[NDArray[np.uint64], int]:
    """[span] bit masks of the statistics that are made, and the neurons of a span; the scores must be there."""
    path = score_path(site, pooling)
    if not is_current(group):
        chunk = get_array(group, activation_path(site, pooling)).chunks[1]
        return read_array(group, f"{path}/scored").astype(np.uint64), chunk
    array = get_sharded(group, path)
    _names(group, array)
    _, num_concepts, width = array.shape
    span = array.chunks[2]
    first = read_region(group, array, (slice(0, 1), slice(0, num_concepts), slice(0, width)))
    return _as_bits(first[0, 0, ::span]), span


def scored_statistics(group: zarr.Group, site: str, pooling: str) -> tuple[str, ...]:
    """Statistics that every neuron of a site has, in the table's order."""
    about = score_attributes(group)
    if "digest" not in about or not is_there(group, score_path(site, pooling)):  # of unknown rows, or not there
        return ()
    bits = int(np.bitwise_and.reduce(_made(group, site, pooling)[0]))
    adjusted = set(OVER_MODEL) if pooling in about.get("adjusted", ()) else set()  # schema 3
    return tuple(name for name in STATISTICS if name in adjusted or bits & BITS[name])


@dataclass(frozen=True)
class StoredStatistic:
    """One statistic of a site and pooling as it is stored."""

    group: zarr.Group
    array: "zarr.Array[Any]"
    place: int | None  # in the first dim; None where the array holds it alone
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, int]:
        num_concepts, width = self.array.shape[-2:]
        return num_concepts, width

    @property
    def columns(self) -> int:
        """Neurons that are read at once."""
        return self.array.chunks[-1]

    def read(self, neurons: slice) -> NDArray[Any]:
        """[C, neurons] of whole spans; StoreError if some are missing or damaged."""
        places = () if self.place is None else (slice(self.place, self.place + 1),)
        region = (*places, slice(0, self.shape[0]), neurons)
        values = read_region(self.group, self.array, region, complete=True)
        return values.reshape(values.shape[-2:]).astype(self.dtype, copy=False)


def stored_statistic(group: zarr.Group, site: str, pooling: str, name: str) -> StoredStatistic:
    """A statistic that was scored; StoreError if its array is missing or damaged."""
    path, dtype = score_path(site, pooling), np.dtype(STATISTICS[name].dtype)
    if not is_current(group):
        return StoredStatistic(group, get_array(group, f"{path}/{name}"), None, dtype)
    array = get_sharded(group, path)
    return StoredStatistic(group, array, _names(group, array).index(name), dtype)


def read_statistic(group: zarr.Group, site: str, pooling: str, name: str) -> NDArray[Any]:
    """[C, D] a statistic that was scored; StoreError if its array is missing, damaged or lacks a part."""
    stored = stored_statistic(group, site, pooling, name)
    return stored.read(slice(0, stored.shape[1]))


def read_scores(
    group: zarr.Group, spec: StoreSpec, concept: str, pooling: str, statistic: str = "auroc"
) -> dict[str, NDArray[Any]]:
    """Site → [D] one statistic of one concept, in model order.

    InputError if the store has no such concept or pooling, StoreError if it has not been scored, or not wholly.
    """
    which = spec.index_of(concept, str(group.store_path))
    if pooling not in spec.poolings:
        from_tokens = len(spec.tokens) == len(spec.sites)
        verb, words = ("score", [pooling]) if from_tokens else ("collect", [*spec.poolings, pooling])
        raise InputError(
            f"--pooling: expected one of {', '.join(spec.poolings) or 'those to make from tokens'}, got {pooling!r}; "
            f"{verb} with `--pooling {' '.join(words)}` for it"
        )
    scores: dict[str, NDArray[Any]] = {}
    for site in spec.sites:
        if statistic not in scored_statistics(group, site.name, pooling):
            raise StoreError(
                f"--store {group.store_path}: {site.name} has not been scored ({statistic}); "
                "run `aura-dist score` first"
            )
        scores[site.name] = read_statistic(group, site.name, pooling, statistic)[which]
    basis = score_attributes(group)
    if basis["partial"]:
        store, num_rows = str(group.store_path), basis["num_rows"]
        logger.warning("%s: the scores are of %d of %d rows", store, num_rows, basis["total_rows"])
    return scores


def score_attributes(group: zarr.Group) -> dict[str, Any]:
    """The fields of `Basis`, and the times; empty if there are no scores."""
    scores = _scores_of(group)
    return {} if scores is None else dict(scores.attrs)


def _scores_of(group: zarr.Group) -> zarr.Group | None:
    """The group of scores, None if there is none; StoreError if its description is damaged."""
    if not is_there(group, "scores"):
        return None
    try:
        scores = group["scores"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(group, "scores", error) from error
    if not isinstance(scores, zarr.Group):
        raise damaged(group, "scores", "it is an array")
    return scores


def adjust(group: zarr.Group, spec: StoreSpec) -> None:
    """Make the statistics that need the whole model, for each pooling that lacks one in some span."""
    for pooling in spec.poolings:
        for name in OVER_MODEL:
            if any(not (_made(group, site.name, pooling)[0] & np.uint64(BITS[name])).all() for site in spec.sites):
                with errors_of_writing(str(group.store_path), "a score"):
                    _adjust(group, spec, pooling, name)


def _adjust(group: zarr.Group, spec: StoreSpec, pooling: str, name: str) -> None:
    forget_consolidated(group)
    source, make = OVER_MODEL[name]
    widths = [site.width for site in spec.sites]
    all_CD = np.empty((len(spec.concepts), sum(widths)))
    parts: list[NDArray[Any]] = np.split(all_CD, np.cumsum(widths)[:-1], axis=1)  # views: filled here, then read
    for site, part in zip(spec.sites, parts, strict=True):
        part[...] = read_statistic(group, site.name, pooling, source)
    for values_D in all_CD:
        values_D[...] = make(values_D)
    for site, part in zip(spec.sites, parts, strict=True):
        array = get_sharded(group, score_path(site.name, pooling))
        for start in range(0, site.width, array.chunks[2]):
            span = slice(start, min(start + array.chunks[2], site.width))
            write_span(group, array, span, {name: part[:, span]})
