"""Rows of one matrix over all ranks of a launch, for work in which every rank needs all rows at each step: training.

Each rank has one row of the first R, one of the next R and so on, where R is the number of ranks. Which one it has goes
up with the rank and down in turn (0 1 2, 2 1 0, …), so that rows that ascend in length make shares of nearly equal
cost. All ranks run the same number of rows, because forwards may be collective: where the rows do not suffice, a rank
runs the last row once more, and nothing depends on that. The collectives run in torch's default group, which must
hold all ranks (`launch.start_team(…, together=True)`). A launch of one process has no group and needs none.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from aura_dist.ranks.world import World


class RowsOverRanks:
    """N rows over the ranks of `world`, K = ⌈N / R⌉ on each."""

    def __init__(self, world: World, num_rows: int) -> None:
        self._rank, self._num_ranks = world.global_rank, world.layout.world_size
        rows_KR = np.arange(ceil(num_rows / self._num_ranks) * self._num_ranks).reshape(-1, self._num_ranks)
        self._lasts_K = np.minimum(rows_KR[:, -1], num_rows - 1)
        rows_KR[1::2] = rows_KR[1::2, ::-1].copy()
        self.mine_K: NDArray[np.int64] = np.minimum(rows_KR[:, self._rank], num_rows - 1)  # rows that this rank runs
        self._places_N = torch.from_numpy(rows_KR.flatten()[:num_rows])  # of each row, in the ranks' rows in turn

    def longest(self, num_tokens_N: NDArray[np.integer]) -> list[int]:
        """[K] the most tokens that any rank's row has, of rows that ascend in length: batches by it are alike."""
        return [int(length) for length in num_tokens_N[self._lasts_K]]

    def whole(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """From several matrices [K, D] of this rank's rows, the same [N, D] of all rows; all ranks call it together.

        D may differ between the matrices, dtype and device may not. Gradients go through the rows of this rank alone:
        where the ranks compute one loss from all rows, the sum of their gradients is the whole gradient (`summed`).
        """
        if self._num_ranks == 1:
            return list(rows)
        mine = torch.cat([rows_KD.detach() for rows_KD in rows], dim=1)
        everyone = [torch.empty_like(mine) for _ in range(self._num_ranks)]
        dist.all_gather(everyone, mine)
        places_N = self._places_N.to(mine.device)
        widths = [rows_KD.shape[1] for rows_KD in rows]
        by_matrix = zip(*(torch.split(part, widths, dim=1) for part in everyone), strict=True)
        found = []
        for rows_KD, parts in zip(rows, by_matrix, strict=True):
            by_rank = [*parts[: self._rank], rows_KD, *parts[self._rank + 1 :]]
            found.append(torch.stack(by_rank, dim=1).flatten(0, 1)[places_N])
        return found


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
