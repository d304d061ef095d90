"""The one module that uses private or undocumented names of transformers; seen with 5.23."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import DynamicLayer, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.integrations import moe
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from aura_dist.errors import ModelError
from aura_dist.sites.routed import Routed

STACKED, CONVERTED = "stacked", "converted"  # what loading makes of a tensor that it does not take as it is

# styles of expert parallelism, in which each rank has whole experts: of the module, and of its parameters
WHOLE_EXPERTS, WHOLE_EXPERTS_WEIGHT = "ep_dispatch_experts", "grouped_gemm"

# layers of a cache whose rows can be selected; layers of linear attention keep states, whose rows cannot
SELECTABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def unsplit_classes(model: PreTrainedModel) -> set[str]:
    """Names of the classes of modules that placement never splits: the decoder layers', where a model names them."""
    return set(model._no_split_modules or ())


def tensor_place(model: PreTrainedModel) -> tuple[int, int]:
    """(Rank, number of ranks) of this process among those that tensor parallelism splits `model` over."""
    num_ranks = getattr(model, "_tp_size", None) or 1
    return (model._device_mesh["tp"].get_local_rank() if num_ranks > 1 else 0), num_ranks


def tensor_group(model: PreTrainedModel) -> Any:
    """The process group of the ranks that tensor parallelism splits `model` over; None where there is one rank."""
    return model._device_mesh["tp"].get_group() if (getattr(model, "_tp_size", None) or 1) > 1 else None


def tied_to(model: PreTrainedModel, parameter: str) -> list[str]:
    """Names of the parameters that are tied to `parameter` when weights are loaded."""
    tied = dict(model.all_tied_weights_keys)
    return [b for a, b in [*tied.items(), *((b, a) for a, b in tied.items())] if a == parameter]


def tied_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that are tied to others when weights are loaded."""
    return sorted(dict(model.all_tied_weights_keys))


def loaded_names(model: PreTrainedModel) -> Callable[[str], tuple[str, str]]:
    """Name of a checkpoint's tensor → its name in `model`, and what loading makes of it.

    That is empty where it is taken as it is, `STACKED` where it is one of a list that becomes the first dim of a
    parameter, and `CONVERTED` where it is joined with others in another way, cut or transposed.
    """
    state, prefix = dict(model.state_dict()), model.base_model_prefix
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    stacks = {
        pattern
        for c in converters
        for pattern in c.source_patterns
        if len(c.source_patterns) == 1 and all(isinstance(o, MergeModulelist) and o.dim == 0 for o in c.operations)
    }

    def loaded(name: str) -> tuple[str, str]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        return renamed, "" if pattern is None else STACKED if pattern in stacks else CONVERTED

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


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether adapters of peft are within the model's layers."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def has_experts_interface(module: nn.Module) -> bool:
    """Whether `module` holds a mixture's experts and computes them by a function that can be replaced."""
    return all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "is_transposed", "down_proj"))


def are_apart(experts: nn.Module) -> bool:
    """Whether this rank holds some of the experts, and others hold the rest."""
    return bool(getattr(experts, "_is_expert_parallel", False))


class ShownExperts:
    """As long as it is not removed, `see` is called with the hidden values of `experts`, a module of that interface.

    What `see` returns replaces the rows, unless it is None. The module computes as its configuration says, equal
    within rounding. Its configuration is another object meanwhile; the model's is not touched. Those that come later
    see what earlier ones made, and are removed first. ModelError if the configuration asks for a fused kernel.
    """

    def __init__(self, experts: Any, see: Callable[[Routed], Tensor | None]) -> None:
        moe.ALL_EXPERTS_FUNCTIONS.register(_SHOWN, _shown_experts)
        self._experts = experts
        self._before: Any = experts.config
        earlier = getattr(self._before, _SHOWN, None)
        chosen = earlier.chosen if earlier else self._before._experts_implementation
        if chosen not in _LINEAR:
            names = ", ".join(str(name) for name in _LINEAR if name)
            raise ModelError(
                f"{type(experts).__name__}: expected an experts implementation that shows hidden values ({names}), got "
                f"{chosen!r}; set `experts_implementation` in the model's configuration"
            )
        config = copy.copy(self._before)
        config._experts_implementation_internal = _SHOWN
        setattr(config, _SHOWN, _Shown(chosen, (*(earlier.callbacks if earlier else ()), see)))
        experts.config = config

    def remove(self) -> None:
        self._experts.config = self._before


