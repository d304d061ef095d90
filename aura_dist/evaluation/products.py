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
from torch import Tensor, nn
from torch.nn import functional
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
        if instead is not None and args and args[0].dtype.itemsize == 2 and all(map(_is_plain, args)):
            return instead(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_plain(value: object) -> bool:
    """Whether `value` is no tensor of another kind, such as a quantised or a distributed one."""
    return type(value) in (Tensor, nn.Parameter) or not isinstance(value, Tensor)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[…, N] of `rows` […, K] and `weight` [N, K]."""
    rows_MK = rows.reshape(-1, rows.shape[-1]).float()
    num_rows = len(rows_MK)
    if num_rows < _ROWS:
        rows_MK = functional.pad(rows_MK, (0, 0, 0, _ROWS - num_rows))
    out_MN = torch.empty((num_rows, len(weight)), dtype=rows.dtype)
    step = max(_ROWS, _BLOCK // weight.shape[1])
    for n in range(0, len(weight), step):
        block = rows_MK @ weight[n : n + step].detach().float().T
        if bias is not None:
            block += bias[n : n + step].detach().float()
        out_MN[:, n : n + step] = block[:num_rows]
    return out_MN.view(*rows.shape[:-1], -1)


def _addmm(bias: Tensor, rows: Tensor, weight_KN: Tensor, **options: Any) -> Tensor:
    """GPT-2's linear layers."""
    if options or bias.ndim != 1:
        return torch.addmm(bias, rows, weight_KN, **options)
    return _linear(rows, weight_KN.T, bias)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *more: Any, **o: Any) -> Any:
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.double()
    out = functional.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask, *more, **o)
    return out.to(query.dtype)


_INSTEAD: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    torch.addmm: _addmm,
    functional.scaled_dot_product_attention: _attention,
}
