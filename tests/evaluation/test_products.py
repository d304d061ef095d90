"""16-bit products on a CPU without instructions for them: exact up to one rounding, and the same in every batch."""

import pytest
import torch
from torch.nn import functional

from aura_dist.evaluation import products
from aura_dist.evaluation.decoding import Decoder, Rows
from aura_dist.evaluation.sampling import Decoding
from tests.models import tiny_causal

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch):
    """A CPU without such instructions, whatever this one has."""
    monkeypatch.setattr(products, "multiplies_fast", lambda dtype: dtype.itemsize > 2)


def within(dtype, compute):
    model = torch.nn.Linear(1, 1).to(dtype)
    model.dtype = dtype
    products.input_device, device_of = lambda model: torch.device("cpu"), products.input_device
    try:
        with torch.no_grad(), products.exact_products(model):
            return compute()
    finally:
        products.input_device = device_of


def draw(dtype, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def rounded_once(got, exact):
    """Equal to the exact values' rounding, but for some at the middle between two values of the dtype."""
    expected = exact.to(got.dtype)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert (got != expected).double().mean() < 5e-3
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_rounded_once(dtype, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK", 1000)  # several blocks of a weight
    x_BTK, w_NK, b_N = draw(dtype, 3, 5, 96), draw(dtype, 130, 96), draw(dtype, 130)
    exact = functional.linear(x_BTK.double(), w_NK.double())
    rounded_once(within(dtype, lambda: functional.linear(x_BTK, w_NK)), exact)
    rounded_once(within(dtype, lambda: functional.linear(x_BTK, w_NK, b_N)), exact + b_N.double())
    x_MK = x_BTK.view(15, 96)
    rounded_once(within(dtype, lambda: torch.addmm(b_N, x_MK, w_NK.T)), exact.view(15, -1) + b_N.double())
    q, k, v = draw(dtype, 2, 4, 3, 16), draw(dtype, 2, 2, 9, 16), draw(dtype, 2, 2, 9, 16)
    mask = torch.rand((2, 1, 3, 9), generator=torch.Generator().manual_seed(0)) > 0.3

    def attend(*tensors):
        return functional.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=0.3, enable_gqa=True)

    rounded_once(within(dtype, lambda: attend(q, k, v)), attend(q.double(), k.double(), v.double()))


def test_other_tensors_are_left_to_torch():
    """Float32, and weights of another class, such as quantised ones."""

    class Other(torch.Tensor):
        pass

    x, w = draw(torch.float32, 9, 16), draw(torch.float32, 7, 16)
    assert torch.equal(within(torch.bfloat16, lambda: functional.linear(x, w)), functional.linear(x, w))
    x, w = x.bfloat16(), w.bfloat16()
    other = within(torch.bfloat16, lambda: functional.linear(x, w.as_subclass(Other)))
    assert isinstance(other, Other)


def test_a_fast_cpu_computes_by_itself(monkeypatch):
    monkeypatch.setattr(products, "multiplies_fast", lambda dtype: True)
    monkeypatch.setitem(products._INSTEAD, functional.linear, lambda *a: pytest.fail("called"))
    x, w = draw(torch.bfloat16, 9, 16), draw(torch.bfloat16, 7, 16)
    assert torch.equal(within(torch.bfloat16, lambda: functional.linear(x, w)), functional.linear(x, w))


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "falcon-40b-style"])
def test_rows_do_not_depend_on_their_batch(name):
    """Bit for bit: a value that is rounded in another way changes half of those that follow it."""
    model = tiny_causal(name).bfloat16()
    prompts = torch.randint(3, 384, (6, 30), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [prompt[:length] for prompt, length in zip(prompts, (30, 4, 17, 1, 25, 9), strict=True)]
    seen = []
    decoder = Decoder(model, Decoding(1, 5, 1.0, 0.9, 0), [])
    original = decoder._forward
    decoder._forward = lambda *a: seen.append(original(*a)) or seen[-1]

    def logits(which):
        seen.clear()
        decoder.run(Rows([prompts[p] for p in which], range(len(which)), which))
        return torch.stack([logits_BV for logits_BV, _ in seen], dim=1)

    together = logits(range(6))
    for p in range(6):
        assert torch.equal(logits([p])[0], together[p])
