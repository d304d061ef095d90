"""Sizes of a model's weights, from its configuration alone: modules on the meta device, no checkpoint."""

from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from aura_dist.models.load import DTYPES, ModelSource
from aura_dist.models.strategies.tensor_plan import Plan
from aura_dist.planning.work import WeightSizes
from aura_dist.sites.find import decoder_layers_name
from aura_dist.sites.tap import generic


def prepare(model: PreTrainedModel, num_layers: int, dtype: str) -> PreTrainedModel:
    """`model` (on the meta device) as `load_base` makes it: cut after `num_layers`, in its dtype, frozen."""
    layers = model.get_submodule(decoder_layers_name(model))
    assert isinstance(layers, nn.ModuleList)
    del layers[num_layers:]
    return model.to(dtype=DTYPES[dtype]).eval().requires_grad_(False)


def split_names(plan: Plan) -> Callable[[str], bool]:
    """Whether tensor parallelism under `plan` splits the weight of a name, found as transformers finds it."""

    def splits(name: str) -> bool:
        module, _, kind = generic(name).rpartition(".")
        style = plan.get(generic(name), plan.get(module, "replicate"))
        by_rows = style.startswith("rowwise") and kind == "bias"  # added once, after the sum over the ranks
        return ("wise" in style or "packed" in style) and not by_rows

    return splits


def weight_sizes(model: PreTrainedModel, plan: Plan) -> WeightSizes:
    """Bytes of a prepared model's base: weights and buffers, by decoder layer, kept whole or split under `plan`."""
    layers_name, splits = decoder_layers_name(model), split_names(plan)
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
