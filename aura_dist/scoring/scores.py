"""Scores of a store: the rows that they are made from, the arrays that hold them, and which of them are there.

```
scores                                   attributes: see `Basis`; `adjusted`, the poolings that have their q-values
scores/<site>/<pooling>/<statistic>      [concept, neuron], chunked as the activations' columns
scores/<site>/<pooling>/scored           [chunk column] uint32, one chunk each, the *marker*: bit i for statistic i of
                                         the table, set once a task has written all statistics of the column
```
One task writes all of a chunk column (`Column`). q-values need every p-value of the model, so one process writes
them at the end and then adds the pooling to `adjusted`.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.errors import ConfigError, InputError, StoreError
from aura_dist.scoring.statistics import STATISTICS
from aura_dist.store.access import damaged, errors_of_writing, get_array, is_there, prepare_write, read_array
from aura_dist.store.record import TIMES
from aura_dist.store.schema import DONE, ArrayLayout, StoreSpec, activation_path, create_arrays, tasks_of
from aura_dist.store.zarr_adapter import run_in_zarr

logger = logging.getLogger(__name__)

MARKER, ADJUSTED = "scored", "adjusted"
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

    StoreError if rows are missing and `partial` is not set, or if a concept has one class among those that are there.
    """
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
class Column:
    """One chunk column of one site and pooling, neurons [start, stop), and the statistics to make of it."""

    site: str
    pooling: str
    index: int
    start: int
    stop: int
    statistics: tuple[str, ...]
    marker: int  # its marker after `statistics` are written

    def precedes(self, other: "Column") -> bool:
        """Whether `other` is the next column of the same site and pooling."""
        return (self.site, self.pooling, self.index + 1) == (other.site, other.pooling, other.index)


@dataclass(frozen=True)
class Pending:
    """What one site and pooling lacks: `missing[i]` holds the bits of the statistics that chunk column i lacks."""

    site: str
    pooling: str
    width: int
    chunk: int
    item_bytes: int
    markers: NDArray[np.uint32]
    missing: NDArray[np.uint32]

    @property
    def num_columns(self) -> int:
        return int(np.count_nonzero(self.missing))

    @property
    def num_neurons(self) -> int:
        starts = np.flatnonzero(self.missing) * self.chunk
        return int((np.minimum(starts + self.chunk, self.width) - starts).sum())

    def columns(self) -> Iterator[Column]:
        for i in np.flatnonzero(self.missing).tolist():
            names = tuple(name for name, bit in BITS.items() if bit & self.missing[i])
            stop, marker = min((i + 1) * self.chunk, self.width), int(self.markers[i] | self.missing[i])
            yield Column(self.site, self.pooling, i, i * self.chunk, stop, names, marker)


def score_path(site: str, pooling: str, name: str) -> str:
    return f"scores/{site}/{pooling}/{name}"


def resolve_statistics(names: Sequence[str]) -> tuple[str, ...]:
    """Statistics to make, in the table's order: all if none is named, else those named and those they are made from.

    ConfigError if one is unknown.
    """
    for name in names:
        if name not in STATISTICS:
            raise ConfigError(f"--statistics: expected some of {', '.join(STATISTICS)}, got {name!r}")
    wanted = set(names or STATISTICS) | {OVER_MODEL[name][0] for name in names if name in OVER_MODEL}
    return tuple(name for name in STATISTICS if name in wanted)


def begin(group: zarr.Group, spec: StoreSpec, basis: Basis) -> bool:
    """Make `scores` ready for `basis`; returns whether scores of other rows were there and are discarded.

    The markers are cleared before the attributes name the new basis, so that no score of other rows counts for it
    if this is interrupted.
    """
    scores = _scores_of(group)
    had_scores = scores is not None and "digest" in scores.attrs
    if scores is None:
        scores = group.create_group("scores")
    elif scores.attrs.get("digest") == basis.digest:
        return False
    scores.attrs[ADJUSTED] = []
    for marker in _markers(group, spec):
        get_array(group, marker)[...] = 0
    scores.attrs.update({**asdict(basis), TIMES: {}})
    return had_scores


def discard(group: zarr.Group, spec: StoreSpec) -> None:
    """Remove all scores, damaged ones too; their attributes first, so that none counts if this is interrupted."""
    with suppress(StoreError):  # a damaged description goes with the rest
        if (scores := _scores_of(group)) is not None:
            scores.attrs.put({})
    for name in (*_markers(group, spec, damaged_too=True), "scores"):
        del group[name]


def _markers(group: zarr.Group, spec: StoreSpec, *, damaged_too: bool = False) -> list[str]:
    """Paths of the markers that are there, or with `damaged_too` of all that there may be."""
    names = [score_path(site.name, pooling, MARKER) for site in spec.sites for pooling in spec.poolings]
    return names if damaged_too else [name for name in names if is_there(group, name)]


