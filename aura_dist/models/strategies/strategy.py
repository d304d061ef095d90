"""What every strategy is asked: a strategy is one way to spread a model over ranks, devices, host memory and disk.

A new strategy is one file with a subclass of `Strategy`, and one row in `table.py`. Modules of strategies import torch,
and whatever loads the weights, inside functions, because planning reads the table without them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any

from aura_dist.ranks.layout import Layout
from aura_dist.ranks.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aura_dist.models.checkpoint import Checkpoint

# name of a setting → its value, as the strategy's `parse` returns them
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Held:
    """Bytes of weights of one rank: always on its device; gathered there for a while; away, read again for every batch.

    `away` maps `cpu`, `disk` or `checkpoint` to the bytes that are kept there. Where weights are read once a wave,
    hidden states that are `waiting` take host memory.
    """

    placed: int
    gathered: int = 0
    away: Mapping[str, int] = field(default_factory=dict)
    waiting: int = 0


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of each decoder layer of a base model, and of what is outside them: embeddings, a final norm.

    Each pair is (kept whole, split under tensor parallelism).
    """

    layers: tuple[tuple[int, int], ...]
    outside: tuple[int, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.outside) + sum(map(sum, self.layers))

    def per_tensor_rank(self, num_ranks: int) -> tuple[int, tuple[int, ...]]:
        """Bytes outside the layers, and of each layer, on one of the ranks that split columns."""
        outside, *layers = (whole + ceil(split / num_ranks) for whole, split in (self.outside, *self.layers))
        return outside, tuple(layers)

    def gathered_by_layer(self, layout: Layout) -> Held:
        """A share of every tensor; two layers and all that is outside them are whole at once."""
        outside, layers = self.per_tensor_rank(layout.tensor)
        return Held(ceil((outside + sum(layers)) / layout.fsdp), outside + sum(sorted(layers)[-2:]))


@dataclass(frozen=True)
class Room:
    """What everything but the weights leaves of one GPU and of the host, in bytes; inf is not limited."""

    gpu: bool
    device_bytes: float
    host_bytes: float
    hidden_bytes: int = 0  # of the hidden states of all rows that a rank runs


@dataclass(frozen=True)
class Spread:
    """A model over the ranks of a launch: the layout, and the options of its strategy."""

    layout: Layout
    options: Options = field(default_factory=dict)


class Strategy(ABC):
    """One row of the table."""

    name: str  # as in `Layout.strategy`
    spellings: tuple[str, ...]  # of `--sharding`, for people
    summary: str  # what it does, in a few words
    options: tuple[str, ...] = ()  # settings that it looks at; every verb refuses others
    holds_quantised: bool = False  # whether it can hold weights that a library has quantised
    by_layer: bool = False  # whether a wave's rows all go through a layer before any goes on: `models/layerwise.py`
    last_resort: bool = False  # whether plans suggest it only where nothing else fits
    generates: bool = True  # whether a model may continue texts token by token
    maps_files: bool = False  # whether a rank on a CPU uses the weights in the checkpoint's files, by the page cache

    def takes(self, sharding: str) -> bool:
        """Whether `sharding`, a value of `--sharding`, spells this strategy."""
        return sharding in self.spellings

    def parse(self, given: Options) -> Options:
        """The strategy's options from `given`, which holds those that the user set; ConfigError for a wrong one."""
        return given

    @abstractmethod
    def layout(self, sharding: str, world_size: int) -> Layout:
        """The parallel axes; ConfigError if `sharding` does not fit so many ranks."""

    def collective(self, layout: Layout) -> bool:
        """Whether a forward runs collectives, so that the ranks of a replica must run equally many."""
        return layout.replica_size > 1

    @abstractmethod
    def load(self, checkpoint: "Checkpoint", world: World, options: Options) -> "PreTrainedModel":
        """The model as this rank holds it."""

    @abstractmethod
    def held(self, weights: WeightSizes, spread: Spread, room: Room) -> Held:
        """Weights of the rank that holds most."""

    @abstractmethod
    def offers(self, world_size: int, *, gpu: bool, splits: bool) -> Iterator[Spread]:
        """The ways of spreading to compare in a plan; `splits`: tensor parallelism can split the layers."""

    def reads_every_batch(self, options: Options) -> bool:
        """Whether weights that are away are read again for every batch, so that few large batches are better."""
        return False

    def over_more(self, num_ranks: int) -> Spread | None:
        """One model over `num_ranks` ranks, to suggest where nothing fits on fewer; None if that saves no memory."""
        return None

    def title(self, spread: Spread) -> str:
        """`--sharding` and the options that say `spread`, as a user writes them."""
        return self.name
