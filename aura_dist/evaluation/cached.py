"""Rows of a cache of keys and values: join them with other rows, widen them on the left, drop columns.

All rows of a cache have the same number of columns. A row's tokens are in its last columns; what is before them is
padding, which the attention mask leaves out.
"""

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicLayer

from aura_dist.sites.transformers_adapter import SELECTABLE_LAYERS


def only_attention(cache: object) -> bool:
    """Whether a cache holds keys and values alone: its rows can be chosen, and a text can be read piece by piece."""
    return isinstance(cache, Cache) and all(type(layer) in SELECTABLE_LAYERS for layer in cache.layers)


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
