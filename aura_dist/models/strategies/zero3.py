"""DeepSpeed ZeRO 3: weights split over all ranks, and on request kept in host memory or on NVMe between uses."""

import fcntl
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aura_dist.errors import ConfigError, ModelError, brief
from aura_dist.models.strategies.split import check_device
from aura_dist.models.strategies.strategy import Held, Options, Room, Spread, Strategy, WeightSizes
from aura_dist.ranks.device import accelerator, backend_of
from aura_dist.ranks.layout import Layout
from aura_dist.ranks.process import extensions_dir
from aura_dist.ranks.world import World

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from aura_dist.models.checkpoint import Checkpoint

# elements of parameters that are fetched ahead: so few that at most two layers are whole at once
_PREFETCH_ELEMENTS = 5_000_000


class Zero3(Strategy):
    name = "zero3"
    spellings = ("zero3",)
    summary = "weights split over all ranks, and kept in host memory or on NVMe with --offload"
    options = ("offload",)

    def parse(self, given: Options) -> Options:
        offload = given.get("offload", "none")
        if offload not in ("none", "cpu") and not re.fullmatch("nvme:.+", offload):
            raise ConfigError(f"--offload: expected none, cpu or nvme:PATH, got {offload!r}")
        return given

    def layout(self, sharding: str, world_size: int) -> Layout:
        return Layout(self.name, world_size, fsdp=world_size)

    def collective(self, layout: Layout) -> bool:
        return True  # DeepSpeed's engine asks for a process group of one rank too

    def load(self, checkpoint: "Checkpoint", world: World, options: Options) -> "PreTrainedModel":
        """As the other strategies; ModelError if DeepSpeed's compiled part cannot be built."""
        check_device(world)
        settings = zero_settings(checkpoint.dtype, options.get("offload", "none"))
        prepare_extensions()
        import deepspeed
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        deepspeed.utils.logger.setLevel("WARNING")
        deepspeed.init_distributed(dist_backend=backend_of(accelerator() or "cpu"))
        switch = HfDeepSpeedConfig(settings)  # `read` splits each layer as it is made, as long as this lives
        try:
            model = checkpoint.read()
            engine, *_ = deepspeed.initialize(model=model, config=settings)
        finally:
            del switch
        # lives as long as the model; in a tuple, because torch would take it for a child
        model._zero3_engine = (engine,)
        return model

    def held(self, weights: WeightSizes, spread: Spread, room: Room) -> Held:
        held, offload = weights.gathered_by_layer(spread.layout), _place(spread)
        if offload == "none":
            return held
        return Held(0, held.gathered, {"cpu" if offload == "cpu" else "disk": held.placed})

    def reads_every_batch(self, options: Options) -> bool:
        return bool(options.get("offload", "none") != "none")

    def offers(self, world_size: int, *, gpu: bool, splits: bool) -> Iterator[Spread]:
        layout = self.layout(self.name, world_size)
        yield Spread(layout)
        if gpu:
            yield Spread(layout, {"offload": "cpu"})

    def title(self, spread: Spread) -> str:
        return self.name + (f" --offload {_place(spread)}" if _place(spread) != "none" else "")


def _place(spread: Spread) -> str:
    """Where the rank's share is kept: `none` (on its device), `cpu` or `nvme`."""
    return str(spread.options.get("offload", "none")).partition(":")[0]


def zero_settings(dtype: "torch.dtype", offload: str) -> dict[str, Any]:
    """DeepSpeed's configuration for a forward without gradients; ConfigError if `--offload` names no directory."""
    import torch

    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": _PREFETCH_ELEMENTS,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 1,
    }
    if offload != "none":
        device, _, path = offload.partition(":")
        zero["offload_param"] = {"device": device, "pin_memory": accelerator() is not None}
        if path:
            if not Path(path).is_dir():
                raise ConfigError(f"--offload: expected none, cpu or nvme:PATH with a directory, got {offload!r}")
            zero["offload_param"]["nvme_path"] = path
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


def prepare_extensions() -> None:
    """Build what DeepSpeed compiles on a CPU (its shared-memory collectives), once, into this environment.

    The first build takes minutes, so the set-up scripts call this. One process builds at a time.

    ModelError if the build fails, or one that was killed left its lock file, on which torch would wait for ever.
    """
    directory = extensions_dir()
    if accelerator() is not None:
        return
    with (directory / "aura_dist.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        stale = next(directory.glob("*/lock"), None)
        if stale is not None:
            raise ModelError(f"a build of DeepSpeed was cut off: delete {str(stale)!r} and run the same command again")
        try:
            from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

            ShareMemCommBuilder().load(verbose=False)
        except Exception as error:  # the compiler's own
            raise ModelError(
                f"DeepSpeed's collectives for the CPU cannot be built in {str(directory)!r}: {brief(error)}; it needs "
                "g++ and ninja; other strategies than zero3 need no compiler"
            ) from error


if __name__ == "__main__":
    prepare_extensions()
