"""What a forward costs: bytes alive at once, and FLOPs, found by running the model's own code on the meta device.

Nothing is computed, but every tensor is seen when it is made and when it is freed. So the account holds for any
architecture, its copies and float32 detours included, without a table of formulas.
"""

import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from aura_dist.errors import ModelError, brief
from aura_dist.planning.work import ForwardCost
from aura_dist.ranks import torch_adapter
from aura_dist.ranks.torch_adapter import storage_key, tree_leaves
from aura_dist.sites.find import tap_of
from aura_dist.sites.pooling import POOLINGS, TokenMask
from aura_dist.sites.site import Site
from aura_dist.sites.tap import Callback, Tap, attached
from aura_dist.store.grid import MAX_ROWS_PER_CHUNK


@dataclass(frozen=True)
class Traced:
    """Most bytes alive at once (weights and inputs left out), and floating-point operations, of one forward."""

    peak_bytes: int
    flops: int


@dataclass(frozen=True)
class _Made:
    """What a call made: shape, stride and dtype of each tensor, whether it is one alone; and its operations."""

    tensors: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    alone: bool
    flops: int

    def again(self) -> Any:
        made = tuple(torch.empty_strided(shape, stride, dtype=d, device="meta") for shape, stride, d in self.tensors)
        return made[0] if self.alone else made


def _form(value: Any) -> Any:
    """What a kernel of the meta device sees of an argument, hashable; a tensor with values equals no other."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else object()
    if isinstance(value, list | tuple):
        return tuple(map(_form, value))
    if isinstance(value, dict):
        return tuple((name, _form(entry)) for name, entry in value.items())
    return type(value), value  # 1, 1.0 and True are equal, and make different dtypes


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
    """The kernel's result, and its operations."""
    if func is torch_adapter.GROUPED_MM:  # its meta kernel takes bfloat16 alone
        a_MK, b_GKN = args[:2]
        out = torch.empty((a_MK.shape[0], b_GKN.shape[-1]), dtype=a_MK.dtype, device="meta")
        return out, 2 * a_MK.shape[0] * a_MK.shape[1] * b_GKN.shape[-1]
    out = func(*args, **kwargs)
    count = flop_registry.get(torch_adapter.packet(func))
    return out, 0 if count is None else int(count(*args, **kwargs, out_val=out))


def _made(out: Any, flops: int, given: object) -> _Made | None:
    """How to make such a result again; None unless it is tensors that fill storages of their own."""
    tensors = (out,) if isinstance(out, Tensor) else out if isinstance(out, tuple) else ()
    taken = {storage_key(leaf.untyped_storage()) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_meta:
            return None
        storage = tensor.untyped_storage()
        filled = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if storage_key(storage) in taken or storage.nbytes() != filled.untyped_storage().nbytes():
            return None
        taken.add(storage_key(storage))
    described = tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors)
    return _Made(described, isinstance(out, Tensor), flops) if described else None


class _Account(torch_adapter.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that are alive, and the operations of matrix products.

    With `on_cpu` it also counts the copy of the input that a CPU's sum in a wider dtype makes. Most kernels of the meta
    device are slow Python, and layers are alike, so results are kept for calls of the same form.
    """

    def __init__(self, given: Iterable[Tensor], *, on_cpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self.flops = 0
        self._bytes = 0
        self._on_cpu = on_cpu
        self._given = [tensor.untyped_storage() for tensor in given]  # kept, so that none of them is counted
        self._seen = {storage_key(storage) for storage in self._given}
        self._known: dict[Any, _Made] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch_adapter.READ_SCALAR:
            return False  # models ask whether a mask is all ones: batches are padded
        out = self._call(func, args, kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        if self._on_cpu and torch_adapter.packet(func) is torch.ops.aten.sum and args[0].is_floating_point():
            self._note_widened(args[0], out)
        return out

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The kernel's result, made again where a call of the same form is known; counts its operations."""
        form = None if torch_adapter.returns_views(func) else (func, _form(args), _form(kwargs))
        known = self._known.get(form)
        if known is not None:
            self.flops += known.flops
            return known.again()
        out, flops = _run(func, args, kwargs)
        self.flops += flops
        if form is not None and (made := _made(out, flops, (args, kwargs))) is not None:
            self._known[form] = made
        return out

    def _note_widened(self, summed: Tensor, out: Tensor) -> None:
        """The copy in the sum's dtype: of the whole storage, which is summed at once if all rows are equally long."""
        if out.dtype != summed.dtype:
            elements = summed.untyped_storage().nbytes() // summed.itemsize
            self.peak_bytes = max(self.peak_bytes, self._bytes + elements * out.itemsize)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key not in self._seen:
            self._seen.add(key)
            self._bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._bytes)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self._bytes -= num_bytes


