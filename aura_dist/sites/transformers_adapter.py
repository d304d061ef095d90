"""The one module that uses private or undocumented names of transformers; seen with 5.23."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import nn
from transformers import DynamicLayer, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

# layers of a cache whose rows can be selected; layers of linear attention keep states, whose rows cannot
SELECTABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def unsplit_classes(model: PreTrainedModel) -> set[str]:
    """Names of the classes of modules that placement never splits: the decoder layers', where a model names them."""
    return set(model._no_split_modules or ())


def tensor_place(model: PreTrainedModel) -> tuple[int, int]:
    """(Rank, number of ranks) of this process among those that tensor parallelism splits `model` over."""
    num_ranks = getattr(model, "_tp_size", None) or 1
    return (model._device_mesh["tp"].get_local_rank() if num_ranks > 1 else 0), num_ranks


def tied_to(model: PreTrainedModel, parameter: str) -> list[str]:
    """Names of the parameters that are tied to `parameter` when weights are loaded."""
    tied = dict(model.all_tied_weights_keys)
    return [b for a, b in [*tied.items(), *((b, a) for a, b in tied.items())] if a == parameter]


def tied_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that are tied to others when weights are loaded."""
    return sorted(dict(model.all_tied_weights_keys))


def loaded_names(model: PreTrainedModel) -> Callable[[str], tuple[str, bool]]:
    """Name of a checkpoint's tensor → its name in `model`, and whether loading joins it with others or cuts it."""
    state, prefix = dict(model.state_dict()), model.base_model_prefix
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def loaded(name: str) -> tuple[str, bool]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        return renamed, pattern is not None

    return loaded


def load_tensors(model: PreTrainedModel, tensors: Mapping[str, Any], dtype: torch.dtype) -> list[str]:
    """Put some of a checkpoint's tensors into `model` as `from_pretrained` does: renamed, joined, cut, in its dtype.

    They come to the CPU. Tensors that have that dtype already stay in their files where these are memory-mapped.
    Returns the names of parameters that could not be made, or have another shape.
    """
    how = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": "cpu"},
        weight_mapping=get_model_conversion_mapping(model),
        ignore_mismatched_sizes=True,
    )
    hf_logging.disable_progress_bar()
    try:
        found, _ = convert_and_load_state_dict_in_model(model, dict(tensors), how)
    finally:
        hf_logging.enable_progress_bar()
    return [*found.conversion_errors, *(str(name) for name, *_ in found.mismatched_keys)]


def initialize_rest(model: PreTrainedModel, part: nn.Module) -> None:
    """Compute what in `part` of `model` is still on the meta device, on the CPU, as `from_pretrained` does.

    That is what no checkpoint holds, such as buffers of positions. Weights that were loaded are not changed.
    """
    for module in part.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        left = {name: tensor for name, tensor in own if tensor.is_meta}
        for name, tensor in left.items():
            made = torch.empty_like(tensor, device="cpu")
            setattr(module, name, nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made)
        if left:
            vars(module)["_is_hf_initialized"] = False
            model._initialize_weights(module)


def is_optional(model: PreTrainedModel, name: str) -> bool:
    """Whether a checkpoint may lack a weight of `model`."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def implementations(config: PretrainedConfig) -> list[str | None]:
    """Which code computes attention and experts, as a configuration sets it; `to_dict` leaves both out."""
    return [config._attn_implementation, config._experts_implementation]


def find_file(name: str, revision: str | None, file: str) -> Path | None:
    """A file of a local directory or hub name; None where it is missing. OSError if the hub refuses."""
    path = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


@contextmanager
def hub_offline() -> Iterator[None]:
    """Context in which files of the hub come from the cache alone, as if HF_HUB_OFFLINE had been set at the start."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
