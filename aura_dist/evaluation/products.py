"""Products of 16-bit values on a CPU without instructions for them: in float32, rounded once to the 16 bits.

torch's own kernel for such a CPU takes one product after another, about seven times as long. The product of two 16-bit
values is exact in float32, sums are taken in float32 in both, and the result is rounded once in both. Only the order of
the sums differs.

Any such difference can change the rounding of a value, and 16-bit models make a large difference of it within some
layers. So the order of a row's sums must not depend on the other rows of its batch: a product has at least `_ROWS`
rows, because the library's kernels for fewer sum in another order, and attention is computed in float64, where padding
changes no sum by as much as a rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from aura_dist.models.load import input_device
from aura_dist.ranks.torch_adapter import multiplies_fast

_ROWS = 8
# values of a block of a weight in float32: a few megabytes, which stay in the processor's cache until they are used
_BLOCK = 1 << 20


@contextmanager
def exact_products(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, products of 16-bit values are computed in float32, if `model` runs on such a CPU."""
    if input_device(model).type != "cpu" or multiplies_fast(model.dtype):
        yield
        return
    with _ExactProducts():
        yield


class _ExactProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        instead = _INSTEAD.get(func)
        if instead is not None and type(args[0]) is Tensor and args[0].dtype.itemsize == 2:
            return instead(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[…, N] of input [..., K] and weight [N, K]."""
    rows_MK = input.reshape(-1, input.shape[-1]).float()
    num_rows = len(rows_MK)
    if num_rows < _ROWS:
        rows_MK = F.pad(rows_MK, (0, 0, 0, _ROWS - num_rows))
    out_MN = torch.empty((num_rows, len(weight)), dtype=input.dtype)
    step = max(_ROWS, _BLOCK // weight.shape[1])
    for n in range(0, len(weight), step):
        block = rows_MK @ weight[n : n + step].detach().float().T
        if bias is not None:
            block += bias[n : n + step].detach().float()
        out_MN[:, n : n + step] = block[:num_rows]
    return out_MN.view(*input.shape[:-1], -1)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **options: Any) -> Tensor:
    """GPT-2's linear layers; its weights are [K, N]."""
    if options or input.ndim != 1:
        return torch.addmm(input, mat1, mat2, **options)
    return _linear(mat1, mat2.T, input)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *more: Any, **o: Any) -> Any:
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.double()
    out = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask, *more, **o)
    return out.to(query.dtype)


_INSTEAD: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.scaled_dot_product_attention: _attention,
}
