"""Neurons → intervals → owners: which columns of a site a rank sees, which it writes, and what ranks send each other.

Under tensor parallelism a rank sees a slice of a site's columns, or all where the strategy replicates the site. The
chunk grid does not depend on that: the rank that sees a chunk's first column owns the chunk, and ranks that see others
of its columns send it their pooled values. Ranks share a replicated site's chunks evenly. Columns are half-open
intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from math import ceil

Interval = tuple[int, int]


@dataclass(frozen=True)
class Move:
    """Columns that are copied: `source` [start, stop) → `target` [start, stop), equally wide."""

    source: Interval
    target: Interval


@dataclass(frozen=True)
class ColumnPlan:
    """What one rank does with the columns of one site.

    Attributes
    ----------
    num_seen
        Number of columns that the rank's tap passes.
    owned
        Columns that the rank writes, as whole chunks, ascending; empty where it owns none.
    keeps
        From the seen columns to the rank's own buffer, which holds the owned columns side by side.
    sends
        Rank → intervals of the seen columns that it is sent.
    receives
        Rank → intervals of the rank's own buffer that come from it, in the order in which it sends them.
    """

    num_seen: int
    owned: tuple[Interval, ...]
    keeps: tuple[Move, ...]
    sends: dict[int, tuple[Interval, ...]]
    receives: dict[int, tuple[Interval, ...]]

    @property
    def num_owned(self) -> int:
        return width_of(self.owned)


def width_of(intervals: Sequence[Interval]) -> int:
    """Number of columns in `intervals`."""
    return sum(stop - start for start, stop in intervals)


def split_columns(width: int, num_ranks: int, num_blocks: int = 1) -> list[tuple[Interval, ...]]:
    """Each rank's columns when a width is split over ranks: ⌈block / ranks⌉ to each, the last shorter or empty.

    Parameters
    ----------
    width
        Number of columns.
    num_ranks
        Ranks that share them.
    num_blocks
        Equal blocks, each split over the ranks on its own: 2 for a fused gate and up projection.
    """
    block = width // num_blocks
    assert block * num_blocks == width, "a fused width is a multiple of its blocks"
    share = ceil(block / num_ranks)
    edges = [(min(rank * share, block), min((rank + 1) * share, block)) for rank in range(num_ranks)]
    return [
        tuple((b * block + start, b * block + stop) for b in range(num_blocks) if stop > start) for start, stop in edges
    ]


def plan_columns(width: int, chunk: int, seen: Sequence[Sequence[Interval]]) -> list[ColumnPlan]:
    """The column plan of every rank.

    Parameters
    ----------
    width, chunk
        Columns of the site, and of one chunk.
    seen
        Per rank, the columns it sees, in the order in which its output holds them: disjoint and together all of
        the site's, or all of them on every rank.
    """
    num_ranks = len(seen)
    replicated = all(tuple(s) == ((0, width),) for s in seen)
    assert replicated or sum(map(width_of, seen)) == width, "every column is seen once, or by all"
    chunks = [(first, min(first + chunk, width)) for first in range(0, width, chunk)]
    if replicated:  # runs of chunks whose lengths differ by one at most
        owners = [chunk * num_ranks // len(chunks) for chunk in range(len(chunks))]
    else:
        owners = [_rank_of(seen, first) for first, _ in chunks]
    owned = [_joined([c for c, owner in zip(chunks, owners, strict=True) if owner == r]) for r in range(num_ranks)]
    plans = [ColumnPlan(width_of(seen[r]), owned[r], (), {}, {}) for r in range(num_ranks)]
    for rank, plan in enumerate(plans):
        plans[rank] = replace(plan, keeps=tuple(_moves(seen[rank], owned[rank])))
    for rank, owner in permutations(range(num_ranks), 2):
        moves = [] if replicated else _moves(seen[rank], owned[owner])
        if moves:
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


def whole_site(width: int) -> ColumnPlan:
    """The plan of a rank that sees and writes every column."""
    return ColumnPlan(width, ((0, width),), (Move((0, width), (0, width)),), {}, {})


def _rank_of(seen: Sequence[Sequence[Interval]], column: int) -> int:
    return next(rank for rank, mine in enumerate(seen) for start, stop in mine if start <= column < stop)


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
