"""A text's tokens → one value per neuron, with padding never counted.

B texts of a batch, T tokens, D neurons.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class TokenMask:
    """Which tokens of a batch count, prepared once for all sites.

    Most columns of a length-sorted batch count in every row: these, [start, stop), are reduced in place;
    only the few ragged ones are copied and masked.

    Attributes
    ----------
    start, stop
        Longest run of token positions that count in every row.
    ragged_R
        Other positions at which some row counts.
    mask_BR1
        Whether they count, bool.
    last_B
        Position of each row's last counted token.
    count_B1
        Counted tokens of each row, float32.
    """

    start: int
    stop: int
    ragged_R: Tensor
    mask_BR1: Tensor
    last_B: Tensor
    count_B1: Tensor

    @classmethod
    def build(cls, mask_BT: NDArray[np.bool_], device: str | torch.device) -> "TokenMask":
        """From a mask of shape [B, T] on the host, at least one True a row."""
        assert mask_BT.any(axis=1).all(), "every row needs a token that counts"
        start, stop = _longest_run(np.asarray(mask_BT.all(axis=0)))
        ragged = np.asarray(mask_BT.any(axis=0))
        ragged[start:stop] = False
        at = np.flatnonzero(ragged)
        last = mask_BT.shape[1] - 1 - mask_BT[:, ::-1].argmax(axis=1)
        return cls(
            start,
            stop,
            torch.from_numpy(at).to(device),
            torch.from_numpy(mask_BT[:, at][:, :, None]).to(device),
            torch.from_numpy(last).to(device),
            torch.from_numpy(mask_BT.sum(axis=1, dtype=np.float32)[:, None]).to(device),
        )

    def max(self, acts_BTD: Tensor) -> Tensor:
        return self._extreme(acts_BTD, "max")

    def min(self, acts_BTD: Tensor) -> Tensor:
        return self._extreme(acts_BTD, "min")

    def absmax(self, acts_BTD: Tensor) -> Tensor:
        """Largest absolute value."""
        return torch.maximum(self.max(acts_BTD).abs(), self.min(acts_BTD).abs())

    def last(self, acts_BTD: Tensor) -> Tensor:
        return acts_BTD[torch.arange(len(acts_BTD), device=acts_BTD.device), self.last_B]

    def mean(self, acts_BTD: Tensor) -> Tensor:
        """Mean, summed in float32."""
        total_BD = acts_BTD[:, self.start : self.stop].sum(dim=1, dtype=torch.float32)
        if len(self.ragged_R):
            ragged_BRD = acts_BTD[:, self.ragged_R].masked_fill(~self.mask_BR1, 0)
            total_BD = total_BD + ragged_BRD.sum(dim=1, dtype=torch.float32)
        return total_BD / self.count_B1

    def _extreme(self, acts_BTD: Tensor, which: str) -> Tensor:
        reduce, combine, neutral = _EXTREMES[which]
        parts = []
        if self.stop > self.start:
            parts.append(reduce(acts_BTD[:, self.start : self.stop], dim=1))
        if len(self.ragged_R):
            parts.append(reduce(acts_BTD[:, self.ragged_R].masked_fill(~self.mask_BR1, neutral), dim=1))
        return parts[0] if len(parts) == 1 else combine(*parts)


_EXTREMES = {
    "max": (torch.amax, torch.maximum, float("-inf")),
    "min": (torch.amin, torch.minimum, float("inf")),
}


def _longest_run(flags_T: NDArray[np.bool_]) -> tuple[int, int]:
    """[start, stop) of the longest run of True; (0, 0) if there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags_T, [False])).astype(np.int8)))
    starts, stops = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    longest = int(np.argmax(stops - starts))
    return int(starts[longest]), int(stops[longest])