def pending(group: zarr.Group, spec: StoreSpec, names: Sequence[str], *, overwrite: bool = False) -> list[Pending]:
    """What every site and pooling lacks of `names`, in model order; those that lack nothing are left out.

    With `overwrite` as if no score were there.
    """
    wanted = sum(BITS[name] for name in names if name not in OVER_MODEL)
    found = []
    for site in spec.sites:
        for pooling in spec.poolings:
            responses = get_array(group, activation_path(site.name, pooling))
            if responses.shape[1] != site.width:
                raise damaged(group, responses.path, f"it has {responses.shape[1]} columns, not {site.width}")
            chunk, marker = responses.chunks[1], score_path(site.name, pooling, MARKER)
            counts = not overwrite and is_there(group, marker)
            markers = read_array(group, marker) if counts else np.zeros(ceil(site.width / chunk), np.uint32)
            missing = np.uint32(wanted) & ~markers
            item = Pending(site.name, pooling, site.width, chunk, responses.dtype.itemsize, markers, missing)
            if item.num_columns:
                found.append(item)
    return found


def count_columns(group: zarr.Group, spec: StoreSpec) -> tuple[int, int]:
    """Number of chunk columns that have some statistic, and of all chunk columns."""
    scored = total = 0
    for site in spec.sites:
        for pooling in spec.poolings:
            marker = score_path(site.name, pooling, MARKER)
            if is_there(group, marker):
                markers = read_array(group, marker)
                scored, total = scored + int(np.count_nonzero(markers)), total + len(markers)
            else:
                total += ceil(site.width / get_array(group, activation_path(site.name, pooling)).chunks[1])
    return scored, total


def make_arrays(group: zarr.Group, spec: StoreSpec, site: str, pooling: str, names: Sequence[str]) -> None:
    """Make the arrays of one site and pooling that are not there yet, and its marker."""
    place, (_, chunk) = f"scores/{site}/{pooling}", get_array(group, activation_path(site, pooling)).chunks
    width = next(s.width for s in spec.sites if s.name == site)
    num_concepts, layouts = len(spec.concepts), {}
    for name in names:
        dtype, dims = STATISTICS[name].dtype, ("concept", "neuron")
        missing = np.nan if dtype == "float64" else 0
        layouts[name] = ArrayLayout((num_concepts, width), (num_concepts, chunk), dtype, dims, missing)
    layouts[MARKER] = ArrayLayout((ceil(width / chunk),), (1,), "uint32", ("chunk_column",), 0)
    with errors_of_writing(str(group.store_path), "a score"):
        create_arrays(group, {f"{place}/{name}": layout for name, layout in layouts.items()})


def scored_statistics(group: zarr.Group, site: str, pooling: str) -> tuple[str, ...]:
    """Statistics that every neuron of a site has, in the table's order."""
    marker, about = score_path(site, pooling, MARKER), score_attributes(group)
    if "digest" not in about or not is_there(group, marker):  # of unknown rows, or not there
        return ()
    bits = int(np.bitwise_and.reduce(read_array(group, marker)))
    over_model = set(OVER_MODEL) if pooling in about[ADJUSTED] else set()
    return tuple(name for name in STATISTICS if name in over_model or bits & BITS[name])


def read_statistic(group: zarr.Group, site: str, pooling: str, name: str) -> NDArray[Any]:
    """[C, D] a statistic that was scored; StoreError if its array is missing, damaged or lacks a chunk."""
    return read_array(group, score_path(site, pooling, name), complete=True)


def read_scores(
    group: zarr.Group, spec: StoreSpec, concept: str, pooling: str, statistic: str = "auroc"
) -> dict[str, NDArray[Any]]:
    """Site → [D] one statistic of one concept, in model order.

    InputError if the store has no such concept or pooling, StoreError if it has not been scored, or not wholly.
    """
    if concept not in spec.concepts:
        raise InputError(f"--concept: expected one of {', '.join(spec.concepts)}, got {concept!r}")
    if pooling not in spec.poolings:
        raise InputError(
            f"--pooling: expected one of {', '.join(spec.poolings)}, got {pooling!r}; "
            f"collect with `--pooling {' '.join([*spec.poolings, pooling])}` for it"
        )
    which = spec.concepts.index(concept)
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
    """The fields of `Basis`, the poolings that have q-values, and the times; empty if there are no scores."""
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
    """Make the statistics that need the whole model, for every pooling that lacks them: the q-values.

    Call it when every p-value is written. If it is interrupted, the next call does it again.
    """
    with errors_of_writing(str(group.store_path), "a score"):
        adjusted = score_attributes(group).get(ADJUSTED, [])
        for pooling in [p for p in spec.poolings if p not in adjusted]:
            for name in OVER_MODEL:
                _adjust(group, spec, pooling, name)
            group["scores"].attrs[ADJUSTED] = adjusted = [*adjusted, pooling]


def _adjust(group: zarr.Group, spec: StoreSpec, pooling: str, name: str) -> None:
    source, make = OVER_MODEL[name]
    widths = [site.width for site in spec.sites]
    all_CD = np.empty((len(spec.concepts), sum(widths)))
    parts: list[NDArray[Any]] = np.split(all_CD, np.cumsum(widths)[:-1], axis=1)  # views: filled here, then read
    for site, part in zip(spec.sites, parts, strict=True):
        part[...] = read_statistic(group, site.name, pooling, source)
    for values_D in all_CD:
        values_D[...] = make(values_D)
    for site, part in zip(spec.sites, parts, strict=True):
        make_arrays(group, spec, site.name, pooling, [name])
        write = prepare_write(get_array(group, score_path(site.name, pooling, name)), (0, 0), part)
        run_in_zarr(write())
