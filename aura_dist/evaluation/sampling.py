"""The next token: temperature, top-k and nucleus (top-p), then Gumbel noise and the greedy choice.

The largest of logits with standard Gumbel noise is a draw from their softmax (Gumbel, 1954; see Maddison, Tarlow and
Minka, *A\\* Sampling*, 2014), so that a draw is a function of the logits and of noise that nobody's order of work
changes. Only tokens that can be chosen are sorted and given noise: of a vocabulary of 262,144, some hundreds.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aura_dist.errors import ModelError
from aura_dist.evaluation.noise import gumbel

# probabilities down to which candidates are looked for, until they hold the nucleus
_LEVELS = (1e-3, 1e-4, 1e-5, 1e-6, 0.0)
# rows whose full-width copies are held at once
_ROWS = 16
# float32 sums of probabilities are not exact: what is looked for is a little more than the nucleus
_MARGIN = 1e-4


@dataclass(frozen=True)
class Decoding:
    """How continuations are drawn.

    Attributes
    ----------
    num_samples, max_new_tokens
        Continuations of each prompt, and tokens of each.
    temperature
        0 is greedy.
    top_p
        The fewest tokens whose probabilities reach this are kept (Holtzman et al., 2020); 1 keeps all.
    seed
        Of the noise.
    top_k
        Only the k most probable tokens, before `top_p`; 0 keeps all.
    """

    num_samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    top_k: int = 0


def choose(logits_BV: Tensor, how: Decoding, keys_B: Tensor, step: int) -> Tensor:
    """[B] int64: the next token of each row.

    Parameters
    ----------
    logits_BV
        [B, V] of any float dtype.
    how
        Temperature and filters.
    keys_B
        [B] int64 keys of the continuations (`noise.sample_key`).
    step
        Index of the token that is drawn.

    Raises
    ------
    ModelError
        Logits are NaN or infinite: greedy decoding would take them for a choice.
    """
    if not logits_BV.amax(-1).isfinite().all():
        raise ModelError(
            "the model's logits are NaN or infinite; check its weights, another --dtype, or a smaller --strength"
        )
    if how.temperature == 0:
        return logits_BV.argmax(-1)
    chosen = []
    for rows in range(0, len(logits_BV), _ROWS):
        block = slice(rows, rows + _ROWS)
        ids_BK, noisy_BK = noisy_candidates(logits_BV[block], how, keys_B[block], step)
        chosen.append(ids_BK.gather(1, noisy_BK.argmax(-1, keepdim=True))[:, 0])
    return torch.cat(chosen)


def noisy_candidates(logits_BV: Tensor, how: Decoding, keys_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """[B, K] int64 ids and [B, K] float64 noisy logits, -inf for what is filtered out; the largest is the choice."""
    scaled_BV = logits_BV.float() / how.temperature
    if how.top_k:
        ids_BK = scaled_BV.topk(min(how.top_k, scaled_BV.shape[1]), sorted=False).indices.sort(-1).values
        scaled_BK = scaled_BV.gather(1, ids_BK).double()
        log_total_B1 = scaled_BK.logsumexp(-1, keepdim=True)
    elif how.top_p < 1:
        log_total_B1 = scaled_BV.logsumexp(-1, keepdim=True).double()
        ids_BK, scaled_BK = _probable(scaled_BV, log_total_B1, how.top_p)
    else:
        ids_BK = torch.arange(scaled_BV.shape[1], device=scaled_BV.device).expand(scaled_BV.shape)
        return ids_BK, scaled_BV.double() + gumbel(keys_B, step, ids_BK)
    noisy_BK = scaled_BK + gumbel(keys_B, step, ids_BK)
    return ids_BK, noisy_BK.masked_fill(~_nucleus(scaled_BK - log_total_B1, how.top_p), -math.inf)


def _probable(scaled_BV: Tensor, log_total_B1: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """[B, K] ids in ascending order and float64 logits of the tokens among which the nucleus is, padded with -inf.

    If all tokens from a probability on hold `top_p` together, the nucleus is among them.
    """
    probabilities_BV = (scaled_BV - log_total_B1.float()).exp()
    for level in _LEVELS:
        likely_BV = probabilities_BV >= level
        if (probabilities_BV.mul(likely_BV).sum(-1) >= min(1.0, top_p + _MARGIN)).all() or not level:
            break
    counts_B = likely_BV.sum(-1)
    row, token = likely_BV.nonzero(as_tuple=True)
    column = torch.arange(len(row), device=row.device) - (counts_B.cumsum(0) - counts_B)[row]
    shape = (len(scaled_BV), int(counts_B.max()))
    ids_BK = torch.zeros(shape, dtype=torch.int64, device=row.device)
    scaled_BK = torch.full(shape, -math.inf, dtype=torch.float64, device=row.device)
    ids_BK[row, column] = token
    scaled_BK[row, column] = scaled_BV[row, token].double()
    return ids_BK, scaled_BK


def _nucleus(log_p_BK: Tensor, top_p: float) -> Tensor:
    """[B, K] bool: the most probable tokens, as few as reach `top_p`; of equal ones those of smaller id first."""
    sorted_BK, order_BK = log_p_BK.sort(dim=-1, descending=True, stable=True)
    p_BK = sorted_BK.exp()
    before_BK = p_BK.cumsum(-1) - p_BK
    kept_BK = (before_BK < top_p) & sorted_BK.isfinite()
    kept_BK[:, 0] = True
    return torch.zeros_like(kept_BK).scatter(1, order_BK, kept_BK)
