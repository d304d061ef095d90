"""Where a served model has the units of a site: vLLM merges linear layers, reorders heads, and gives ranks slices.

The model's own loader tells: what it does with a weight, it does with a weight whose values are their own row or
column numbers. So no layout is written down here, of any architecture or number of ranks.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aura_dist.errors import ModelError

Load = Callable[[Iterable[tuple[str, Tensor]]], Any]
ELSEWHERE = -1  # the number of what comes from another tensor

# parts of names that transformers, checkpoints and vLLM put before the layers in different ways
_WRAPPERS = frozenset({"model", "language_model", "text_model", "base_model", "transformer"})


def plain_name(name: str) -> str:
    """A module's or tensor's name without the wrappers around the layers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def generic(name: str) -> tuple[str, str | None]:
    """A name with `*` for the number of its layer, and that number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return name, None
    number, parts[at] = parts[at], "*"
    return ".".join(parts), number


@dataclass(frozen=True)
class Place:
    """A parameter of the served model on this rank, and which of a tensor's units it holds; `ELSEWHERE` for others'."""

    module: str  # with `*` for the layer's number
    shape: tuple[int, ...]
    outputs: Tensor  # [rows of the parameter] int64 on the CPU
    inputs: Tensor | None  # [columns of the parameter]; None for a vector


def probe(model: nn.Module, load: Load, name: str, tensor: Tensor) -> Place | None:
    """The place of a checkpoint's tensor; None if this rank holds nothing of it.

    `load` is the model's own loader. It reads the tensor itself too, so that nothing else changes.
    """
    loaded = load([(name, tensor)])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = [one for one in loaded or () if one in parameters]
    if not found:
        return None
    if len(found) > 1:
        raise ModelError(f"{name!r}: expected one parameter of {type(model).__name__} that it becomes, got {found}")
    parameter = parameters[found[0]]
    read = [_read(parameter, load, name, _numbers(tensor.shape, dim)) for dim in range(tensor.ndim)]
    module, _ = generic(found[0].rpartition(".")[0])
    if tensor.ndim == 1:
        return Place(module, tuple(parameter.shape), read[0], None)
    rows, columns = read
    here = (rows != ELSEWHERE).any(dim=1).nonzero()[:, 0]
    if not len(here):
        return None
    if not (rows[here] == rows[here, :1]).all():  # the checkpoint has it transposed
        rows, columns = columns, rows
    return Place(module, tuple(parameter.shape), rows[:, 0].contiguous(), columns[here[0]].contiguous())


def _numbers(shape: torch.Size, dim: int) -> Tensor:
    """A tensor of that shape whose values are their own index along `dim`; exact in float32 up to 2 ** 24."""
    along = torch.arange(shape[dim], dtype=torch.float32)
    return along.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


def _read(parameter: nn.Parameter, load: Load, name: str, numbers: Tensor) -> Tensor:
    with _scratch(parameter) as scratch:
        load([(name, numbers)])
        return scratch.to("cpu", torch.int64)


@contextmanager
def _scratch(parameter: nn.Parameter) -> Iterator[Tensor]:
    """Within, the parameter has other memory, of float32 and `ELSEWHERE`."""
    before = parameter.data
    parameter.data = torch.full(before.shape, float(ELSEWHERE), dtype=torch.float32, device=before.device)
    try:
        yield parameter.data
    finally:
        parameter.data = before
