"""DeepSpeed ZeRO 3: weights split over all ranks, and on request kept in host memory or on NVMe between uses."""

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from aura_dist.errors import ConfigError, ModelError, brief
from aura_dist.ranks.process import extensions_dir

# of the parameters' elements: how far ahead a layer is fetched; small, so that two layers at most are whole
_PREFETCH_ELEMENTS = 5_000_000


def zero_settings(dtype: torch.dtype, offload: str) -> dict[str, Any]:
    """DeepSpeed's configuration for a forward without gradients.

    Parameters
    ----------
    dtype
        Dtype of the weights.
    offload
        `none`, `cpu`, or `nvme:PATH`.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": _PREFETCH_ELEMENTS,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 1,
    }
    if offload != "none":
        device, _, path = offload.partition(":")
        zero["offload_param"] = {"device": device, "pin_memory": torch.cuda.is_available()}
        if path:
            zero["offload_param"]["nvme_path"] = path
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


def check_offload(offload: str) -> None:
    """ConfigError unless `offload` is `none`, `cpu` or `nvme:PATH` with a directory."""
    device, colon, path = offload.partition(":")
    if offload in ("none", "cpu"):
        return
    if device != "nvme" or not colon or not Path(path).is_dir():
        raise ConfigError(f"--offload: expected none, cpu or nvme:PATH with a directory, got {offload!r}")


def load_zero3(load: Callable[[], PreTrainedModel], dtype: torch.dtype, offload: str) -> PreTrainedModel:
    """Load a model with its weights split over all ranks of the process group.

    Parameters
    ----------
    load
        Calls `from_pretrained`; each layer is split as it is made.
    dtype, offload
        See `zero_settings`.

    Raises
    ------
    ModelError
        DeepSpeed is not there, or its compiled part cannot be built.
    """
    prepare_extensions()
    settings = zero_settings(dtype, offload)
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(dist_backend="gloo" if not torch.cuda.is_available() else "nccl")
    switch = HfDeepSpeedConfig(settings)  # from_pretrained splits the weights as long as this lives
    try:
        model = load()
        engine, *_ = deepspeed.initialize(model=model, config=settings)
    finally:
        del switch
    model._zero3_engine = (engine,)  # must live as long; in a tuple, as a module of the model would be its own child
    return model


def prepare_extensions() -> None:
    """Build what DeepSpeed compiles on a CPU (its shared-memory collectives), once, into this environment.

    It takes minutes the first time, so the set-up scripts call this. One process builds at a time. A build that was
    killed leaves a lock file on which torch would wait for ever.

    Raises
    ------
    ModelError
        There is such a lock, or the build fails.
    """
    directory = extensions_dir()
    if torch.cuda.is_available():
        return
    with (directory / "aura_dist.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        stale = next(directory.glob("*/lock"), None)
        if stale is not None:
            raise ModelError(
                f"a build of DeepSpeed's was cut off: delete {str(stale)!r} and run the same command again"
            )
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
