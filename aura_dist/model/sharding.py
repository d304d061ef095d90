"""Load a model under a strategy. Here: one process, the whole model on its device (`replicate`)."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as hf_logging

from aura_dist.errors import ConfigError, ModelError, brief
from aura_dist.model.sites import decoder_layers_name
from aura_dist.runtime.world import World

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# what configurations call the number of positions: most; GPT-2's own; MPT, also with ALiBi; speech decoders
POSITIONS_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions")


@dataclass(frozen=True)
class ModelSource:
    """Which weights, and in what dtype: a local directory or hub name, revision, dtype name."""

    name: str
    revision: str | None
    dtype: str


def load_config(source: ModelSource) -> PretrainedConfig:
    """The model's configuration; ModelError if it cannot be found or read."""
    try:
        config = AutoConfig.from_pretrained(source.name, revision=source.revision)
    except Exception as error:  # a broken config.json fails in as many ways as it has fields
        raise ModelError(
            f"--model {source.name!r}: expected a local directory or a hub name with a config.json: {brief(error)}"
        ) from error
    assert isinstance(config, PretrainedConfig)
    return config


def check_positions(config: PretrainedConfig, num_tokens: int, flag: str) -> None:
    """ConfigError if texts of `num_tokens` tokens are longer than what the model has positions for."""
    text = config.get_text_config(decoder=True)
    positions = next((n for n in (getattr(text, f, None) for f in POSITIONS_FIELDS) if n is not None), None)
    if positions is not None and num_tokens > positions:
        raise ConfigError(
            f"{flag}: expected at most {positions}, the model's positions, got texts of {num_tokens} tokens"
        )


def check_vocabulary(config: PretrainedConfig, largest_id: int) -> None:
    """ModelError if a tokenizer gives ids that the model has no embedding for."""
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if size is not None and largest_id >= size:
        raise ModelError(
            f"--model: expected token ids below {size}, the model's vocabulary, got {largest_id} from its tokenizer; "
            "use the tokenizer that belongs to the model"
        )


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of `config` on the meta device: all modules, no weights."""
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        except Exception as error:  # a configuration fails in as many ways as it has fields and back ends
            what = "cannot be made from its config.json" if _is_causal(config) else "is not a causal language model"
            raise ModelError(f"model type {config.model_type!r} {what}: {brief(error)}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def _is_causal(config: PretrainedConfig) -> bool:
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def pick_device(wanted: str) -> str:
    """`cpu` or `cuda`; `auto` takes a GPU if there is one. ModelError if a GPU is asked for and none is there."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ModelError("--device cuda: expected a GPU that torch can use, found none; use --device cpu")
    return "cuda" if available and wanted != "cpu" else "cpu"


def load_causal(source: ModelSource, world: World) -> PreTrainedModel:
    """The causal language model with its head, in eval mode on the world's device."""
    return _load(AutoModelForCausalLM, source, world)


def load_base(source: ModelSource, world: World, *, num_layers: int | None = None) -> PreTrainedModel:
    """The base model (no head), cut after `num_layers` decoder layers: what is not captured is not loaded.

    It has the class and the module names that the causal language model's base has.
    """
    whole = skeleton(load_config(source))
    base_class = type(whole.base_model)
    if num_layers is None:
        return _load(base_class, source, world)
    model = _load(_first_layers(whole, num_layers), source, world)
    model.__class__ = base_class
    return model


def _first_layers(whole: PreTrainedModel, num_layers: int) -> type[PreTrainedModel]:
    """The class of the base model, made without the decoder layers from `num_layers` on.

    The configuration stays whole, as a layer may depend on how many there are: MiniCPM scales its residuals by
    their number, and the last layers of Gemma 3n take keys from those before, counted from the end.
    """
    base_class = type(whole.base_model)
    name = decoder_layers_name(whole).removeprefix(f"{whole.base_model_prefix}.")

    def init(self: PreTrainedModel, config: PretrainedConfig) -> None:
        base_class.__init__(self, config)
        layers = self.get_submodule(name)
        assert isinstance(layers, nn.ModuleList)
        del layers[num_layers:]

    return type(base_class.__name__, (base_class,), {"__init__": init, "__module__": base_class.__module__})


def _load(loader: Any, source: ModelSource, world: World) -> PreTrainedModel:
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # a cut model leaves weights unused; missing ones are checked below
    hf_logging.disable_progress_bar()
    try:
        model, info = loader.from_pretrained(
            source.name,
            revision=source.revision,
            dtype=DTYPES[source.dtype],
            device_map=world.device if world.device != "cpu" else None,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"--model {source.name!r} cannot be loaded: {brief(error)}") from error
    finally:
        hf_logging.set_verbosity(verbosity)
        hf_logging.enable_progress_bar()
    broken = [*info["missing_keys"], *(str(m[0]) for m in info["mismatched_keys"])]
    if broken:
        raise ModelError(
            f"--model {source.name!r}: the checkpoint lacks {len(broken)} of the model's weights, "
            f"{sorted(broken)[0]!r} among them; use a whole checkpoint of this architecture"
        )
    assert isinstance(model, PreTrainedModel)
    _exact_matmul()
    return model.eval().requires_grad_(False)


def _exact_matmul() -> None:
    """Float32 products in float32: TF32 would change the responses in the fourth digit."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
