"""What a plan is made from: a collection's work, the machines that it would run on, the store that it would write."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from aura_dist.models.strategies.strategy import WeightSizes
from aura_dist.store.grid import columns_per_chunk

# bytes of a stored value: a bfloat16 model's values are stored as float32
ITEM_BYTES = {"float32": 4, "bfloat16": 4, "float16": 2}
# share of those bytes that is left after byte shuffle and lz4: for maxima of Gemma 3 270M's MLP over 80 Jigsaw comments
# 0.906 in float32, 0.409 in bfloat16 (0.45 is on the safe side) and, rounded to float16, 1.0
COMPRESSED = {"float32": 0.91, "bfloat16": 0.45, "float16": 1.0}
# the same of tokens' values, of which bfloat16 takes 2 bytes: for Gemma 3 270M's residual stream and neurons over 32
# Jigsaw comments 0.94 and 0.98 in float32, 0.88 and 0.95 in bfloat16
TOKEN_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TOKENS_COMPRESSED = {"float32": 0.98, "bfloat16": 0.96, "float16": 1.0}


@dataclass(frozen=True)
class ForwardCost:
    """Cost of a forward of B rows padded to T tokens: bytes c + r B + l T + t B T at most, FLOPs B (a T + b T²)."""

    constant_bytes: float
    row_bytes: float
    length_bytes: float
    token_bytes: float
    token_flops: float
    square_flops: float

    def peak_bytes(self, num_rows: int, longest: int, num_tokens: int) -> int:
        """Most bytes alive at once in a batch of so many rows, longest text and tokens, padding included, at most."""
        linear = self.row_bytes * num_rows + self.length_bytes * longest + self.token_bytes * num_tokens
        return ceil(self.constant_bytes + linear)

    def flops(self, shapes: Sequence[tuple[int, int]]) -> float:
        """Operations of batches of these shapes [rows, tokens]; a multiplication and an addition count as two."""
        return sum(b * (self.token_flops * t + self.square_flops * t * t) for b, t in shapes)


@dataclass(frozen=True)
class Work:
    """One collection, whatever its sharding."""

    weights: WeightSizes  # in the dtype of the forward, as its cost
    forward: ForwardCost
    neurons: tuple[tuple[int, int], ...]  # (width, columns of a shard) of each captured site
    stored_bytes: int  # of one neuron's values of one row, over all poolings, in the store
    pooled_bytes: int  # of the same in the forward
    rows_chunk: int  # rows of a row chunk
    shortest: int  # tokens of the shortest text
    longest: int
    tokens_per_batch: int  # at most
    tokenizer_bytes: int = 0  # of the tokenizer's file, 0 where not known
    data_bytes: int = 0  # of the texts' file, 0 where not known
    quantised: bool = False  # whether a library stores the weights, which few strategies can hold
    hidden_bytes: int = 0  # of the hidden states of all rows
    layer_neurons: tuple[tuple[int, int], ...] = ()  # `neurons` of the layer that has most
    mapped: bool = False  # whether a CPU can use the weights in their files, because they have the forward's dtype
    kept_bytes: int = 0  # of one token's values at the widest site where they are stored

    def neurons_at_once(self, by_layer: bool) -> tuple[tuple[int, int], ...]:
        """The sites whose values are on their way to the store at the same time: all, or those of a layer."""
        return self.layer_neurons or self.neurons if by_layer else self.neurons

    @property
    def batch_rows(self) -> int:
        """Most rows that a batch can have."""
        return min(self.rows_chunk, max(1, self.tokens_per_batch // self.shortest))

    @property
    def batch_tokens(self) -> int:
        """Most tokens that a batch can have, padding included."""
        return max(self.longest, min(self.tokens_per_batch, self.rows_chunk * self.longest))

    @property
    def token_bytes(self) -> int:
        """Most bytes of the tokens' values of one batch at one site."""
        return self.batch_tokens * self.kept_bytes

    def with_batch(self, tokens_per_batch: int) -> "Work":
        return replace(self, tokens_per_batch=tokens_per_batch)


@dataclass(frozen=True)
class Machine:
    """Where ranks would run; None is not limited."""

    gpu: bool  # whether the forward runs on a GPU with memory of its own
    device_bytes: int | None = None  # memory of one GPU
    host_bytes: int | None = None  # memory of one machine, which `ranks_per_host` ranks share
    ranks_per_host: int = 1


@dataclass(frozen=True)
class StoreSize:
    """Rows, neurons, arrays and chunks of responses, a store's bytes, those expected on disk, and its files.

    `score_files` are what `score` adds to `num_files`. The bytes include the values of `num_tokens` tokens of
    `token_neurons` neurons, where these are stored.
    """

    num_rows: int
    num_neurons: int
    num_arrays: int
    num_chunks: int
    raw_bytes: int
    compressed_bytes: int
    num_files: int = 0
    score_files: int = 0
    num_tokens: int = 0
    token_neurons: int = 0


def store_size(num_rows: int, rows_chunk: int, widths: Sequence[int], precisions: Sequence[str]) -> StoreSize:
    """Size of a store of sites of these `widths`, with one array a site and pooling.

    `precisions` are the dtypes of the poolings' values before they are stored.
    """
    row_chunks = ceil(num_rows / rows_chunk)
    items = [ITEM_BYTES[p] for p in precisions]
    largest = max(items, default=1)
    chunks = len(items) * sum(row_chunks * ceil(w / columns_per_chunk(w, num_rows, largest)) for w in widths)
    cells = num_rows * sum(widths)
    compressed = ceil(cells * sum(ITEM_BYTES[p] * COMPRESSED[p] for p in precisions))
    return StoreSize(num_rows, sum(widths), len(widths) * len(items), chunks, cells * sum(items), compressed)


def with_tokens(size: StoreSize, num_tokens: int, num_neurons: int, dtype: str) -> StoreSize:
    """`size` with the values of `num_tokens` tokens at sites of so many neurons in all; `dtype` is the forward's."""
    raw = num_tokens * num_neurons * TOKEN_BYTES[dtype]
    return replace(
        size,
        raw_bytes=size.raw_bytes + raw,
        compressed_bytes=size.compressed_bytes + ceil(raw * TOKENS_COMPRESSED[dtype]),
        num_tokens=num_tokens if num_neurons else 0,
        token_neurons=num_neurons,
    )
