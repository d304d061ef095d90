"""A text's tokens → one value per neuron, with padding never counted.

B texts of a batch, T tokens, D neurons.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class TokenMask:
    """Which tokens of a batch count, prepared once for all sites.

    Rows come sorted by length, so that a batch has few runs of rows whose counted positions are the same: each is
    reduced in place, without a copy and without a mask.

    Attributes
    ----------
    runs
        (rows, runs of the positions that count in all of them), in row order.
    last_B
        Position of each row's last counted token.
    count_B1
        Counted tokens of each row, float32.
    """

    runs: tuple[tuple[slice, tuple[slice, ...]], ...]
    last_B: Tensor
    count_B1: Tensor

    @classmethod
    def build(cls, mask_BT: NDArray[np.bool_], device: str | torch.device) -> "TokenMask":
        """From a mask of shape [B, T] on the host, at least one True a row."""
        assert mask_BT.any(axis=1).all(), "every row needs a token that counts"
        starts = np.flatnonzero((mask_BT[1:] != mask_BT[:-1]).any(axis=1)) + 1
        last_B = mask_BT.shape[1] - 1 - mask_BT[:, ::-1].argmax(axis=1)
        return cls(
            tuple((slice(a, b), _runs(mask_BT[a])) for a, b in pairwise([0, *starts.tolist(), len(mask_BT)])),
            torch.from_numpy(last_B).to(device),
            torch.from_numpy(mask_BT.sum(axis=1, dtype=np.float32)[:, None]).to(device),
        )

    def max(self, acts_BTD: Tensor) -> Tensor:
        return self._reduce(acts_BTD, torch.amax, torch.maximum)

    def min(self, acts_BTD: Tensor) -> Tensor:
        return self._reduce(acts_BTD, torch.amin, torch.minimum)

    def absmax(self, acts_BTD: Tensor) -> Tensor:
        """Largest absolute value."""
        return torch.maximum(self.max(acts_BTD).abs(), self.min(acts_BTD).abs())

    def last(self, acts_BTD: Tensor) -> Tensor:
        return acts_BTD[torch.arange(len(acts_BTD), device=acts_BTD.device), self.last_B]

    def mean(self, acts_BTD: Tensor) -> Tensor:
        """Mean, summed in float32 at least."""
        wide = torch.promote_types(acts_BTD.dtype, torch.float32)
        return self._reduce(acts_BTD, partial(torch.sum, dtype=wide), torch.add) / self.count_B1

    def _reduce(
        self, acts_BTD: Tensor, reduce: Callable[..., Tensor], combine: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Reduce the counted tokens to [B, D]."""
        return torch.cat(
            [
                functools.reduce(combine, [reduce(acts_BTD[rows, run], dim=1) for run in counted])
                for rows, counted in self.runs
            ]
        )


def _runs(flags_T: NDArray[np.bool_]) -> tuple[slice, ...]:
    """Runs of True, in order."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags_T, [False])).astype(np.int8)))
    return tuple(slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True))
