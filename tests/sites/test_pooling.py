"""Pooling of a padded batch equals a plain loop over the counted tokens of each row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aura_dist.sites.pooling import POOLINGS, TokenMask
from tests.poolings import pool_plainly

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PADDING = (float("nan"), float("inf"), -float("inf"), 6e4, -6e4, 0.0)


def check(acts_BTD: torch.Tensor, mask_BT: np.ndarray) -> None:
    mask = TokenMask.build(mask_BT, "cpu")
    for name, pooling in POOLINGS.items():
        ours = pooling.pool(mask, acts_BTD)
        assert ours.dtype == (acts_BTD.dtype if pooling.selects else torch.float32)
        counted = [acts_TD[torch.from_numpy(m)] for acts_TD, m in zip(acts_BTD.double(), mask_BT, strict=True)]
        theirs = torch.stack([pool_plainly(acts_TD, name) for acts_TD in counted])
        off = 0 if pooling.selects else 2e-6
        torch.testing.assert_close(ours.double(), theirs, rtol=off, atol=off, equal_nan=True, msg=name)


@st.composite
def batches(draw):
    """Right-padded rows, some with tokens left out in front and in the middle; anything at all as padding."""
    num_rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    longest = draw(st.integers(1, 9))
    same = draw(st.booleans())
    lengths = [longest if same else draw(st.integers(1, longest)) for _ in range(num_rows)]
    mask_BT = np.arange(max(lengths)) < np.array(lengths)[:, None]
    for b, length in enumerate(lengths):
        left_out = draw(st.sets(st.integers(0, length - 1), max_size=length - 1))
        mask_BT[b, list(left_out)] = False
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    acts = torch.from_numpy(rng.normal(size=(*mask_BT.shape, width))).to(draw(st.sampled_from(DTYPES)))
    acts[~torch.from_numpy(mask_BT)] = draw(st.sampled_from(PADDING))
    return acts, mask_BT


@settings(deadline=None, max_examples=200)
@given(batches())
def test_equals_a_loop_over_counted_tokens(batch):
    check(*batch)


@settings(deadline=None, max_examples=100)
@given(batches(), st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.data())
def test_special_values_come_from_counted_tokens_alone(batch, special, data):
    acts_BTD, mask_BT = batch
    b, t = data.draw(st.sampled_from(np.argwhere(mask_BT).tolist()))
    acts_BTD[b, t, 0] = special
    check(acts_BTD, mask_BT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_of_one_length(dtype):
    acts = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    check(acts, np.ones((3, 7), dtype=np.bool_))


def test_no_position_counts_in_every_row():
    mask_BT = np.array([[True, False, False], [False, True, False], [False, False, True]])
    acts = torch.arange(9.0).reshape(3, 3, 1) - 20
    check(acts, mask_BT)


def test_mean_of_half_precision_is_summed_in_float32():
    acts = torch.full((1, 4096, 1), 1 + 2**-7, dtype=torch.bfloat16)
    mean = POOLINGS["mean"].pool(TokenMask.build(np.ones((1, 4096), dtype=np.bool_), "cpu"), acts)
    assert mean.item() == pytest.approx(1 + 2**-7, rel=1e-6)


@pytest.mark.parametrize("lengths", [np.arange(100, 400), np.full(300, 128)])
def test_drawn_tokens_are_spread_over_texts_and_never_the_first_of_several(lengths):
    rng = np.random.default_rng(0)
    mask_BT = np.arange(lengths.max()) < lengths[:, None]
    ids_BT = rng.integers(0, 50_000, mask_BT.shape)
    places = TokenMask.build(mask_BT, "cpu", ids_BT).drawn_B.numpy()
    assert (places >= 1).all()
    assert (places < lengths).all()
    share, _ = np.histogram(places / lengths, bins=5, range=(0, 1))
    assert share.min() > 0.6 * share.mean()
    ids_BT[~mask_BT] = 7  # padding does not choose
    assert (TokenMask.build(mask_BT, "cpu", ids_BT).drawn_B.numpy() == places).all()
    alone = TokenMask.build(np.array([[False, True]]), "cpu", np.array([[3, 5]]))
    assert alone.drawn_B.tolist() == [1]


def test_row_without_counted_token_is_refused():
    with pytest.raises(AssertionError, match="needs a token"):
        TokenMask.build(np.array([[True], [False]]), "cpu")
