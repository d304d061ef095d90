"""Exchange of pooled values between the ranks of a row worker, where the columns they see are not whole chunks.

Messages hold pooled rows × columns, never tokens, and go through host memory once a row chunk. Where widths align
nothing is sent.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from aura_dist.ranks.team import Team
from aura_dist.sites.ownership import ColumnPlan, Interval, width_of
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
                self._outgoing[peer].part(key, interval)[rows].copy_(pooled_BD[:, slice(*interval)])

    def complete(self, buffer: RowBuffer) -> None:
        """Exchange the messages of a row chunk; all ranks of the row worker must do so together."""
        self._team.exchange(
            {peer: m.content for peer, m in self._outgoing.items()},
            {peer: m.content for peer, m in self._incoming.items()},
        )
        for peer, message in self._incoming.items():
            for key, values in buffer.items():
                for interval in self._plans[key[0]].receives.get(peer, ()):
                    torch.from_numpy(values)[:, slice(*interval)] = message.part(key, interval)


class _Message:
    """One flat host tensor of bytes, and its [rows, columns] parts."""

    def __init__(self) -> None:
        self.content = torch.empty(0, dtype=torch.uint8)
        self._places: dict[tuple[Key, Interval], tuple[int, int]] = {}
        self._dtypes: dict[Key, torch.dtype] = {}
        self._size = 0

    def reserve(self, key: Key, interval: Interval, num_rows: int, dtype: torch.dtype) -> None:
        num_bytes = num_rows * width_of([interval]) * dtype.itemsize
        self._places[key, interval] = self._size, num_bytes
        self._dtypes[key] = dtype
        self._size += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT

    def allocate(self) -> None:
        self.content = torch.empty(self._size, dtype=torch.uint8)

    def part(self, key: Key, interval: Interval) -> Tensor:
        start, num_bytes = self._places[key, interval]
        flat = self.content[start : start + num_bytes].view(self._dtypes[key])
        return flat.view(-1, width_of([interval]))


def _messages(
    intervals: Mapping[Key, Mapping[int, tuple[Interval, ...]]], dtypes: Mapping[Key, torch.dtype], num_rows: int
) -> dict[int, _Message]:
    """Peer → message; both ends order the parts by array, then by interval."""
    messages: dict[int, _Message] = {}
    for key, by_peer in intervals.items():
        for peer, parts in by_peer.items():
            for interval in parts:
                messages.setdefault(peer, _Message()).reserve(key, interval, num_rows, dtypes[key])
    for message in messages.values():
        message.allocate()
    return messages
