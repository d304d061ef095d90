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
    found = _parameter(model, load, name, tensor)
    if found is None:
        return None
    its_name, parameter = found
    read = [_read(parameter, load, name, _numbers(tensor.shape, dim)) for dim in range(tensor.ndim)]
    module, _ = generic(its_name.rpartition(".")[0])
    if tensor.ndim == 1:
        return Place(module, tuple(parameter.shape), read[0], None)
    rows, columns = read
    here = (rows != ELSEWHERE).any(dim=1).nonzero()[:, 0]
    if not len(here):
        return None
    if not (rows[here] == rows[here, :1]).all():  # the checkpoint has it transposed
        rows, columns = columns, rows
    return Place(module, tuple(parameter.shape), rows[:, 0].contiguous(), columns[here[0]].contiguous())


def neurons_dim(model: nn.Module, load: Load, name: str, tensor: Tensor) -> int | None:
    """Which dim of a checkpoint's tensor [E, ., .] of experts' down projections has their neurons: 1 or 2.

    Of vLLM's own parameter, [E, outputs, neurons], it is the last, whatever the checkpoint has. None if the loader does
    not show it.
    """
    found = _parameter(model, load, name, tensor)
    if found is None:
        return None
    _, parameter = found
    if parameter.ndim != 3 or parameter.is_meta or not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return None
    marks = (torch.arange(tensor.shape[1], device=tensor.device) % 2).to(tensor.dtype)[None, :, None]
    with _scratch(parameter, parameter.dtype) as scratch:  # in float32, experts could need more memory than is left
        load([(name, marks.expand(tensor.shape))])
        held = (scratch != ELSEWHERE).any(dim=2).any(dim=1).nonzero()[:, 0]
        if not len(held):
            return None
        expert = scratch[held[0]].to("cpu", torch.float32)
    by_row, by_column = _changes(expert.T), _changes(expert)
    if by_row == by_column:
        return None
    return 1 if by_column else 2


def _changes(values: Tensor) -> bool:
    """Whether what is loaded differs along the last dim."""
    before, after = values[:, :-1], values[:, 1:]
    return bool(((before != after) & (before != ELSEWHERE) & (after != ELSEWHERE)).any())


def _parameter(model: nn.Module, load: Load, name: str, tensor: Tensor) -> tuple[str, nn.Parameter] | None:
    """The parameter that a checkpoint's tensor becomes, or becomes a part of; None if this rank has none."""
    loaded = load([(name, tensor)])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = [one for one in loaded or () if one in parameters]
    if len(found) > 1:
        raise ModelError(f"{name!r}: expected one parameter of {type(model).__name__} that it becomes, got {found}")
    return (found[0], parameters[found[0]]) if found else None


def _numbers(shape: torch.Size, dim: int) -> Tensor:
    """A tensor of that shape whose values are their own index along `dim`; exact in float32 up to 2 ** 24."""
    along = torch.arange(shape[dim], dtype=torch.float32)
    return along.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


def _read(parameter: nn.Parameter, load: Load, name: str, numbers: Tensor) -> Tensor:
    with _scratch(parameter) as scratch:
        load([(name, numbers)])
        return scratch.to("cpu", torch.int64)


@contextmanager
def _scratch(parameter: nn.Parameter, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Within, the parameter has other memory, of that dtype and `ELSEWHERE`."""
    before = parameter.data
    parameter.data = torch.full(before.shape, float(ELSEWHERE), dtype=dtype, device=before.device)
    try:
        yield parameter.data
    finally:
        parameter.data = before
