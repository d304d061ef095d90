"""`dispatch`: one process spreads the layers over its GPUs, host memory and disk, by accelerate."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING

from aura_dist.errors import ConfigError
from aura_dist.models.strategies.strategy import Held, Options, Room, Spread, Strategy, WeightSizes
from aura_dist.ranks.device import accelerator
from aura_dist.ranks.layout import Layout
from aura_dist.ranks.process import free_memory
from aura_dist.ranks.world import World
from aura_dist.units import parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aura_dist.models.checkpoint import Checkpoint


class Dispatch(Strategy):
    name = "dispatch"
    spellings = ("dispatch",)
    summary = "one process: layers over its GPUs, then host memory, then disk"
    options = ("max_memory", "offload_folder")
    holds_quantised = True

    def parse(self, given: Options) -> Options:
        """`max_memory` as device (a GPU's number, `cpu` or `disk`) → bytes."""
        return {**given, "max_memory": memory_limits(given["max_memory"])} if given.get("max_memory") else given

    def layout(self, sharding: str, world_size: int) -> Layout:
        if world_size != 1:
            raise ConfigError(
                f"--sharding dispatch: expected one process, which spreads the model over its devices, got {world_size}"
            )
        return Layout(self.name)

    def load(self, checkpoint: "Checkpoint", world: World, options: Options) -> "PreTrainedModel":
        limits = dict(options.get("max_memory") or {}) or None
        if world.device == "cpu" and accelerator() is not None:
            limits = _without_gpus(limits or {"cpu": free_memory()})
        return checkpoint.read(device_map="auto", max_memory=limits, offload_folder=options.get("offload_folder"))

    def held(self, weights: WeightSizes, spread: Spread, room: Room) -> Held:
        """Layers in order onto the tiers; while not all fit the first, it keeps room for the largest layer read in."""
        outside, layers = weights.per_tensor_rank(1)
        largest = max(outside, *layers)
        tiers = _tiers(spread.options, room)
        first = next(iter(tiers))
        if outside + sum(layers) > tiers[first]:
            tiers[first] -= largest
        held = place((outside, *layers), tiers)
        away = {name: size for name, size in held.items() if name == "disk" or (name == "cpu" and room.gpu)}
        placed = max((size for name, size in held.items() if name not in away), default=0)
        return Held(placed, largest if any(away.values()) else 0, away)

    def reads_every_batch(self, options: Options) -> bool:
        return True

    def offers(self, world_size: int, *, gpu: bool, splits: bool) -> Iterator[Spread]:
        if world_size == 1:
            yield Spread(Layout(self.name))


def _without_gpus(limits: Mapping[int | str, int]) -> dict[int | str, int]:
    """`limits`; ConfigError if a GPU is among them. accelerate uses the devices that are named, and else all."""
    for device in limits:
        if isinstance(device, int):
            raise ConfigError(
                f"--max-memory {device}: expected cpu or disk with --device cpu, got the number of a GPU; leave it "
                "out, or use --device cuda"
            )
    return dict(limits)


def memory_limits(entries: Sequence[str]) -> dict[int | str, int]:
    """`0=70GiB cpu=200GiB` → device → bytes."""
    limits: dict[int | str, int] = {}
    for entry in entries:
        name, equals, size = entry.partition("=")
        device = int(name) if name.isdecimal() else name
        if not equals or not (isinstance(device, int) or device in ("cpu", "disk")) or device in limits:
            raise ConfigError(f"--max-memory: expected values such as 0=70GiB cpu=200GiB, each once, got {entry!r}")
        limits[device] = parse_bytes(size, "--max-memory")
    return limits


def _tiers(options: Options, room: Room) -> dict[str, float]:
    """Places for layers → bytes that they may hold, in the order in which they are filled.

    `--max-memory` names them; without it they are one GPU and the host. The disk is last.
    """
    limits = options.get("max_memory")
    if not limits:
        gpu = {"0": room.device_bytes} if room.gpu else {}
        return {**gpu, "cpu": room.host_bytes, "disk": inf}
    gpus = sorted(device for device in limits if isinstance(device, int))
    return {**{str(device): limits[device] for device in (*gpus, "cpu") if device in limits}, "disk": inf}


def place(blocks: Sequence[int], tiers: Mapping[str, float]) -> dict[str, int]:
    """Bytes on each tier when `blocks` fill the tiers in order; none is divided, and the last tier takes any."""
    held, names = dict.fromkeys(tiers, 0), iter(tiers)
    tier = next(names)
    for block in blocks:
        while held[tier] + block > tiers[tier]:
            tier = next(names)
        held[tier] += block
    return held
