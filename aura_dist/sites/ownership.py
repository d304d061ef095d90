"""Neurons → intervals → owners: which columns of a site a rank sees, which it writes, and what ranks send each other.

Under tensor parallelism a rank sees a slice of a site's columns, or all where the strategy replicates the site. The
grid of shards does not depend on that. The shards of all sites are dealt to the ranks, whatever these see, and ranks
that see columns of a shard send their pooled values to its owner. Columns are half-open intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import product
from math import ceil

Interval = tuple[int, int]


@dataclass(frozen=True)
class Move:
    """Columns that are copied: `source` [start, stop) → `target` [start, stop), equally wide."""

    source: Interval
    target: Interval


@dataclass(frozen=True)
class ColumnPlan:
    """What one rank does with the columns of one site."""

    num_seen: int  # columns that the rank's tap passes
    owned: tuple[Interval, ...]  # columns that the rank writes, as whole shards, ascending; empty where it owns none
    keeps: tuple[Move, ...]  # from the seen columns to the rank's own buffer: the owned columns side by side
    sends: dict[int, tuple[Interval, ...]]  # rank → intervals of the seen columns that it is sent
    receives: dict[int, tuple[Interval, ...]]  # rank → intervals of the own buffer that it fills, in its order

    @property
    def num_owned(self) -> int:
        return width_of(self.owned)


def width_of(intervals: Sequence[Interval]) -> int:
    """Number of columns in `intervals`."""
    return sum(stop - start for start, stop in intervals)


def split_columns(width: int, num_ranks: int, num_blocks: int = 1) -> list[tuple[Interval, ...]]:
    """Each rank's columns when a width is split over ranks: ⌈block / ranks⌉ to each, the last shorter or empty.

    `num_blocks` equal blocks are each split over the ranks on their own: 2 for a fused gate and up projection.
    """
    block = width // num_blocks
    assert block * num_blocks == width, "a fused width is a multiple of its blocks"
    share = ceil(block / num_ranks)
    edges = [(min(rank * share, block), min((rank + 1) * share, block)) for rank in range(num_ranks)]
    return [
        tuple((b * block + start, b * block + stop) for b in range(num_blocks) if stop > start) for start, stop in edges
    ]


def deal_shards(sites: Sequence[tuple[int, int]], num_ranks: int) -> list[tuple[int, ...]]:
    """The rank that owns each shard of each site, for (width, columns of a shard) of every site.

    The widest shards go first, each to the rank with the fewest columns so far; so ranks write about equally much.
    """
    shards = [(min(shard, width - at), s) for s, (width, shard) in enumerate(sites) for at in range(0, width, shard)]
    if num_ranks == 1:
        owners = [0] * len(shards)
    else:
        owners, loads = [0] * len(shards), [(0, rank) for rank in range(num_ranks)]
        heapify(loads)
        for i in sorted(range(len(shards)), key=lambda i: -shards[i][0]):
            load, owners[i] = loads[0]
            heapreplace(loads, (load + shards[i][0], owners[i]))
    dealt: list[list[int]] = [[] for _ in sites]
    for (_, site), owner in zip(shards, owners, strict=True):
        dealt[site].append(owner)
    return [tuple(owners) for owners in dealt]


def owned_columns(width: int, shard: int, owners: Sequence[int], num_ranks: int) -> list[tuple[Interval, ...]]:
    """What every rank writes of a site whose shards of `shard` columns have these `owners`."""
    of_rank: dict[int, list[Interval]] = {}
    for first, owner in zip(range(0, width, shard), owners, strict=True):
        of_rank.setdefault(owner, []).append((first, min(first + shard, width)))
    return [_joined(of_rank.get(rank, [])) for rank in range(num_ranks)]


def _is_replicated(width: int, seen: Sequence[Sequence[Interval]]) -> bool:
    return all(tuple(s) == ((0, width),) for s in seen)


def plan_columns(width: int, shard: int, seen: Sequence[Sequence[Interval]], owners: Sequence[int]) -> list[ColumnPlan]:
    """The column plan of every rank, for a site of `width` columns in shards of `shard`, which `owners` write.

    `seen` holds for each rank the columns that it sees, in the order of its tap: disjoint and together all of the
    site's, or all of them on every rank.
    """
    num_ranks, replicated = len(seen), _is_replicated(width, seen)
    assert replicated or sum(map(width_of, seen)) == width, "every column is seen once, or by all"
    owned = owned_columns(width, shard, owners, num_ranks)
    plans = [
        ColumnPlan(width_of(seen[r]), owned[r], tuple(_moves(seen[r], owned[r])), {}, {}) for r in range(num_ranks)
    ]
    for owner in [] if replicated else sorted(set(owners)):
        for rank in range(num_ranks):
            moves = _moves(seen[rank], owned[owner])
            if moves and rank != owner:
                plans[rank].sends[owner] = tuple(m.source for m in moves)
                plans[owner].receives[rank] = tuple(m.target for m in moves)
    return plans


def _moves(seen: Sequence[Interval], owned: Sequence[Interval]) -> list[Move]:
    """Which of the seen columns go where among the owned ones."""
    moves = []
    for (place, start, stop), (target, first, last) in product(_placed(seen), _placed(owned)):
        a, b = max(start, first), min(stop, last)
        if a < b:
            moves.append(Move((place + a - start, place + b - start), (target + a - first, target + b - first)))
    return moves


def _joined(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """Neighbouring intervals as one."""
    joined: list[Interval] = []
    for start, stop in intervals:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def _placed(intervals: Sequence[Interval]) -> list[tuple[int, int, int]]:
    """(place, start, stop) of each interval, laid side by side."""
    placed, place = [], 0
    for start, stop in intervals:
        placed.append((place, start, stop))
        place += stop - start
    return placed
