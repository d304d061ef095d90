"""Exchange of pooled values between the ranks of a row worker, where the columns they see are not whole chunks.

Messages hold pooled rows × columns, never tokens, and go through host memory once a row chunk. Where widths align
nothing is sent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aura_dist.ranks.team import Team
from aura_dist.sites.ownership import ColumnPlan, Interval
from aura_dist.store.writer import RowBuffer

Key = tuple[str, str]
_ALIGNMENT = 8


class ColumnExchange:
    """Gathers a row chunk's pooled values for other ranks, sends them, and fills in those from other ranks.

    Parameters
    ----------
    plans
        Site → column plan of this rank.
    dtypes
        (site, pooling) → dtype of the stored values.
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
        """Copy what other ranks write of a batch's pooled values (all seen columns) into the messages."""
        for peer, intervals in self._plans[key[0]].sends.items():
            for interval in intervals:
                self._outgoing[peer].parts[key, interval][rows].copy_(pooled_BD[:, slice(*interval)])

    def complete(self, buffer: RowBuffer) -> None:
        """Exchange the messages of a row chunk; all ranks of the row worker must do so together."""
        self._team.exchange(
            {peer: m.content for peer, m in self._outgoing.items()},
            {peer: m.content for peer, m in self._incoming.items()},
        )
        for peer, message in self._incoming.items():
            for key, values in buffer.items():
                for interval in self._plans[key[0]].receives.get(peer, ()):
                    torch.from_numpy(values)[:, slice(*interval)] = message.parts[key, interval]


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
    slices, at = [], 0
    for key, (first, last) in parts:
        num_bytes = num_rows * (last - first) * dtypes[key].itemsize
        slices.append(slice(at, at + num_bytes))
        at += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    content = torch.empty(at, dtype=torch.uint8)
    flat = [content[place].view(dtypes[key]) for place, (key, _) in zip(slices, parts, strict=True)]
    return _Message(content, {part: values.view(num_rows, -1) for part, values in zip(parts, flat, strict=True)})
