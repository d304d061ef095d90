"""Rows of one matrix over all ranks of a launch, for work in which every rank needs all rows at each step: training.

A rank has neighbouring rows, as many as make its share of the costs: rows that ascend in length then share batches with
their like, with little padding. The collectives run in torch's default group, which must hold all ranks
(`launch.start_team(…, together=True)`). A launch of one process has no group and needs none.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from aura_dist.ranks.world import World


class RowsOverRanks:
    """N rows over the ranks of `world`, by what each row costs, in any unit.

    Attributes
    ----------
    shares
        Of each rank, its rows: see `shares_of`.
    mine
        What this rank runs: its rows, or the last of all where it has none, so that it takes part in the gradient.
    """

    def __init__(self, world: World, costs_N: NDArray[np.floating[Any]]) -> None:
        self.shares = shares_of(costs_N, world.layout.world_size)
        self._rank, self._counts = world.global_rank, [share.stop - share.start for share in self.shares]
        self.mine = self.shares[self._rank] if self._counts[self._rank] else slice(len(costs_N) - 1, len(costs_N))

    def whole(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """From several matrices [K, D] of this rank's rows, the same [N, D] of all rows; all ranks call it together.

        D may differ between the matrices, dtype and device may not. Gradients go through the rows of this rank alone:
        where the ranks compute one loss from all rows, the sum of their gradients is the whole gradient (`summed`).
        """
        if len(self.shares) == 1:
            return list(rows)
        own = [rows_KD[: self._counts[self._rank]] for rows_KD in rows]
        sent = torch.cat([rows_KD.detach() for rows_KD in own], dim=1)
        assert len(sent) == self._counts[self._rank], "expected all rows of this rank"
        sent = pad(sent, (0, 0, 0, max(self._counts) - len(sent)))
        everyone = [torch.empty_like(sent) for _ in self.shares]
        dist.all_gather(everyone, sent)
        widths = [rows_KD.shape[1] for rows_KD in rows]
        each = zip(everyone, self._counts, strict=True)
        by_rank = [torch.split(part[:count], widths, dim=1) for part, count in each]
        by_rank[self._rank] = tuple(own)
        return [torch.cat(parts) for parts in zip(*by_rank, strict=True)]


def shares_of(costs_N: NDArray[np.floating[Any]], num_ranks: int) -> list[slice]:
    """Neighbouring rows for each rank, of nearly equal cost; none where single rows cost more than a share.

    A row goes to the rank in whose share the middle of its cost lies.
    """
    middles_N = costs_N.cumsum() - costs_N / 2
    edges = np.searchsorted(middles_N, costs_N.sum() * np.arange(1, num_ranks) / num_ranks)
    return [slice(int(a), int(b)) for a, b in pairwise([0, *edges, len(costs_N)])]


def summed(world: World, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's sum over all ranks, alike on all of them; all ranks call it together. One dtype and device."""
    if world.layout.world_size == 1:
        return list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    return _like(flat, tensors)


def from_first(world: World, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of rank 0, on every rank; all ranks call it together. One dtype and device."""
    if world.layout.world_size == 1:
        return list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.broadcast(flat, src=0)
    return _like(flat, tensors)


def _like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
