"""A text's tokens → one value per neuron, with padding never counted. A new pooling is one row of `POOLINGS`.

`TOKENS` among the words of `--pooling` says that the values of every token are kept too.

B texts of a batch, T tokens, D neurons. Importing this module imports no torch.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aura_dist.errors import ConfigError
from aura_dist.sites.routed import Routed

TOKENS = "tokens"

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Acts = Tensor | Routed  # [B, T, D], whole or as routed rows


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
    drawn_B
        Position of one counted token of each row: see `_drawn`.
    count_B1
        Counted tokens of each row, float32.
    first_B1
        Whether the first token counts, and others too.
    counted_BT
        Whether the token counts.
    """

    runs: tuple[tuple[slice, tuple[slice, ...]], ...]
    last_B: Tensor
    drawn_B: Tensor
    count_B1: Tensor
    first_B1: Tensor
    counted_BT: Tensor

    @classmethod
    def build(
        cls,
        mask_BT: NDArray[np.bool_],
        device: str | torch.device,
        ids_BT: NDArray[np.integer[Any]] | None = None,
    ) -> TokenMask:
        """From a mask of shape [B, T] on the host, at least one True a row, and token ids, which `drawn` needs."""
        import torch

        assert mask_BT.any(axis=1).all(), "every row needs a token that counts"
        starts = np.flatnonzero((mask_BT[1:] != mask_BT[:-1]).any(axis=1)) + 1
        last_B = mask_BT.shape[1] - 1 - mask_BT[:, ::-1].argmax(axis=1)
        return cls(
            tuple((slice(a, b), _runs(mask_BT[a])) for a, b in pairwise([0, *starts.tolist(), len(mask_BT)])),
            torch.from_numpy(last_B).to(device),
            torch.from_numpy(_drawn(mask_BT, ids_BT)).to(device),
            torch.from_numpy(mask_BT.sum(axis=1, dtype=np.float32)[:, None]).to(device),
            torch.from_numpy((mask_BT[:, 0] & (last_B > 0))[:, None]).to(device),
            torch.from_numpy(mask_BT).to(device),
        )

    def reduce(
        self, acts_BTD: Tensor, reduce: Callable[[Tensor], Tensor], combine: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Counted tokens → [B, D]: `reduce` takes each run of them over dim 1, `combine` joins a row's runs."""
        import torch

        pooled = (functools.reduce(combine, [reduce(acts_BTD[rows, t]) for t in runs]) for rows, runs in self.runs)
        return torch.cat(list(pooled))

    def at(self, position_B: Tensor, acts_BTD: Acts) -> Tensor:
        """[B, D] values of one token of each text, such as `last_B`."""
        import torch

        if isinstance(acts_BTD, Routed):
            return acts_BTD.at(position_B, self.counted_BT.shape)
        return acts_BTD[torch.arange(len(acts_BTD), device=acts_BTD.device), position_B]

    def count_first(self, pooled_BD: Tensor, acts_BTD: Acts, of_token: Callable[[Tensor], Tensor]) -> Tensor:
        """[1, D] int32 number of rows whose pooled value is their first token's, which is not their only one."""
        import torch

        if isinstance(acts_BTD, Routed):
            first_BD = acts_BTD.at(torch.zeros_like(self.last_B), self.counted_BT.shape)
        else:
            first_BD = acts_BTD[:, 0]
        return ((pooled_BD == of_token(first_BD)) & self.first_B1).sum(dim=0, keepdim=True, dtype=torch.int32)


def _runs(flags_T: NDArray[np.bool_]) -> tuple[slice, ...]:
    """Runs of True, in order."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags_T, [False])).astype(np.int8)))
    return tuple(slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True))


def _drawn(mask_BT: NDArray[np.bool_], ids_BT: NDArray[np.integer[Any]] | None) -> NDArray[np.int64]:
    """[B] position of one token of each row among those that count, but not the first of several.

    The sum of their ids and their number choose it (by its multiple of the golden ratio, modulo 1), so neither the
    batch nor the device does. In many models the first token's values are like no other's.
    """
    num_B = mask_BT.sum(axis=1)
    key_B = num_B + (0 if ids_BT is None else np.where(mask_BT, ids_BT, 0).sum(axis=1, dtype=np.int64))
    rank_B = np.where(num_B > 1, 1 + np.floor((num_B - 1) * (key_B * (1 + 5**0.5) / 2 % 1)), 0)
    position_B: NDArray[np.int64] = (mask_BT.cumsum(axis=1) > rank_B[:, None]).argmax(axis=1)
    return position_B


def _max(tokens: TokenMask, acts_BTD: Acts) -> Tensor:
    if isinstance(acts_BTD, Routed):
        return acts_BTD.extreme(tokens.counted_BT, largest=True)
    return tokens.reduce(acts_BTD, lambda run: run.amax(dim=1), lambda a, b: a.maximum(b))


def _min(tokens: TokenMask, acts_BTD: Acts) -> Tensor:
    if isinstance(acts_BTD, Routed):
        return acts_BTD.extreme(tokens.counted_BT, largest=False)
    return tokens.reduce(acts_BTD, lambda run: run.amin(dim=1), lambda a, b: a.minimum(b))


def _absmax(tokens: TokenMask, acts_BTD: Acts) -> Tensor:
    return _max(tokens, acts_BTD).abs().maximum(_min(tokens, acts_BTD).abs())


def _mean(tokens: TokenMask, acts_BTD: Acts) -> Tensor:
    """Summed in float32 at least."""
    values = acts_BTD.values_SI if isinstance(acts_BTD, Routed) else acts_BTD
    wide = values.dtype if values.dtype.itemsize >= 4 else tokens.count_B1.dtype
    if isinstance(acts_BTD, Routed):
        return acts_BTD.sum(tokens.counted_BT, wide) / tokens.count_B1
    return tokens.reduce(acts_BTD, lambda run: run.sum(dim=1, dtype=wide), operator.add) / tokens.count_B1


def _mean_square(tokens: TokenMask, acts_BTD: Acts) -> Tensor:
    """Squared and summed in float32 at least."""
    values = acts_BTD.values_SI if isinstance(acts_BTD, Routed) else acts_BTD
    wide = values.dtype if values.dtype.itemsize >= 4 else tokens.count_B1.dtype
    if isinstance(acts_BTD, Routed):
        squared = replace(acts_BTD, values_SI=values.to(wide).square())
        return squared.sum(tokens.counted_BT, wide) / tokens.count_B1
    return tokens.reduce(acts_BTD, lambda run: run.to(wide).square().sum(dim=1), operator.add) / tokens.count_B1


def _last(tokens: TokenMask, acts_BTD: Acts) -> Tensor:
    return tokens.at(tokens.last_B, acts_BTD)


def _one_drawn(tokens: TokenMask, acts_BTD: Acts) -> Tensor:
    return tokens.at(tokens.drawn_B, acts_BTD)


@dataclass(frozen=True)
class Pooling:
    """One pooling; `selects` says that each result is one of the site's values, up to its sign.

    The site's dtype then holds it exactly; results of the others are float32 at least. A pooling that may select any
    token has `of_token`, which maps values of single tokens to what the pooling makes of them.
    """

    summary: str  # for `--help`
    pool: Callable[[TokenMask, Acts], Tensor]  # acts_BTD → pooled_BD
    selects: bool
    of_token: Callable[[Tensor], Tensor] | None = None


POOLINGS = {
    "max": Pooling("the largest value", _max, selects=True, of_token=lambda acts: acts),
    "mean": Pooling("the mean", _mean, selects=False),
    "min": Pooling("the smallest value", _min, selects=True, of_token=lambda acts: acts),
    "last": Pooling("the last counted token's value", _last, selects=True),
    "drawn": Pooling("one token's value, as the text's ids choose; not the first's", _one_drawn, selects=True),
    "absmax": Pooling("the largest absolute value", _absmax, selects=True, of_token=lambda acts: acts.abs()),
    "mean_square": Pooling("the mean of the squares", _mean_square, selects=False),
}


def kept_words() -> dict[str, str]:
    """Every word of `collect --pooling` → its summary."""
    return {name: pooling.summary for name, pooling in POOLINGS.items()} | {TOKENS: "no pooling: every token's value"}


def poolings_of(words: Iterable[str]) -> tuple[str, ...]:
    """The poolings among words of `collect --pooling`."""
    return tuple(word for word in words if word != TOKENS)


def check_kept(words: Collection[str], keep_tokens: Collection[str]) -> None:
    """ConfigError if `--keep-tokens` chooses sites although `--pooling tokens` keeps the tokens of all."""
    if keep_tokens and TOKENS in words:
        raise ConfigError(
            f"--keep-tokens: expected it without --pooling {TOKENS}, which keeps the tokens of all modules, got "
            f"{' '.join(keep_tokens)}; leave one of them out"
        )
