"""What a budget is made from: a collection's work, the machines it would run on, and how the weights are spread."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from aura_dist.ranks.layout import Layout


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
class WeightSizes:
    """Bytes of a base model's weights; each pair is (kept whole, split under tensor parallelism).

    Attributes
    ----------
    layers
        Of each decoder layer.
    outside
        Of what stands outside the layers: embeddings, a final norm.
    largest_bytes
        Of the largest tensor.
    """

    layers: tuple[tuple[int, int], ...]
    outside: tuple[int, int]
    largest_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(self.outside) + sum(map(sum, self.layers))

    def per_tensor_rank(self, num_ranks: int) -> "tuple[int, tuple[int, ...]]":
        """Bytes outside the layers, and of each layer, on one of the ranks that split columns."""
        outside, *layers = (whole + ceil(split / num_ranks) for whole, split in (self.outside, *self.layers))
        return outside, tuple(layers)


@dataclass(frozen=True)
class Work:
    """One collection, whatever its sharding.

    Attributes
    ----------
    weights, forward
        Of the model, in the dtype of the forward.
    neurons
        (width, columns of a chunk) of each captured site.
    stored_bytes, pooled_bytes
        Bytes of one neuron's values of one row, over all poolings, in the store and in the forward.
    rows_chunk, shortest, longest
        Rows of a row chunk; tokens of the shortest and the longest text.
    tokens_per_batch
        Upper bound on the tokens of a batch.
    tokenizer_bytes, data_bytes
        Sizes of the tokenizer's and the texts' files, 0 where not known.
    mapped
        Whether the weights are used as they lie in the checkpoint's files: on a CPU, in the checkpoint's own dtype.
    """

    weights: WeightSizes
    forward: ForwardCost
    neurons: tuple[tuple[int, int], ...]
    stored_bytes: int
    pooled_bytes: int
    rows_chunk: int
    shortest: int
    longest: int
    tokens_per_batch: int
    tokenizer_bytes: int = 0
    data_bytes: int = 0
    mapped: bool = False

    @property
    def num_neurons(self) -> int:
        return sum(width for width, _ in self.neurons)

    @property
    def batch_rows(self) -> int:
        """Most rows that a batch can have."""
        return min(self.rows_chunk, max(1, self.tokens_per_batch // self.shortest))

    @property
    def batch_tokens(self) -> int:
        """Most tokens that a batch can have, padding included."""
        return max(self.longest, min(self.tokens_per_batch, self.rows_chunk * self.longest))

    def with_batch(self, tokens_per_batch: int) -> "Work":
        return replace(self, tokens_per_batch=tokens_per_batch)


@dataclass(frozen=True)
class Machine:
    """Where ranks run; None is not limited.

    Attributes
    ----------
    gpu
        Whether the forward runs on a GPU with memory of its own.
    device_bytes
        Memory of one GPU.
    host_bytes
        Memory of one machine.
    ranks_per_host
        Ranks that share it.
    """

    gpu: bool
    device_bytes: int | None = None
    host_bytes: int | None = None
    ranks_per_host: int = 1


@dataclass(frozen=True)
class Tier:
    """A place of `dispatch`: a GPU's number, `cpu` or `disk`, and the weights it may hold (None: any)."""

    name: str
    limit_bytes: int | None


@dataclass(frozen=True)
class Spread:
    """How the weights are spread: the layout, where `zero3` keeps its share, the places of `dispatch` in order."""

    layout: Layout
    offload: str = "none"
    tiers: tuple[Tier, ...] = ()

    @property
    def name(self) -> str:
        axes = [
            f"{axis}={size}" for axis, size in (("fsdp", self.layout.fsdp), ("tensor", self.layout.tensor)) if size > 1
        ]
        if self.layout.strategy in ("fsdp", "tensor"):
            return ",".join(axes) or "replicate"
        return self.layout.strategy + (f" --offload {self.offload}" if self.offload != "none" else "")
