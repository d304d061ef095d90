"""The next token: temperature, top-k and nucleus (top-p), then Gumbel noise and the greedy choice.

The largest of logits with standard Gumbel noise is a draw from their softmax (Gumbel, 1954; see Maddison, Tarlow and
Minka, *A\\* Sampling*, 2014). Only tokens that can be chosen are sorted and given noise: of a vocabulary of 262,144,
some hundreds.

The noise is a function of (seed, prompt, sample, step, token id) alone: it is the same on every device, in every batch
and on every rank. A key is hashed with a counter, as in Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*
(2011), by the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aura_dist.errors import ModelError

# probabilities down to which candidates are looked for, until they hold the nucleus
_LEVELS = (1e-3, 1e-4, 1e-5, 1e-6, 0.0)
# logits that are looked at together: as many as stay in a CPU's cache; on a GPU more, because each block waits for it,
# but fewer where all of them get noise, which takes some 50 bytes each
_CACHED_VALUES = 1 << 18
_DEVICE_VALUES = 1 << 24
_NOISY_VALUES = 1 << 22
# float32 sums of probabilities are not exact: what is looked for is a little more than the nucleus
_MARGIN = 1e-4
_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number: torch's integers wrap around
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_STEP_FACTOR = 0x2545F4914F6CDD1D  # another odd constant, so that steps and ids do not run in parallel
_MANTISSA_BITS = 52


@dataclass(frozen=True)
class Decoding:
    """How continuations are drawn: `num_samples` of each prompt, of at most `max_new_tokens` each."""

    num_samples: int
    max_new_tokens: int
    temperature: float  # 0 is greedy
    top_p: float  # the fewest tokens whose probabilities reach this are kept (Holtzman et al., 2020); 1 keeps all
    seed: int  # of the noise
    top_k: int = 0  # only the k most probable tokens, before `top_p`; 0 keeps all


def choose(logits_BV: Tensor, how: Decoding, keys_B: Tensor, step: int | Tensor) -> Tensor:
    """[B] int64: the next token of each row, from logits [B, V] of any float dtype.

    `keys_B` are the int64 keys of the continuations (`sample_key`), `step` is the index of the token that is drawn, one
    number or [B].
    ModelError if logits are NaN or infinite: greedy decoding would take them for a choice.
    """
    if not logits_BV.amax(-1).isfinite().all():
        raise ModelError(
            "the model's logits are NaN or infinite; check its weights, another --dtype, or a smaller --strength"
        )
    if how.temperature == 0:
        return logits_BV.argmax(-1)
    chosen = []
    step_B = torch.zeros_like(keys_B) + step
    on_device = _DEVICE_VALUES if how.top_k or how.top_p < 1 else _NOISY_VALUES
    num_values = _CACHED_VALUES if logits_BV.device.type == "cpu" else on_device
    num_rows = max(1, num_values // logits_BV.shape[1])
    for row in range(0, len(logits_BV), num_rows):
        block = slice(row, row + num_rows)
        ids_BK, noisy_BK = noisy_candidates(logits_BV[block], how, keys_B[block], step_B[block])
        chosen.append(ids_BK.gather(1, noisy_BK.argmax(-1, keepdim=True))[:, 0])
    return torch.cat(chosen)


def noisy_candidates(logits_BV: Tensor, how: Decoding, keys_B: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
    """[B, K] int64 ids and [B, K] float64 noisy logits, -inf for what is filtered out; the largest is the choice."""
    scaled_BV = logits_BV.float()
    if how.temperature != 1:
        scaled_BV = scaled_BV / how.temperature
    if how.top_k:
        ids_BK = scaled_BV.topk(min(how.top_k, scaled_BV.shape[1]), sorted=False).indices.sort(-1).values
        scaled_BK = scaled_BV.gather(1, ids_BK).double()
        log_total_B1 = scaled_BK.logsumexp(-1, keepdim=True)
    elif how.top_p < 1:
        ids_BK, scaled_BK, log_total_B1 = _probable(scaled_BV, how.top_p)
    else:
        ids_BK = torch.arange(scaled_BV.shape[1], device=scaled_BV.device).expand(scaled_BV.shape)
        return ids_BK, scaled_BV.double() + gumbel(keys_B, step, ids_BK)
    noisy_BK = scaled_BK + gumbel(keys_B, step, ids_BK)
    return ids_BK, noisy_BK.masked_fill(~_nucleus(scaled_BK - log_total_B1, how.top_p), -math.inf)


def _probable(scaled_BV: Tensor, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens among which the nucleus is: [B, K] ids in ascending order, float64 logits, padded with -inf.

    Last, [B, 1] float64: the logarithm of all exponentials' sum. If all tokens from a probability on hold `top_p`
    together, the nucleus is among them. One exponential a token, and what is likely is looked for in those.
    """
    largest_B1 = scaled_BV.amax(-1, keepdim=True)
    weights_BV = (scaled_BV - largest_B1).exp_()
    total_B1 = weights_BV.sum(-1, keepdim=True)
    levels = _levels(weights_BV, total_B1, top_p)
    for level in levels:
        row, token = _at_least(weights_BV, total_B1 * level)
        held_B = torch.zeros(len(scaled_BV), dtype=torch.float64, device=row.device)
        held_B.index_add_(0, row, weights_BV[row, token].double())
        counts_B = torch.zeros_like(held_B, dtype=torch.int64).index_add_(0, row, torch.ones_like(row))
        enough = (held_B >= min(1.0, top_p + _MARGIN) * total_B1[:, 0]).all()
        is_enough, num_most = torch.stack([enough, counts_B.max()]).tolist()  # both at once: it waits for a GPU
        if is_enough:
            break
    column = torch.arange(len(row), device=row.device) - (counts_B.cumsum(0) - counts_B)[row]
    shape = (len(scaled_BV), num_most)
    ids_BK = torch.zeros(shape, dtype=torch.int64, device=row.device)
    scaled_BK = torch.full(shape, -math.inf, dtype=torch.float64, device=row.device)
    ids_BK[row, column] = token
    scaled_BK[row, column] = scaled_BV[row, token].double()
    return ids_BK, scaled_BK, (total_B1.log() + largest_B1).double()


