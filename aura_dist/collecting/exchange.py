"""Under tensor parallelism, ranks send each other the pooled values of columns that one sees and another writes.

A message holds the values of one row chunk, never single tokens. It goes through host memory. Where the ranks' columns
are whole chunks of the store, nothing is sent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aura_dist.ranks.team import Team
from aura_dist.sites.ownership import ColumnPlan, Interval, width_of
from aura_dist.store.writer import RowBuffer

Key = tuple[str, str]  # (site, pooling)
_ALIGNMENT = 8


class ColumnExchange:
    """Collects pooled values for the other ranks of a row worker, and exchanges them once a row chunk.

    Parameters
    ----------
    plans
        Site → column plan of this rank.
    dtypes
        Dtype of the stored values of each array.
    num_rows
        Rows of a chunk.
    team
        The other ranks.
    """

    def __init__(
        self, plans: Mapping[str, ColumnPlan], dtypes: Mapping[Key, torch.dtype], num_rows: int, team: Team
    ) -> None:
        self._plans = plans
        self._team = team
        self._outgoing = _messages({key: plans[key[0]].sends for key in dtypes}, dtypes, num_rows)
        self._incoming = _messages({key: plans[key[0]].receives for key in dtypes}, dtypes, num_rows)

    def stage(self, key: Key, pooled_BD: Tensor, rows: slice) -> None:
        """Copy the columns of a batch that other ranks write into their messages; D are all columns seen here."""
        for peer, intervals in self._plans[key[0]].sends.items():
            for interval in intervals:
                self._outgoing[peer].parts[key, interval][rows].copy_(pooled_BD[:, slice(*interval)])

    def complete(self, buffer: RowBuffer) -> None:
        """Exchange the messages of a row chunk, and copy the received values into `buffer`.

        All ranks of the row worker must call this together.
        """
        self._team.exchange(
            {peer: m.content for peer, m in self._outgoing.items()},
            {peer: m.content for peer, m in self._incoming.items()},
        )
        for message in self._incoming.values():
            for (key, interval), values in message.parts.items():
                torch.from_numpy(buffer[key])[:, slice(*interval)] = values


@dataclass(frozen=True)
class _Message:
    """One flat host tensor of bytes, and views of its [rows, columns] parts."""

    content: Tensor
    parts: Mapping[tuple[Key, Interval], Tensor]


def _messages(
    intervals: Mapping[Key, Mapping[int, tuple[Interval, ...]]], dtypes: Mapping[Key, torch.dtype], num_rows: int
) -> dict[int, _Message]:
    """Peer → message; both ends order the parts by array, then by interval."""
    parts_of: dict[int, list[tuple[Key, Interval]]] = {}
    for key, by_peer in intervals.items():
        for peer, parts in by_peer.items():
            parts_of.setdefault(peer, []).extend((key, interval) for interval in parts)
    return {peer: _message(parts, dtypes, num_rows) for peer, parts in parts_of.items()}


def _message(parts: Sequence[tuple[Key, Interval]], dtypes: Mapping[Key, torch.dtype], num_rows: int) -> _Message:
    sizes = [num_rows * width_of([interval]) * dtypes[key].itemsize for key, interval in parts]
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    content = torch.empty(sum(padded), dtype=torch.uint8)
    views = {
        (key, interval): block[:size].view(dtypes[key]).view(num_rows, -1)
        for (key, interval), size, block in zip(parts, sizes, content.split_with_sizes(padded), strict=True)
    }
    return _Message(content, views)
