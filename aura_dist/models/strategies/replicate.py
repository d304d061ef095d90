"""`replicate`: every rank holds the whole model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from aura_dist.models.strategies.strategy import Held, Options, Room, Spread, Strategy, WeightSizes
from aura_dist.ranks.layout import Layout
from aura_dist.ranks.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aura_dist.models.checkpoint import Checkpoint


class Replicate(Strategy):
    name = "replicate"
    spellings = ("replicate",)
    summary = "every rank holds the whole model and runs its own rows"
    holds_quantised = True
    maps_files = True

    def layout(self, sharding: str, world_size: int) -> Layout:
        return Layout(self.name, world_size)

    def load(self, checkpoint: "Checkpoint", world: World, options: Options) -> "PreTrainedModel":
        return load_whole(checkpoint, world)

    def held(self, weights: WeightSizes, spread: Spread, room: Room) -> Held:
        return Held(weights.total_bytes)

    def offers(self, world_size: int, *, gpu: bool, splits: bool) -> Iterator[Spread]:
        yield Spread(Layout(self.name, world_size))


def load_whole(checkpoint: "Checkpoint", world: World) -> "PreTrainedModel":
    """All weights on the device of this rank."""
    return checkpoint.read() if world.device == "cpu" else checkpoint.read(device_map=world.device)
