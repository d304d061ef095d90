"""`layers`: every rank needs memory for about two decoder layers; rows go through the model layer by layer.

How that is done is in `models/layerwise.py`, and which rows go together in `collecting/waves.py`.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

from aura_dist.errors import ConfigError, ModelError
from aura_dist.models.strategies.dispatch import memory_limits
from aura_dist.models.strategies.replicate import load_whole
from aura_dist.models.strategies.strategy import Held, Options, Room, Spread, Strategy, WeightSizes
from aura_dist.ranks.device import device_memory
from aura_dist.ranks.layout import Layout
from aura_dist.ranks.process import free_memory, local_ranks
from aura_dist.ranks.world import World
from aura_dist.units import parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aura_dist.models.checkpoint import Checkpoint
    from aura_dist.models.layer_reader import LayerReader

# share of the free memory in which hidden states wait where no limit is given
_SHARE = 0.5


class Layers(Strategy):
    name = "layers"
    spellings = ("layers",)
    summary = "every rank holds two decoder layers at a time, and runs its own rows layer by layer"
    by_layer = True
    last_resort = True
    generates = False
    maps_files = True
    options = ("wave_tokens", "host_memory", "max_memory", "offload_folder", "layer_cache")

    def parse(self, given: Options) -> Options:
        """`host_memory` in bytes; `max_memory` as device (a GPU's number or `cpu`) → bytes."""
        parsed = dict(given)
        if given.get("host_memory"):
            parsed["host_memory"] = parse_bytes(given["host_memory"], "--host-memory")
        if given.get("max_memory"):
            limits = memory_limits(given["max_memory"])
            if "disk" in limits:
                raise ConfigError("--max-memory disk: expected devices or cpu with --sharding layers; leave it out")
            if "cpu" in limits and "host_memory" in parsed:
                raise ConfigError("--host-memory: expected it or --max-memory cpu, got both; leave one out")
            parsed["max_memory"] = limits
        return parsed

    def layout(self, sharding: str, world_size: int) -> Layout:
        return Layout(self.name, world_size)

    def load(self, checkpoint: "Checkpoint", world: World, options: Options) -> "PreTrainedModel":
        """The model without the weights of its layers, and with what loads and runs them (`layerwise.executor_of`)."""
        from aura_dist.models.layerwise import Layerwise
        from aura_dist.models.waiting import Waiting
        from aura_dist.sites.find import decoder_layers_name

        shell = checkpoint.skeleton()
        name = decoder_layers_name(shell)
        _check(checkpoint, shell, name)
        model = load_whole(replace(checkpoint, model_class=_without_layers(checkpoint.model_class, name)), world)
        layers: Any = model.get_submodule(name)
        layers.extend(model._aside[0])
        model.__class__ = checkpoint.model_class
        # the reader finds the layers in a model of its own, because recorders take their places in the other
        theirs: Any = shell.get_submodule(name)
        for index, layer in enumerate(layers):
            theirs[index] = layer
        reader = _reader(checkpoint, shell, name, world, options.get("layer_cache"))
        waiting = Waiting(world.device, *_room(world, options, reader), options.get("offload_folder"))
        # lives as long as the model; in a tuple, because torch would take a module for a child
        model._layerwise = (Layerwise(model, reader, waiting, wave_tokens=options.get("wave_tokens")),)
        return model

    def held(self, weights: WeightSizes, spread: Spread, room: Room) -> Held:
        outside, layers = weights.per_tensor_rank(1)
        waiting = room.hidden_bytes if room.host_bytes == inf else min(room.hidden_bytes, int(_SHARE * room.host_bytes))
        return Held(outside, sum(sorted(layers)[-2:]), {"checkpoint": sum(layers)}, waiting)

    def offers(self, world_size: int, *, gpu: bool, splits: bool) -> Iterator[Spread]:
        yield Spread(Layout(self.name, world_size))


def _without_layers(model_class: "type[PreTrainedModel]", name: str) -> "type[PreTrainedModel]":
    """A subclass whose models have nothing in the list `name` of decoder layers; what was there is in `_aside`."""

    def init(self: Any, config: Any) -> None:
        model_class.__init__(self, config)
        layers = self.get_submodule(name)
        self._aside = (list(layers),)  # in a tuple, because torch would take them for children
        del layers[:]

    return type(model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__})


def _check(checkpoint: "Checkpoint", shell: "PreTrainedModel", name: str) -> None:
    """ModelError if the layers cannot be loaded one by one."""
    from aura_dist.models.quantization import conversion
    from aura_dist.sites.transformers_adapter import tied_parameters

    if getattr(shell.config, "quantization_config", None) is not None:
        source = checkpoint.source
        raise ModelError(
            f"--model {source.name!r}: expected weights that are not quantised with --sharding layers; use "
            f"--sharding replicate or dispatch, or {conversion(checkpoint.config, source.name, source.revision)}"
        )
    tied = [parameter for parameter in tied_parameters(shell) if parameter.startswith(f"{name}.")]
    if tied:
        raise ModelError(
            f"--sharding layers: {type(shell).__name__} cannot run layer by layer, because its layers share weights "
            f"({tied[0]}); use --sharding dispatch, fsdp or zero3"
        )


def _reader(
    checkpoint: "Checkpoint", shell: "PreTrainedModel", name: str, world: World, cache: str | None
) -> "LayerReader":
    """What loads the layers, and copies them to the directory `cache`."""
    from contextlib import ExitStack

    from aura_dist.models.layer_cache import LayerCache
    from aura_dist.models.layer_reader import LayerReader
    from aura_dist.models.weights import open_weights
    from aura_dist.sites.transformers_adapter import loaded_names

    opened = ExitStack()
    try:
        tensors = checkpoint.tensors(opened)
        loaded, known = loaded_names(shell), shell.state_dict()
        targets = map(loaded, tensors)
        checkpoint.check_left_out(shell, [target for target, how in targets if not how and target not in known])
        if checkpoint.source.adapter is None:
            sources = [opened.enter_context(open_weights(file)) for file in checkpoint.files()]
            places = {stored.name: (source, stored) for source in sources for stored in source.tensors}
        else:
            places = {tensor: (merged.file, merged.stored) for tensor, merged in tensors.items()}
        copies = None if cache is None else LayerCache(cache, checkpoint.files())
        dtype, source_name = checkpoint.dtype, checkpoint.source.name
        return LayerReader(shell, name, tensors, places, dtype, world.device, opened, source_name, copies)
    except BaseException:
        opened.close()
        raise


def _room(world: World, options: Options, reader: "LayerReader") -> tuple[float, float]:
    """Bytes of hidden states of this rank that may wait on its device, and in host memory."""
    import torch

    limits = options.get("max_memory") or {}
    host = options.get("host_memory", limits.get("cpu", free_memory()))
    if world.device == "cpu":
        return 0, _SHARE * host / local_ranks()
    device, free = torch.device(world.device), device_memory(world.device) or 0
    if (limit := limits.get(device.index or 0)) is not None:
        free = min(free, limit - torch.get_device_module(device).memory_allocated(device))
    return _SHARE * max(0, free - reader.two_layers_bytes), _SHARE * host / local_ranks()
