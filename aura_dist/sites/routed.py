"""Values of a mixture's neurons, kept as one row for each token and expert that the router joined.

B texts, T tokens of each, S routed rows, E experts, I neurons of an expert. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Routed:
    """Values [B, T, E · I] that are 0 wherever the router did not send a token to an expert.

    Attributes
    ----------
    values_SI
        The neurons' values, in any order of rows.
    token_S, expert_S
        Each row's token in [0, B · T) and expert, int64. Rows of expert `num_experts` count nowhere.
    num_experts, num_tokens
        E and B · T.
    """

    values_SI: Tensor
    token_S: Tensor
    expert_S: Tensor
    num_experts: int
    num_tokens: int

    @property
    def device(self) -> torch.device:
        return self.values_SI.device

    @property
    def width(self) -> int:
        """E · I."""
        return self.num_experts * int(self.values_SI.shape[1])

    def extreme(self, counted_BT: Tensor, largest: bool) -> Tensor:
        """[B, E · I] largest or smallest value of the counted tokens; a token that was not routed has 0."""
        import torch

        key_S = self._keys(counted_BT)
        start, how = (-torch.inf, "amax") if largest else (torch.inf, "amin")
        # torch's reduction by index is much faster on a CPU than its reduction of sorted segments
        out = self._rows(counted_BT, self.values_SI.dtype, start)
        out.scatter_reduce_(0, key_S[:, None].expand_as(self.values_SI), self.values_SI, how)
        num_routed = torch.zeros(len(out), dtype=torch.int64, device=self.device)
        num_routed.scatter_add_(0, key_S, torch.ones_like(key_S))
        all_routed = num_routed[:-1].view(len(counted_BT), -1) == counted_BT.sum(dim=1, keepdim=True)
        bound = torch.where(all_routed, start, 0).to(out.dtype).view(-1, 1)
        pooled = torch.maximum(out[:-1], bound) if largest else torch.minimum(out[:-1], bound)
        return pooled.view(len(counted_BT), -1)

    def sum(self, counted_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, E · I] sum over the counted tokens, in `dtype`."""
        out = self._rows(counted_BT, dtype, 0)
        # unlike `index_add_`, it adds in a fixed order on a GPU
        out.index_put_((self._keys(counted_BT),), self.values_SI.to(dtype), accumulate=True)
        return out[:-1].view(len(counted_BT), -1)

    def at(self, position_B: Tensor, shape: Sequence[int]) -> Tensor:
        """[B, E · I] values of one token of each text; `shape` is (B, T)."""
        import torch

        here_BT = torch.zeros(tuple(shape), dtype=torch.bool, device=self.device)
        here_BT[torch.arange(shape[0], device=self.device), position_B] = True
        out = self._rows(here_BT, self.values_SI.dtype, 0)
        out[self._keys(here_BT)] = self.values_SI
        return out[:-1].view(shape[0], -1)

    def dense(self, shape: Sequence[int]) -> Tensor:
        """[B, T, E · I] all values; `shape` is (B, T)."""
        import torch

        kept_S = self.expert_S < self.num_experts
        key_S = torch.where(kept_S, self.token_S * self.num_experts + self.expert_S, self.num_tokens * self.num_experts)
        out = self.values_SI.new_zeros((self.num_tokens * self.num_experts + 1, self.values_SI.shape[1]))
        out[key_S] = self.values_SI
        return out[:-1].view(*shape, -1)

    def changed(self, change: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        """The rows' new values [S, I]; `change(values, along)` is as in `Tap.write`."""
        expert_S = self.expert_S.clamp(max=self.num_experts - 1)
        return change(self.values_SI, lambda constants_D: constants_D.view(self.num_experts, -1)[expert_S])

    def _keys(self, kept_BT: Tensor) -> Tensor:
        """Each row's place among B · E results; rows of tokens that are not kept go to one more, which is dropped."""
        import torch

        num_rows, num_tokens = kept_BT.shape
        kept_S = kept_BT.reshape(-1)[self.token_S] & (self.expert_S < self.num_experts)
        key_S = self.token_S // num_tokens * self.num_experts + self.expert_S
        return torch.where(kept_S, key_S, num_rows * self.num_experts)

    def _rows(self, kept_BT: Tensor, dtype: torch.dtype, value: float) -> Tensor:
        shape = (len(kept_BT) * self.num_experts + 1, self.values_SI.shape[1])
        return self.values_SI.new_full(shape, value, dtype=dtype)
