"""Scores of a store: which rows they are made from, which are there, and the arrays they go into.

```
scores                                   attributes: see `Basis`; `adjusted`, the poolings whose q-values are made
scores/<site>/<pooling>/<statistic>      [concept, neuron], chunked as the activations' columns
scores/<site>/<pooling>/scored           [chunk column] uint32, one chunk each: bit i for the i-th statistic of the
                                         table, set once all that a task makes of the column are written
```
A chunk column is one task's and has one writer (`columns`). q-values need every p-value of the model: they are
written at the end, by one process, and `adjusted` says that they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.sync import sync

from aura_dist.errors import ConfigError, StoreError
from aura_dist.scoring.basis import Basis
from aura_dist.scoring.statistics import STATISTICS, benjamini_hochberg
from aura_dist.store.access import damaged, get_array, is_there, read_array
from aura_dist.store.schema import Layout, StoreSpec, activation_path, create_arrays
from aura_dist.store.times import TIMES
from aura_dist.store.writing import errors_of_writing, prepare_write

MARKER, ADJUSTED = "scored", "adjusted"
BITS = {name: 1 << i for i, name in enumerate(STATISTICS)}
# What is made at the end from what the columns hold.
OVER_MODEL = {"q_value": "p_value"}


@dataclass(frozen=True)
class Column:
    """One chunk column of one site and pooling, and what is to be made of it.

    `marker` is its marker once `statistics` are written too.
    """

    site: str
    pooling: str
    index: int
    start: int
    stop: int
    statistics: tuple[str, ...]
    marker: int

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
    """Statistics to make, in the table's order: all if none is named, and what the named ones are made from.

    Raises
    ------
    ConfigError
        One is unknown.
    """
    for name in names:
        if name not in STATISTICS:
            raise ConfigError(f"--statistics: expected some of {', '.join(STATISTICS)}, got {name!r}")
    wanted = set(names or STATISTICS) | {OVER_MODEL[name] for name in names if name in OVER_MODEL}
    return tuple(name for name in STATISTICS if name in wanted)


def begin(group: zarr.Group, spec: StoreSpec, basis: Basis) -> bool:
    """Make `scores` ready for `basis`; whether scores of other rows stood there and are to be made anew.

    The markers are cleared before the attributes say whose they are, so that being cut off in between leaves
    nothing that counts.
    """
    scores = _scores_of(group)
    stood = scores is not None and "digest" in scores.attrs
    if scores is None:
        scores = group.create_group("scores")
    elif scores.attrs.get("digest") == basis.digest:
        return False
    scores.attrs[ADJUSTED] = []
    for marker in _markers(group, spec):
        get_array(group, marker)[...] = 0
    scores.attrs.update({**asdict(basis), TIMES: {}})
    return stood


def discard(group: zarr.Group, spec: StoreSpec) -> None:
    """Remove all scores, whatever state they are in; first what says that they count: a removal may be cut off."""
    with suppress(StoreError):  # a damaged description goes with the rest
        if (scores := _scores_of(group)) is not None:
            scores.attrs.put({})
    for name in (*_markers(group, spec, damaged_too=True), "scores"):
        del group[name]


def _markers(group: zarr.Group, spec: StoreSpec, *, damaged_too: bool = False) -> list[str]:
    """Paths of the markers that are there; of all that there may be, if damaged ones are wanted too."""
    names = [score_path(site.name, pooling, MARKER) for site in spec.sites for pooling in spec.poolings]
    return names if damaged_too else [name for name in names if is_there(group, name)]


def pending(group: zarr.Group, spec: StoreSpec, names: Sequence[str], *, anew: bool = False) -> list[Pending]:
    """What every site and pooling lacks of `names`, in model order; those that lack nothing are left out.

    With `anew` as if no score were there.
    """
    wanted = sum(BITS[name] for name in names if name not in OVER_MODEL)
    found = []
    for site in spec.sites:
        for pooling in spec.poolings:
            responses = get_array(group, activation_path(site.name, pooling))
            chunk, marker = responses.chunks[1], score_path(site.name, pooling, MARKER)
            counts = not anew and is_there(group, marker)
            markers = read_array(group, marker) if counts else np.zeros(ceil(site.width / chunk), np.uint32)
            missing = np.uint32(wanted) & ~markers
            item = Pending(site.name, pooling, site.width, chunk, responses.dtype.itemsize, markers, missing)
            if item.num_columns:
                found.append(item)
    return found


def count_columns(group: zarr.Group, spec: StoreSpec) -> tuple[int, int]:
    """Chunk columns of which some statistic stands, and all there are; reads the markers alone where they stand."""
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
        dtype = STATISTICS[name].dtype
        fill_value = np.nan if dtype == "float64" else 0
        layouts[name] = Layout((num_concepts, width), (num_concepts, chunk), dtype, ("concept", "neuron"), fill_value)
    layouts[MARKER] = Layout((ceil(width / chunk),), (1,), "uint32", ("chunk_column",), 0)
    with errors_of_writing(str(group.store_path), "a score"):
        create_arrays(group, {f"{place}/{name}": layout for name, layout in layouts.items()})


def scored_statistics(group: zarr.Group, site: str, pooling: str) -> tuple[str, ...]:
    """Statistics that stand for every neuron of a site, in the table's order."""
    marker, about = score_path(site, pooling, MARKER), score_attributes(group)
    if "digest" not in about or not is_there(group, marker):  # of unknown rows, or not there
        return ()
    bits = int(np.bitwise_and.reduce(read_array(group, marker)))
    over_model = set(OVER_MODEL) if pooling in about[ADJUSTED] else set()
    return tuple(name for name in STATISTICS if name in over_model or bits & BITS[name])


def read_statistic(group: zarr.Group, site: str, pooling: str, name: str) -> NDArray[Any]:
    """[C, D] a statistic that stands; StoreError if its array is missing, damaged or lacks a chunk."""
    return read_array(group, score_path(site, pooling, name), complete=True)


def score_attributes(group: zarr.Group) -> dict[str, Any]:
    """What the scores are made from: the fields of `Basis`, and which poolings have q-values; empty if none stand."""
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
        raise damaged(group, "scores", "an array stands there")
    return scores


def _adjusted(group: zarr.Group) -> list[str]:
    return list(score_attributes(group).get(ADJUSTED, []))


def adjust(group: zarr.Group, spec: StoreSpec) -> None:
    """Make the q-values of every pooling that lacks them: per concept, over all neurons of the model.

    To be called once every p-value stands. Interrupted, it is done again.
    """
    with errors_of_writing(str(group.store_path), "a score"):
        for pooling in [p for p in spec.poolings if p not in _adjusted(group)]:
            _adjust(group, spec, pooling)


def _adjust(group: zarr.Group, spec: StoreSpec, pooling: str) -> None:
    widths = [site.width for site in spec.sites]
    q_CD = np.empty((len(spec.concepts), sum(widths)))
    parts: list[NDArray[Any]] = np.split(q_CD, np.cumsum(widths)[:-1], axis=1)  # views: filled here, then read
    for site, part in zip(spec.sites, parts, strict=True):
        part[...] = read_statistic(group, site.name, pooling, "p_value")
    for p_D in q_CD:
        p_D[...] = benjamini_hochberg(p_D)
    for site, part in zip(spec.sites, parts, strict=True):
        make_arrays(group, spec, site.name, pooling, ["q_value"])
        write = prepare_write(get_array(group, score_path(site.name, pooling, "q_value")), (0, 0), part)
        sync(write())
    group["scores"].attrs[ADJUSTED] = [*_adjusted(group), pooling]