def _levels(weights_BV: Tensor, total_B1: Tensor, top_p: float) -> Sequence[float | Tensor]:
    """Levels to try in turn; on a GPU one, [B, 1], because it waits for each that is tried."""
    return _LEVELS if weights_BV.device.type == "cpu" else [_first_level(weights_BV, total_B1, top_p)]


def _first_level(weights_BV: Tensor, total_B1: Tensor, top_p: float) -> Tensor:
    """[B, 1] the first level at which a row's tokens hold the nucleus."""
    needed_B1 = min(1.0, top_p + _MARGIN) * total_B1
    found_B1 = torch.zeros_like(total_B1)  # the last level, at which all tokens hold it
    for level in reversed(_LEVELS[:-1]):
        held_B1 = torch.where(weights_BV >= total_B1 * level, weights_BV, 0).sum(-1, keepdim=True, dtype=torch.float64)
        found_B1 = torch.where(held_B1 >= needed_B1, level, found_B1)
    return found_B1


def _at_least(values_BV: Tensor, least_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of values from `least_B1` on, in order; on a CPU by NumPy, which takes a tenth of torch's time."""
    if values_BV.device.type != "cpu":
        row, token = (values_BV >= least_B1).nonzero(as_tuple=True)
        return row, token
    flat = torch.from_numpy(np.flatnonzero(values_BV.detach().numpy() >= least_B1.detach().numpy()))
    return flat // values_BV.shape[1], flat % values_BV.shape[1]


def _nucleus(log_p_BK: Tensor, top_p: float) -> Tensor:
    """[B, K] bool: the most probable tokens, as few as reach `top_p`; of equal ones the smaller id first."""
    sorted_BK, order_BK = log_p_BK.sort(dim=-1, descending=True, stable=True)
    p_BK = sorted_BK.exp()
    before_BK = p_BK.cumsum(-1) - p_BK
    kept_BK = (before_BK < top_p) & sorted_BK.isfinite()
    kept_BK[:, 0] = True
    return torch.zeros_like(kept_BK).scatter(1, order_BK, kept_BK)


def prompt_keys(prompts: Sequence[str], seed: int) -> list[bytes]:
    """A key of 32 bytes a prompt, from its text, the seed, and how often the text occurred before.

    The order of other prompts does not matter, and a prompt that occurs twice is continued in two ways.
    """
    seen: dict[str, int] = {}
    keys = []
    for prompt in prompts:
        occurrence = seen[prompt] = seen.get(prompt, -1) + 1
        keys.append(hashlib.sha256(f"{seed} {occurrence} {prompt}".encode()).digest())
    return keys


def sample_key(prompt_key: bytes, sample: int) -> int:
    """The key of one continuation, a signed 64-bit integer."""
    digest = hashlib.sha256(prompt_key + sample.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def gumbel(keys_B: Tensor, step: int | Tensor, ids_BK: Tensor) -> Tensor:
    """[B, K] standard Gumbel noise, finite float64, for int64 keys [B], a step (one or [B]), and int64 ids [B, K]."""
    stream_B = _mix(_mix(keys_B) + (torch.zeros_like(keys_B) + (step + 1)) * _STEP_FACTOR)
    bits_BK = _mix(stream_B[:, None] + (ids_BK + 1) * _GOLDEN)
    # the open interval (0, 1), each value exact: half steps of 2 ** -52
    uniform_BK = (_shift(bits_BK, 64 - _MANTISSA_BITS).double() + 0.5) * 2.0**-_MANTISSA_BITS
    return -(-uniform_BK.log()).log()


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit integers."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
