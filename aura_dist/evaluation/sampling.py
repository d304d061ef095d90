"""The next token: temperature, top-k and nucleus (top-p), then Gumbel noise and the greedy choice.

The largest of logits with standard Gumbel noise is a draw from their softmax (Gumbel, 1954; see Maddison, Tarlow and
Minka, *A\\* Sampling*, 2014). On a CPU only tokens that can be chosen are sorted and given noise: of a vocabulary of
262,144, some hundreds.

The noise is a function of (seed, prompt, sample, step, token id) alone: it is the same on every device, in every batch
and on every rank. A key is hashed with a counter, as in Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*
(2011), by the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).

Nothing here waits for a GPU: there no tensor has a size that depends on values, so all tokens get noise.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# probabilities down to which candidates are looked for, until they hold the nucleus
_LEVELS = (1e-3, 1e-4, 1e-5, 1e-6, 0.0)
# logits that are looked at together: as many as stay in a CPU's cache; on a GPU, where each takes some 50 bytes, more
_CACHED_VALUES = 1 << 18
_DEVICE_VALUES = 1 << 23
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
    number or [B]. Logits that are NaN or infinite give any id: see `are_finite`.
    """
    if how.temperature == 0:
        return logits_BV.argmax(-1)
    chosen = []
    step_B = torch.zeros_like(keys_B) + step
    num_rows = max(1, (_DEVICE_VALUES if reading_waits(logits_BV) else _CACHED_VALUES) // logits_BV.shape[1])
    for row in range(0, len(logits_BV), num_rows):
        block = slice(row, row + num_rows)
        ids_BK, noisy_BK = noisy_candidates(logits_BV[block], how, keys_B[block], step_B[block])
        chosen.append(ids_BK.gather(1, noisy_BK.argmax(-1, keepdim=True))[:, 0])
    return torch.cat(chosen)


def are_finite(logits_BV: Tensor) -> Tensor:
    """[] bool: whether no logit is NaN or +inf, and each row has one above -inf."""
    return logits_BV.amax(-1).isfinite().all()


def reading_waits(tensor: Tensor) -> bool:
    """Whether reading a value of `tensor` waits for all work that its device was given."""
    return tensor.device.type != "cpu"


def noisy_candidates(logits_BV: Tensor, how: Decoding, keys_B: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
    """[B, K] int64 ids and [B, K] float64 noisy logits, -inf for what is filtered out; the largest is the choice."""
    scaled_BV = logits_BV.float()
    if how.temperature != 1:
        scaled_BV = scaled_BV / how.temperature
    if how.top_k:
        ids_BK = scaled_BV.topk(min(how.top_k, scaled_BV.shape[1]), sorted=False).indices.sort(-1).values
        scaled_BK = scaled_BV.gather(1, ids_BK).double()
        log_total_B1 = scaled_BK.logsumexp(-1, keepdim=True)
    elif how.top_p < 1 and not reading_waits(scaled_BV):
        ids_BK, scaled_BK, log_total_B1 = _probable(scaled_BV, how.top_p)
    else:
        ids_BK = torch.arange(scaled_BV.shape[1], device=scaled_BV.device).expand(scaled_BV.shape)
        noisy_BK = scaled_BV.double() + gumbel(keys_B, step, ids_BK)
        if how.top_p < 1:
            noisy_BK.masked_fill_(~_nucleus_of_all(scaled_BV, how.top_p), -math.inf)
        return ids_BK, noisy_BK
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
    for level in _LEVELS:
        row, token = _at_least(weights_BV, total_B1 * level)
        held_B = torch.zeros(len(scaled_BV), dtype=torch.float64).index_add_(0, row, weights_BV[row, token].double())
        if (held_B >= min(1.0, top_p + _MARGIN) * total_B1[:, 0]).all():
            break
    counts_B = row.bincount(minlength=len(scaled_BV))
    column = torch.arange(len(row)) - (counts_B.cumsum(0) - counts_B)[row]
    shape = (len(scaled_BV), max(1, int(counts_B.max())))  # a row of NaN has no candidate
    ids_BK = torch.zeros(shape, dtype=torch.int64)
    scaled_BK = torch.full(shape, -math.inf, dtype=torch.float64)
    ids_BK[row, column] = token
    scaled_BK[row, column] = scaled_BV[row, token].double()
    return ids_BK, scaled_BK, (total_B1.log() + largest_B1).double()


def _at_least(values_BV: Tensor, least_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of values from `least_B1` on, in order; by NumPy, which takes a tenth of torch's time."""
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


def _nucleus_of_all(scaled_BV: Tensor, top_p: float) -> Tensor:
    """[B, V] bool: `_nucleus` of float32 logits, by a search for its least logit in the 32 bits of a float.

    Nothing is sorted and nothing is read: a fixed number of passes, whatever the values are.
    """
    bits_BV = (scaled_BV + 0.0).view(torch.int32)  # -0.0 becomes 0.0, as the two are equal
    order_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)  # ascending as the logits are
    weights_BV = (scaled_BV - scaled_BV.amax(-1, keepdim=True)).exp_()

    def held(from_B1: Tensor) -> Tensor:
        """[B, 1] float64: what tokens hold together whose order is at least this."""
        return torch.where(order_BV >= from_B1, weights_BV, 0).sum(-1, keepdim=True, dtype=torch.float64)

    # tokens from `least` on hold enough, those from `beyond` on do not
    least_B1 = torch.full_like(order_BV[:, :1], -(2**31))
    beyond_B1 = order_BV.amax(-1, keepdim=True) + 1
    enough_B1 = top_p * held(least_B1)
    for _ in range(32):
        middle_B1 = (least_B1 >> 1) + (beyond_B1 >> 1) + (least_B1 & beyond_B1 & 1)
        is_enough_B1 = held(middle_B1) >= enough_B1
        least_B1 = torch.where(is_enough_B1, middle_B1, least_B1)
        beyond_B1 = torch.where(is_enough_B1, beyond_B1, middle_B1)
    tied_BV = order_BV == least_B1
    above_B1 = held(beyond_B1)
    weight_B1 = torch.where(tied_BV, weights_BV, 0).amax(-1, keepdim=True)
    before_BV = above_B1 + (tied_BV.cumsum(-1, dtype=torch.int32) - 1) * weight_B1.double()
    return (order_BV > least_B1) | (tied_BV & (before_BV < enough_B1))


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
