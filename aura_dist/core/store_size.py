"""Shape and bytes of a store before it is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from aura_dist.core.partition import columns_per_chunk

# of float32 with byte shuffle and lz4, by dtype of the forward: what Gemma 3 270M's maxima over Jigsaw comments take
COMPRESSED = {"float32": 0.91, "bfloat16": 0.45, "float16": 0.62}
# of float16 values stored as float16
COMPRESSED_HALF = 0.95


@dataclass(frozen=True)
class StoreSize:
    """Rows, neurons, arrays and chunks of a store, and its bytes as they are and as they are expected on disk."""

    num_rows: int
    num_neurons: int
    num_arrays: int
    num_chunks: int
    raw_bytes: int
    compressed_bytes: int


def store_size(
    num_rows: int, rows_chunk: int, widths: Sequence[int], dtype: str, item_bytes: Sequence[int]
) -> StoreSize:
    """Size of a store of `widths` neurons a site, one array for each of `item_bytes` (a pooling's stored item)."""
    row_chunks = ceil(num_rows / rows_chunk)
    chunks = sum(row_chunks * ceil(w / columns_per_chunk(w, num_rows, i)) for w in widths for i in item_bytes)
    cells = num_rows * sum(widths)
    compressed = sum(cells * i * (COMPRESSED_HALF if i == 2 else COMPRESSED[dtype]) for i in item_bytes)
    return StoreSize(
        num_rows, sum(widths), len(widths) * len(item_bytes), chunks, cells * sum(item_bytes), ceil(compressed)
    )