class _FusedAttention(TorchFunctionMode):
    """Counts `scaled_dot_product_attention` as the fused kernels run it: no scores, but a mask in the values' dtype.

    On CPU and GPU alike these kernels take heads of one width; other calls are traced step by step.
    """

    def __init__(self, account: _Account) -> None:
        super().__init__()
        self._account = account

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :]))[:3]
            if query.shape[-1] == key.shape[-1] == value.shape[-1]:
                mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
                return self._fused(query, key, mask)
        return func(*args, **kwargs)

    def _fused(self, query_BHTD: Tensor, key_BHTD: Tensor, mask: Tensor | None) -> Tensor:
        wide = torch.empty_like(mask, dtype=query_BHTD.dtype) if mask is not None else None
        out = torch.empty_like(query_BHTD)
        self._account.flops += 4 * query_BHTD.numel() * key_BHTD.shape[-2]
        del wide
        return out


def _pooling(
    model: PreTrainedModel, sites: Sequence[Site], poolings: Sequence[str], shape: tuple[int, int]
) -> AbstractContextManager[None]:
    """Within the context, a forward pools as `Capture` does on a batch of two lengths; the values are dropped."""
    mask_BT = np.ones(shape, dtype=np.bool_)
    mask_BT[0, 1:] = False
    mask = TokenMask.build(mask_BT, "meta")

    def pool_at(tap: Tap) -> Callback:
        def pool(raw: object, alone: bool) -> None:
            acts_BTD = tap.read(raw, tap.width, shape)
            for pooling in poolings:
                POOLINGS[pooling].pool(mask, acts_BTD)

        return pool

    return attached(model, [(tap, pool_at(tap)) for tap in (tap_of(model, site) for site in sites)])


def trace_forward(
    model: PreTrainedModel,
    sites: Sequence[Site],
    poolings: Sequence[str],
    shape: tuple[int, int],
    *,
    on_cpu: bool = True,
) -> Traced:
    """Run the base model of `model` (on the meta device) on a batch of `shape` [rows, tokens], pooling at `sites`.

    `on_cpu` says where the real forward would run, because a CPU's sums take more memory.

    ModelError if the forward depends on values, which a trace does not have, or a site has values of another shape.
    """
    ids, mask = (torch.ones(shape, dtype=torch.int64, device="meta") for _ in range(2))
    account = _Account([*model.parameters(), *model.buffers(), ids, mask], on_cpu=on_cpu)
    try:
        with torch.no_grad(), _pooling(model, sites, poolings, shape), account, _FusedAttention(account):
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception as error:  # a model's code raises anything
        raise ModelError(f"{type(model).__name__} cannot be planned without its weights: {brief(error)}") from error
    return Traced(account.peak_bytes, account.flops)


def forward_cost(
    model: PreTrainedModel, sites: Sequence[Site], poolings: Sequence[str], longest: int, *, on_cpu: bool = True
) -> ForwardCost:
    """What a forward of any batch costs whose texts have at most `longest` tokens.

    The peak of B rows of T tokens is the largest of sums of terms in 1, T, B, B T and B T², so convex in B and in T:
    the bilinear surface through the corners (two rows or a whole row chunk, one token or the longest text) is above
    it; coefficients below 0 are raised to 0. FLOPs of B rows are B (a T + b T²) exactly: products with weights, and
    attention, masked or not.
    """
    few, many, short = 2, MAX_ROWS_PER_CHUNK, 1
    long_few, long_many, short_few, short_many = (
        trace_forward(model, sites, poolings, (rows, tokens), on_cpu=on_cpu)
        for tokens in (longest, short)
        for rows in (few, many)
    )
    span = max(1, longest - short)
    long_row, short_row = (
        (most.peak_bytes - least.peak_bytes) / (many - few)
        for least, most in ((long_few, long_many), (short_few, short_many))
    )
    token = (long_row - short_row) / span
    length = (long_few.peak_bytes - short_few.peak_bytes) / span - few * token
    row = short_row - short * token
    square = (long_few.flops / longest - short_few.flops / short) / (few * span)
    return ForwardCost(
        constant_bytes=max(0.0, short_few.peak_bytes - short * length - few * (row + short * token)),
        row_bytes=max(0.0, row),
        length_bytes=max(0.0, length),
        token_bytes=max(0.0, token),
        token_flops=long_few.flops / (few * longest) - square * longest,
        square_flops=square,
    )
