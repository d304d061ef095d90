"""Sampling noise that is a function of what it is for, not of who draws it when.

The noise of (seed, prompt, sample, step, token id) is the same on every device, in every batch and on every rank.
Counter-based, as in Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3* (2011): a key is hashed with a
counter. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number: torch's integers wrap around
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_STEP_FACTOR = 0x2545F4914F6CDD1D  # another odd constant, so that steps and ids do not run in parallel
_MANTISSA_BITS = 52


def prompt_keys(prompts: Sequence[str], seed: int) -> list[bytes]:
    """A key of 32 bytes a prompt: of its text and the seed, and of how often the text stood there before.

    The order of other prompts does not matter, and a prompt that stands there twice is continued in two ways.
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


def gumbel(keys_B: Tensor, step: int, ids_BK: Tensor) -> Tensor:
    """Standard Gumbel noise for token ids.

    Parameters
    ----------
    keys_B
        [B] int64 keys of the continuations.
    step
        Index of the token that is drawn.
    ids_BK
        [B, K] int64 token ids.

    Returns
    -------
    noise
        [B, K] float64, finite.
    """
    stream_B = _mix(_mix(keys_B) + torch.full_like(keys_B, step + 1) * _STEP_FACTOR)
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
