"""A text's tokens → one value per neuron, with padding never counted.

B texts of a batch, T tokens, D neurons.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class TokenMask:
    """Which tokens of a batch count, prepared once for all sites.

    Most positions of a length-sorted batch count in every row: these, the *dense* run, are reduced in place;
    only the few ragged ones are copied and masked.

    Attributes
    ----------
    dense
        Longest run of token positions that count in every row.
    ragged
        Runs of other positions at which some row counts, each with its mask [B, positions, 1], bool.
    last_B
        Position of each row's last counted token.
    count_B1
        Counted tokens of each row, float32.
    """

    dense: slice
    ragged: tuple[tuple[slice, Tensor], ...]
    last_B: Tensor
    count_B1: Tensor

    @classmethod
    def build(cls, mask_BT: NDArray[np.bool_], device: str | torch.device) -> "TokenMask":
        """From a mask of shape [B, T] on the host, at least one True a row."""
        assert mask_BT.any(axis=1).all(), "every row needs a token that counts"
        dense = max(_runs(np.asarray(mask_BT.all(axis=0))), key=lambda run: run.stop - run.start, default=slice(0, 0))
        some_T = np.array(mask_BT.any(axis=0))
        some_T[dense] = False
        last_B = mask_BT.shape[1] - 1 - mask_BT[:, ::-1].argmax(axis=1)
        return cls(
            dense,
            tuple((run, torch.from_numpy(mask_BT[:, run, None]).to(device)) for run in _runs(some_T)),
            torch.from_numpy(last_B).to(device),
            torch.from_numpy(mask_BT.sum(axis=1, dtype=np.float32)[:, None]).to(device),
        )

    def max(self, acts_BTD: Tensor) -> Tensor:
        return self._reduce(acts_BTD, torch.amax, torch.maximum, float("-inf"))

    def min(self, acts_BTD: Tensor) -> Tensor:
        return self._reduce(acts_BTD, torch.amin, torch.minimum, float("inf"))

    def absmax(self, acts_BTD: Tensor) -> Tensor:
        """Largest absolute value."""
        return torch.maximum(self.max(acts_BTD).abs(), self.min(acts_BTD).abs())

    def last(self, acts_BTD: Tensor) -> Tensor:
        return acts_BTD[torch.arange(len(acts_BTD), device=acts_BTD.device), self.last_B]

    def mean(self, acts_BTD: Tensor) -> Tensor:
        """Mean, summed in float32 at least."""
        wide = torch.promote_types(acts_BTD.dtype, torch.float32)
        return self._reduce(acts_BTD, partial(torch.sum, dtype=wide), torch.add, 0.0) / self.count_B1

    def _reduce(
        self,
        acts_BTD: Tensor,
        reduce: Callable[..., Tensor],
        combine: Callable[[Tensor, Tensor], Tensor],
        neutral: float,
    ) -> Tensor:
        """Reduce the counted tokens to [B, D]; tokens that do not count are taken as `neutral`."""
        parts = [reduce(acts_BTD[:, self.dense], dim=1)] if self.dense.stop > self.dense.start else []
        for run, mask_BR1 in self.ragged:
            parts.append(reduce(acts_BTD[:, run].masked_fill(~mask_BR1, neutral), dim=1))
        return functools.reduce(combine, parts)


def _runs(flags_T: NDArray[np.bool_]) -> list[slice]:
    """Runs of True, in order."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags_T, [False])).astype(np.int8)))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
