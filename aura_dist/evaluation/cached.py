"""Rows of a cache of keys and values: join them with other rows, widen them on the left, drop columns, append in place.

All rows of a cache have the same number of columns. A row's tokens are in its last columns; what is before them is
padding, which the attention mask leaves out.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicLayer

from aura_dist.sites.transformers_adapter import SELECTABLE_LAYERS


def only_attention(cache: object) -> bool:
    """Whether a cache holds keys and values alone: its rows can be chosen, and a text can be read piece by piece."""
    return isinstance(cache, Cache) and all(type(layer) in SELECTABLE_LAYERS for layer in cache.layers)


def append_in_place(cache: Cache, room: int) -> None:
    """Let steps write their columns beside the others; all move every `room` steps, and after rows change."""
    for layer in _layers(cache):
        layer.update = partial(_update, ref(layer), room)  # weak, because the layer holds it


def mask_unread(cache: Cache, is_padded: bool) -> None:
    """Let transformers make the mask of a step from one of padding without reading it, which would wait for a GPU.

    It reads a mask to find out whether a kernel can go without; it does not where all layers say that they can be
    compiled. A step without a mask of padding then needs none, and nothing is read.
    """
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):
            layer.is_compileable = is_padded


def _update(
    of: Callable[[], Any], room: int, keys: Tensor, values: Tensor, *args: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    """What `layer.update` does; a sliding window that is full drops a column at each step, so it stays as it is."""
    layer = of()
    number = layer.get_seq_length() + keys.shape[-2]
    if layer.is_sliding:
        room = min(room, layer.sliding_window - 1 - number)
        if room < 0:
            both: tuple[Tensor, Tensor] = type(layer).update(layer, keys, values, *args, **more)
            return both
        layer.cumulative_length = number
    layer.keys, layer.values = _append(layer.keys, keys, room), _append(layer.values, values, room)
    return layer.keys, layer.values


def _append(held: Tensor, new: Tensor, room: int) -> Tensor:
    """`held` and `new` [rows, heads, columns, width] as one, in the memory of `held` if that has free columns after it.

    Otherwise in memory with free columns for `room` more.
    """
    rows, heads, first, width = held.shape
    last, columns = first + new.shape[-2], held.stride(1) // width
    whole, strides = (rows, heads, columns, width), (heads * columns * width, columns * width, width, 1)
    num_bytes = held.untyped_storage().nbytes() - held.storage_offset() * held.itemsize
    if held.stride() == strides and num_bytes == math.prod(whole) * held.itemsize and last <= columns:
        all_columns = held.as_strided(whole, strides)
    else:
        all_columns = held.new_empty((rows, heads, last + room, width))
        all_columns[:, :, :first] = held
    all_columns[:, :, first:last] = new
    return all_columns[:, :, :last]


def join(cache: Cache, other: Cache) -> None:
    """Append the rows of `other` to those of `cache`; the narrower of the two is widened on the left."""
    by = cache.get_seq_length() - other.get_seq_length()
    for mine, theirs in zip(_layers(cache), _layers(other), strict=True):
        _move(theirs if by > 0 else mine, abs(by))
        mine.keys = torch.cat([mine.keys, theirs.keys])
        mine.values = torch.cat([mine.values, theirs.values])


def drop_columns(cache: Cache, number: int) -> None:
    """Drop the first columns of all rows."""
    for layer in _layers(cache):
        _move(layer, -number)


def _layers(cache: Cache) -> list[DynamicLayer]:
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    assert len(layers) == len(cache.layers), "a cache of keys and values alone"
    return layers


def _move(layer: DynamicLayer, by: int) -> None:
    """Put `by` columns before those of a layer, or drop as many; a sliding window holds its last columns alone."""
    if not by or not layer.is_initialized:
        return
    held = layer.keys.shape[-2]
    columns = layer.get_seq_length() + by
    if layer.is_sliding:
        layer.cumulative_length = columns
        columns = min(columns, layer.sliding_window - 1)
    layer.keys = pad(layer.keys, (0, 0, columns - held, 0))
    layer.values = pad(layer.values, (0, 0, columns - held, 0))
