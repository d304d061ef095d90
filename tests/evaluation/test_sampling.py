"""The noise and the choice of a token against plain integers, transformers' filters, and the distribution asked for."""

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from aura_dist.evaluation import sampling
from aura_dist.evaluation.sampling import (
    Decoding,
    are_finite,
    choose,
    gumbel,
    noisy_candidates,
    prompt_keys,
    sample_key,
)

WORD = 2**64


def decoding(**changes):
    return Decoding(**{"num_samples": 1, "max_new_tokens": 9, "temperature": 1.0, "top_p": 0.9, "seed": 0, **changes})


def mixed(x):
    """SplitMix64's finaliser on unsigned integers."""
    x %= WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("step", [0, 19, 2000])
def test_noise_equals_plain_integers(key, step):
    ids = [0, 1, 262_143]
    stream = mixed(mixed(key) + (step + 1) * 0x2545F4914F6CDD1D)
    uniform = [((mixed(stream + (i + 1) * 0x9E3779B97F4A7C15) >> 12) + 0.5) / 2**52 for i in ids]
    expected = [-math.log(-math.log(u)) for u in uniform]
    assert gumbel(torch.tensor([key]), step, torch.tensor([ids]))[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_noise_is_gumbel_in_every_direction():
    ids = torch.arange(20_000)[None]
    keys = torch.tensor([sample_key(k, 3) for k in prompt_keys([str(i) for i in range(20_000)], seed=0)])
    for noise in (
        gumbel(keys[:1], 0, ids)[0],
        gumbel(keys, 5, ids[:, :1].expand(20_000, 1))[:, 0],
        torch.stack([gumbel(keys[:1], step, ids[:, 7:8])[0, 0] for step in range(5_000)]),
    ):
        assert noise.isfinite().all()
        assert kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3


def test_keys_are_of_text_seed_occurrence_and_sample():
    keys = prompt_keys(["a", "b", "a"], seed=0)
    assert len(set(keys)) == 3
    assert prompt_keys(["b", "c", "a"], seed=0)[::2] == [keys[1], keys[0]], "order and neighbours do not matter"
    assert not set(keys) & set(prompt_keys(["a", "b", "a"], seed=1))
    assert len({sample_key(keys[0], s) for s in range(100)}) == 100
    assert keys[0] == hashlib.sha256(b"0 0 a").digest()


@pytest.mark.parametrize("how", [decoding(), decoding(top_p=1.0, top_k=7), decoding(temperature=2.0, top_k=20)])
def test_draws_follow_the_filtered_distribution(how):
    torch.manual_seed(0)
    logits, num = torch.randn(30) * 2, 20_000
    keys = torch.tensor([sample_key(bytes(32), s) for s in range(num)])
    drawn = choose(logits.expand(num, -1), how, keys, 0)
    scores = TemperatureLogitsWarper(how.temperature)(None, logits[None])
    scores = TopKLogitsWarper(how.top_k)(None, scores) if how.top_k else scores
    expected = TopPLogitsWarper(how.top_p)(None, scores).softmax(-1)[0].double().numpy()
    counts = np.bincount(drawn.numpy(), minlength=30)
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert chisquare(counts[kept], expected[kept] / expected[kept].sum() * num).pvalue > 1e-3


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_nucleus_is_that_of_transformers(spread, top_p):
    torch.manual_seed(1)
    logits = torch.randn(40, 3000) * spread + torch.linspace(0, 0.1, 3000)  # few equal ones: those are cut by order
    ids, noisy = noisy_candidates(logits, decoding(top_p=top_p), torch.zeros(40, dtype=torch.int64), 0)
    expected = TopPLogitsWarper(top_p)(None, logits.double()).isfinite()
    got = torch.zeros(expected.shape, dtype=torch.int64).scatter_add(1, ids, noisy.isfinite().long()) > 0
    different = (got != expected).sum(-1)
    assert different.max() <= 1, "but for the last one, at whose edge two sums round in two ways"
    assert different.sum() <= 2


def test_batch_does_not_matter():
    torch.manual_seed(2)
    logits, keys = torch.randn(50, 500), torch.arange(50)
    together = choose(logits, decoding(), keys, 3)
    assert torch.equal(
        together, torch.cat([choose(logits[b : b + 1], decoding(), keys[b : b + 1], 3) for b in range(50)])
    )
    assert not torch.equal(together, choose(logits, decoding(), keys, 4))


def test_temperature_zero_is_greedy():
    logits = torch.randn(5, 50)
    assert torch.equal(
        choose(logits, decoding(temperature=0.0), torch.zeros(5, dtype=torch.int64), 0), logits.argmax(-1)
    )


@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 3.0, 20.0])  # from all alike to one for certain
def test_a_gpu_chooses_what_a_cpu_does(size, top_p, monkeypatch):
    logits = size * torch.randn(40, 20_000, generator=torch.Generator().manual_seed(0))
    logits[20:] *= 0.1
    logits[::3, ::2] = -math.inf
    logits[1::3] = logits[1::3].bfloat16().float()  # many are equal
    logits[2] = torch.tensor([0.0, -0.0]).repeat(10_000)
    for how in (decoding(top_p=top_p), decoding(top_p=top_p, temperature=0.7)):
        monkeypatch.setattr(sampling, "reading_waits", lambda tensor: False)
        here = choose(logits, how, torch.arange(40), 0)
        monkeypatch.setattr(sampling, "reading_waits", lambda tensor: True)
        assert torch.equal(choose(logits, how, torch.arange(40), 0), here)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_of_equal_logits_the_smaller_ids_are_in_the_nucleus(top_p, monkeypatch):
    monkeypatch.setattr(sampling, "reading_waits", lambda tensor: True)
    _, noisy = noisy_candidates(torch.zeros(2, 1024), decoding(top_p=top_p), torch.arange(2), 0)
    kept = torch.arange(1024) < math.ceil(top_p * 1024)
    assert torch.equal(noisy.isfinite(), kept.expand(2, -1))


@pytest.mark.parametrize(("value", "finite"), [(math.nan, False), (math.inf, False), (-math.inf, True), (0.0, True)])
def test_logits_that_are_no_numbers(value, finite):
    logits = torch.zeros(2, 5)
    logits[1, 2] = value
    assert bool(are_finite(logits)) == finite
    assert not are_finite(torch.full((1, 5), -math.inf))
