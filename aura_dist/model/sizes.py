"""Sizes of a model's weights, from its configuration alone: modules on the meta device, no checkpoint."""

import fnmatch
from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from aura_dist.core.work import WeightSizes
from aura_dist.model.sharding import DTYPES, ModelSource
from aura_dist.model.sites import decoder_layers_name

# architectures without a plan of transformers' own whose decoder layers' linear layers are all split
SPLIT_WHOLE_LAYERS = frozenset({"falcon", "mpt", "bloom", "opt"})


def prepare(model: PreTrainedModel, num_layers: int, dtype: str) -> PreTrainedModel:
    """`model` (on the meta device) as `load_base` makes it: cut after `num_layers`, in its dtype, frozen."""
    layers = model.get_submodule(decoder_layers_name(model))
    assert isinstance(layers, nn.ModuleList)
    del layers[num_layers:]
    return model.to(dtype=DTYPES[dtype]).eval().requires_grad_(False)


def split_names(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether tensor parallelism splits the weight of a name: by transformers' plan, or by ours where it has none."""
    plan = dict(model._tp_plan or {})
    linear = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, Conv1D)
    }
    patterns = [f"{pattern}*" for pattern, style in plan.items() if "wise" in style or "packed" in style]
    if not plan and model.config.model_type in SPLIT_WHOLE_LAYERS:
        patterns = [f"{decoder_layers_name(model)}.*"]

    def splits(name: str) -> bool:
        planned = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        return planned and (name in linear or bool(plan))

    return splits


def weight_sizes(model: PreTrainedModel) -> WeightSizes:
    """Bytes of a prepared model's base: weights and buffers, by decoder layer, kept whole or split under `tensor`."""
    layers_name, splits = decoder_layers_name(model), split_names(model)
    base = model.base_model
    prefix = f"{model.base_model_prefix}." if base is not model else ""
    layers = [[0, 0] for _ in range(len(model.get_submodule(layers_name)))]
    outside, largest = [0, 0], 0
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        within = (prefix + name).removeprefix(f"{layers_name}.")
        place = layers[int(within.partition(".")[0])] if within != prefix + name else outside
        place[int(splits(prefix + name))] += tensor.nbytes
        largest = max(largest, tensor.nbytes)
    return WeightSizes(tuple((a, b) for a, b in layers), (outside[0], outside[1]), largest)


def splits_layers(model: PreTrainedModel) -> bool:
    """Whether tensor parallelism can split this model's decoder layers."""
    return any(split for _, split in weight_sizes(model).layers)


def is_mapped(model: PreTrainedModel, source: ModelSource) -> bool:
    """Whether a CPU uses the weights as they lie in the files: a local safetensors checkpoint of the same dtype.

    A mixture's experts are put together at load, and so are made anew.
    """
    saved = getattr(model.config.get_text_config(decoder=True), "dtype", None)
    merged = any(p.ndim == 3 for p in model.parameters())
    return saved == DTYPES[source.dtype] and not merged and any(Path(source.name).glob("*.safetensors"))


def tokenizer_bytes(source: ModelSource) -> int:
    """Size of a local model's `tokenizer.json`; 0 where there is none."""
    file = Path(source.name) / "tokenizer.json"
    return file.stat().st_size if file.is_file() else 0
