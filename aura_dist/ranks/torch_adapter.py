"""The one module that uses private names of torch; seen with 2.13."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # sees every kernel that a forward calls
from torch.utils._pytree import tree_leaves, tree_map, tree_structure  # the tensors among a call's arguments

__all__ = ["TorchDispatchMode", "tree_leaves", "tree_map", "tree_structure"]  # of what is imported

GROUPED_MM = torch.ops.aten._grouped_mm.default  # a mixture's experts in one product
READ_SCALAR = torch.ops.aten._local_scalar_dense.default  # `bool(tensor)`, `tensor.item()`


# how allocators that raise a plain RuntimeError say it: torch's for a CPU, CUDA's runtime, cuBLAS and cuDNN
_NO_MEMORY = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a device or of the host, did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of `dtype`, so that oneDNN takes them."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def packet(kernel: Any) -> Any:
    """The operation that a kernel is one form of: the key of torch's table of FLOP formulas."""
    return kernel._overloadpacket


@cache
def returns_views(kernel: Any) -> bool:
    """Whether a kernel's results share memory with its arguments, by its schema."""
    return any(value.alias_info is not None for value in kernel._schema.returns)


def storage_key(storage: torch.UntypedStorage) -> int:
    """Identity of a storage, the same for every Python object that refers to it."""
    return int(storage._cdata)


def own_hooks(module: nn.Module) -> list[Any]:
    """Hooks of `module` itself that run before or after its forward."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def num_forward_hooks(module: nn.Module) -> int:
    """Forward hooks that see the output of `module`, torch's global ones among them."""
    return len(module._forward_hooks) + len(torch.nn.modules.module._global_forward_hooks)


@contextmanager
def without_compiled_parts(model: nn.Module) -> Iterator[Any]:
    """`model` without the wrapper of `torch.compile`; within the context, its parts have none either.

    A wrapper changes the names of all that is in it.
    """
    whole = _within(model)
    wrapped = [(m, name, child) for m in whole.modules() for name, child in m._modules.items() if child is not None]
    wrapped = [(parent, name, child) for parent, name, child in wrapped if _within(child) is not child]
    for parent, name, child in wrapped:
        parent._modules[name] = _within(child)
    try:
        yield whole
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def _within(module: nn.Module) -> nn.Module:
    """What `torch.compile` has wrapped in `module`; `module` itself where it is no wrapper."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module
