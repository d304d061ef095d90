"""`fsdp` and `tensor`, alone or together: weights split over the ranks of a replica, by transformers.

FSDP2 splits every tensor and gathers a decoder layer at a time; tensor parallelism splits columns for good.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from aura_dist.errors import ConfigError
from aura_dist.models.strategies.replicate import Replicate, load_whole
from aura_dist.models.strategies.strategy import Held, Options, Room, Spread, Strategy, WeightSizes
from aura_dist.ranks.device import KINDS, accelerator
from aura_dist.ranks.layout import Layout, axes_layout, read_axes
from aura_dist.ranks.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aura_dist.models.checkpoint import Checkpoint


class _Split(Strategy):
    """What both have in common; their axes may be of one rank, which then holds the whole model."""

    def layout(self, sharding: str, world_size: int) -> Layout:
        return axes_layout(self.name, sharding, world_size)

    def load(self, checkpoint: "Checkpoint", world: World, options: Options) -> "PreTrainedModel":
        from torch.distributed.fsdp import FSDPModule
        from transformers.distributed import DistributedConfig

        from aura_dist.models.strategies.tensor_plan import tensor_plan
        from aura_dist.sites.find import decoder_layers_name
        from aura_dist.sites.transformers_adapter import WHOLE_EXPERTS, WHOLE_EXPERTS_WEIGHT

        layout = world.layout
        if layout.replica_size == 1:
            return load_whole(checkpoint, world)
        check_device(world)
        skeleton = checkpoint.skeleton()
        layers = decoder_layers_name(skeleton)
        plan = tensor_plan(skeleton, layout.tensor, options.get("tensor_plan")) if layout.tensor > 1 else None
        by_expert = {n: s for n, s in (plan or {}).items() if s in (WHOLE_EXPERTS, WHOLE_EXPERTS_WEIGHT)}
        split = DistributedConfig(
            tp_size=layout.tensor,
            tp_plan={n: s for n, s in (plan or {}).items() if n not in by_expert} or None,
            fsdp_size=layout.fsdp,
            fsdp_plan={f"{layers}.*": "free_full_weight"} if layout.fsdp > 1 else None,
            **({"ep_size": layout.tensor, "ep_plan": by_expert} if by_expert else {}),  # earlier versions lack them
        )
        model = checkpoint.read(distributed_config=split)
        if layout.fsdp > 1:
            for layer in model.get_submodule(layers).children():
                assert isinstance(layer, FSDPModule), "each decoder layer is gathered on its own"
        return model

    def held(self, weights: WeightSizes, spread: Spread, room: Room) -> Held:
        held = weights.gathered_by_layer(spread.layout)
        return held if spread.layout.fsdp > 1 else Held(held.placed)

    def title(self, spread: Spread) -> str:
        return spread.layout.axes or Replicate.name


class Fsdp(_Split):
    name = "fsdp"
    spellings = ("fsdp[=K]",)
    summary = "weights split over K ranks (default: all), gathered a layer at a time"

    def takes(self, sharding: str) -> bool:
        return set(read_axes(sharding) or ()) == {"fsdp"}

    def offers(self, world_size: int, *, gpu: bool, splits: bool) -> Iterator[Spread]:
        for k in _replica_sizes(world_size):
            yield Spread(Layout(self.name, world_size, fsdp=k))

    def over_more(self, num_ranks: int) -> Spread:
        return Spread(Layout(self.name, num_ranks, fsdp=num_ranks))


class Tensor(_Split):
    name = "tensor"
    spellings = ("tensor[=K]", "fsdp=N,tensor=K")
    summary = "columns of each layer split over K ranks (default: all), with fsdp over N of those"
    options = ("tensor_plan",)

    def takes(self, sharding: str) -> bool:
        return "tensor" in (read_axes(sharding) or ())

    def offers(self, world_size: int, *, gpu: bool, splits: bool) -> Iterator[Spread]:
        for k in _replica_sizes(world_size) if splits else ():
            yield Spread(Layout(self.name, world_size, tensor=k))


def _replica_sizes(world_size: int) -> list[int]:
    """Ranks that may hold one model together: the powers of two that divide `world_size`, and itself."""
    return [k for k in range(2, world_size + 1) if world_size % k == 0 and (k & (k - 1) == 0 or k == world_size)]


def check_device(world: World) -> None:
    """ConfigError for `--device cpu` beside a GPU, because the library that spreads the weights would take the GPU."""
    found = accelerator()
    if world.device == "cpu" and found is not None:
        raise ConfigError(
            f"--device cpu: expected cuda or auto, because --sharding {world.layout.strategy} runs where the GPUs are; "
            f"hide them with {KINDS[found].hidden_by} to run on the CPU"
        )