@dataclass(frozen=True)
class _Shown:
    chosen: str | None  # what the configuration asks for
    callbacks: tuple[Callable[[Routed], Tensor | None], ...]


_SHOWN = "aura_dist"  # our entry in the table of implementations


def _shown_experts(experts: Any, hidden_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What transformers' implementations compute of T tokens and K experts of each, for rows sorted by expert."""
    shown: _Shown = getattr(experts.config, _SHOWN)
    num_experts, num_choices = experts.num_experts, expert_TK.shape[1]
    expert_S, order_S = torch.sort(expert_TK.reshape(-1), stable=True)
    token_S = order_S // num_choices
    # under expert parallelism, rows of other ranks' experts come last; kernels leave them undefined
    elsewhere_S1 = (expert_S >= num_experts)[:, None] if are_apart(experts) else None
    product = _LINEAR[shown.chosen](experts, expert_S.clamp(max=num_experts - 1), expert_S)

    def linear(name: str, rows: Tensor) -> Tensor:
        out = product(name, rows)
        return out if elsewhere_S1 is None else out.masked_fill(elsewhere_S1, 0)

    rows = linear("gate_up_proj" if experts.has_gate else "up_proj", hidden_TH[token_S])
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    for see in shown.callbacks:
        changed = see(Routed(rows, token_S, expert_S, num_experts, len(hidden_TH)))
        rows = rows if changed is None else changed
    out = linear("down_proj", rows)
    del rows
    if experts.has_post_expert_norm:
        out = experts.post_expert_norm(out)
    out = out * weight_TK.reshape(-1)[order_S, None]
    out = torch.empty_like(out).index_copy(0, order_S, out)
    return out.view(len(hidden_TH), num_choices, out.shape[1]).sum(dim=1).to(hidden_TH.dtype)


# a weight's name and rows, sorted by expert → the rows' products with their experts' weights
_Product = Callable[[str, Tensor], Tensor]


def _bias(experts: Any, name: str, expert_S: Tensor) -> Tensor | None:
    return getattr(experts, f"{name}_bias")[expert_S] if experts.has_bias else None


def _ends(experts: Any, sorted_S: Tensor) -> Tensor:
    """Where each expert's rows end."""
    first_E = torch.arange(experts.num_experts, device=sorted_S.device)
    return torch.searchsorted(sorted_S, first_E, right=True, out_int32=True)


def _grouped(experts: Any, expert_S: Tensor, sorted_S: Tensor) -> _Product:
    ends_E = _ends(experts, sorted_S)

    def product(name: str, rows: Tensor) -> Tensor:
        weight, bias = getattr(experts, name), _bias(experts, name, expert_S)
        out: Tensor = moe._grouped_linear(rows, weight, ends_E, bias, is_transposed=experts.is_transposed)
        return out

    return product


def _one_by_one(experts: Any, expert_S: Tensor, sorted_S: Tensor) -> _Product:
    ends_E = _ends(experts, sorted_S)

    def product(name: str, rows: Tensor) -> Tensor:
        weight, bias = getattr(experts, name), _bias(experts, name, expert_S)
        matrices = weight if experts.is_transposed else weight.transpose(-2, -1)
        out: Tensor = torch.ops.transformers.grouped_mm_fallback(rows.to(weight.dtype), matrices, offs=ends_E)
        return out if bias is None else out + bias

    return product


def _batched(experts: Any, expert_S: Tensor, sorted_S: Tensor) -> _Product:
    def product(name: str, rows: Tensor) -> Tensor:
        weight, bias = getattr(experts, name)[expert_S], _bias(experts, name, expert_S)
        out: Tensor = moe._batched_linear(rows, weight, bias, is_transposed=experts.is_transposed)
        return out

    return product


_LINEAR: dict[str | None, Callable[[Any, Tensor, Tensor], _Product]] = {
    "eager": _one_by_one, "grouped_mm": _grouped, "batched_mm": _batched, None: _one_by_one,
}  # fmt: skip


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
