"""Find a model, check it, and load it as the strategy of the launch spreads it."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from aura_dist.errors import AuraError, ConfigError, ModelError, brief
from aura_dist.models.adapter import check_adapter
from aura_dist.models.checkpoint import Checkpoint, stored_generation
from aura_dist.models.quantization import by_library, check_float, settle
from aura_dist.models.strategies.strategy import Options
from aura_dist.models.strategies.table import STRATEGIES
from aura_dist.models.strategies.tensor_plan import seen_columns
from aura_dist.ranks.device import use_exact_float32
from aura_dist.ranks.world import World
from aura_dist.sites.find import decoder_layers_name, tap_of
from aura_dist.sites.ownership import ColumnPlan, deal_shards, plan_columns
from aura_dist.sites.site import Site
from aura_dist.text.own_code import load_with
from aura_dist.text.tokenizer import TokenizerSettings, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# names of the number of positions in configurations: of most; of GPT-2; of MPT, also with ALiBi; of speech decoders
POSITIONS_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions")


@dataclass(frozen=True)
class ModelSource:
    """Which weights, in what dtype, with which tokenizer: a local directory or hub name, revision, dtype name."""

    name: str
    revision: str | None
    dtype: str
    adapter: str | None = None  # a directory or hub name; it is merged into the weights
    trust_remote_code: bool = False  # whether code that comes with the model may run
    tokenizer: TokenizerSettings = TokenizerSettings()
    quantization: str | None = None  # as `quantization.settled` spells it

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def source_of(config: Any) -> ModelSource:
    """The model that the settings of a verb name."""
    return ModelSource(
        config.model, config.revision, config.dtype, config.adapter, config.trust_remote_code,
        TokenizerSettings.of(config), settle(config),
    )  # fmt: skip


def tokenizer_of(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer, checked; errors as `load_tokenizer` raises them."""
    return load_tokenizer(source.name, source.revision, source.tokenizer, trust_remote_code=source.trust_remote_code)


def load_config(source: ModelSource) -> PretrainedConfig:
    """The model's configuration.

    ModelError if it cannot be found or read, an adapter lies beside the weights, or they are quantised and are to be
    quantised.
    """
    check_adapter(source.name, source.revision, source.adapter)

    def load(trust: bool) -> Any:
        return AutoConfig.from_pretrained(source.name, revision=source.revision, trust_remote_code=trust)

    try:
        config = load_with(load, f"--model {source.name!r}", trusted=source.trust_remote_code)
    except AuraError:
        raise
    except Exception as error:  # a broken config.json fails in as many ways as it has fields
        raise ModelError(
            f"--model {source.name!r}: expected a local directory or a hub name with a config.json: {brief(error)}"
        ) from error
    assert isinstance(config, PretrainedConfig)
    check_float(source.quantization, config, source.name)
    return config


def check_positions(config: PretrainedConfig, num_tokens: int, flag: str) -> None:
    """ConfigError naming `flag` if a text of `num_tokens` tokens is longer than the model's positions."""
    text = config.get_text_config(decoder=True)
    positions = next((n for n in (getattr(text, f, None) for f in POSITIONS_FIELDS) if n is not None), None)
    if positions is not None and num_tokens > positions:
        raise ConfigError(
            f"{flag}: expected at most {positions}, the model's positions, got texts of {num_tokens} tokens"
        )


def check_vocabulary(config: PretrainedConfig, largest_id: int) -> None:
    """ModelError if a tokenizer's largest id has no embedding in the model."""
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if size is not None and largest_id >= size:
        raise ModelError(
            f"--model: expected token ids below {size}, the model's vocabulary, got {largest_id} from its tokenizer; "
            "use the tokenizer that belongs to the model"
        )


def skeleton(config: PretrainedConfig, source: ModelSource | None = None) -> PreTrainedModel:
    """The causal language model of `config` on the meta device: all modules, no weights.

    Its class may come with the model at `source`, where that is trusted. Of a vision-language model it is all but the
    models within it that read images.
    """
    # the classes of most vision-language models are no `AutoModelForCausalLM`, and have its forward and its head
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM

    def make(trust: bool) -> Any:
        # classes of transformers itself do not take the revision of code
        comes_with_code = trust and kind.__name__ in (getattr(config, "auto_map", None) or {})
        of = source.revision if source is not None and comes_with_code else None
        revision = {} if of is None else {"code_revision": of}
        return kind.from_config(copy.deepcopy(config), trust_remote_code=trust, **revision)

    with torch.device("meta"):
        try:
            what = f"--model {source.name if source else config.name_or_path!r}"
            model = load_with(make, what, trusted=source is not None and source.trust_remote_code)
        except AuraError:  # a signal
            raise
        except Exception as error:  # a configuration fails in as many ways as it has fields and back ends
            is_causal = sees or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
            what = "cannot be made from its config.json" if is_causal else "is not a causal language model"
            why = brief(error).partition(" Model type should be")[0]  # a list of all configurations follows
            raise ModelError(f"model type {config.model_type!r} {what}: {why}") from error
    assert isinstance(model, PreTrainedModel)
    if sees and not _reads_text_alone(model):
        raise ModelError(
            f"model type {config.model_type!r} is not a causal language model: expected a decoder that reads text "
            f"alone, got {type(model).__name__}; use a checkpoint of its language model"
        )
    if _sees_later_tokens(model):
        raise ModelError(
            f"model type {config.model_type!r} is not a causal language model: expected a decoder, got an encoder, "
            "whose tokens see the later ones (`is_decoder` is false in its config.json); use a decoder"
        )
    leave_out_towers(model)
    return model


def _reads_text_alone(model: PreTrainedModel) -> bool:
    """Whether a vision-language model has a decoder of its own, and its forward asks for no image."""
    asked = [p for p in inspect.signature(model.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    whole = model.get_decoder() in (model, model.base_model)
    return not whole and not model.config.is_encoder_decoder and all(p.default is not p.empty for p in asked)


def _sees_later_tokens(model: PreTrainedModel) -> bool:
    """Whether the model is one of BERT's family that is no decoder, though transformers lets it have a causal head."""
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    return getattr(model.config, "is_decoder", None) is False and not causal


def load_causal(source: ModelSource, world: World, options: Options | None = None) -> PreTrainedModel:
    """The causal language model with its head, in eval mode, as the world's strategy spreads it under `options`."""
    config = load_config(source)
    whole = skeleton(config, source)
    return _load(Checkpoint(type(whole), source, config, whole), world, options)


def load_base(
    source: ModelSource, world: World, options: Options | None = None, *, num_layers: int | None = None
) -> PreTrainedModel:
    """The base model (no head); later decoder layers than the first `num_layers` are not even loaded.

    It has the class and the module names of the causal language model's base.
    """
    config = load_config(source)
    whole = skeleton(config, source)
    if by_library(source.quantization, config):
        # with its head, because libraries find by names in the causal language model what they leave as it is
        return _load(Checkpoint(type(whole), source, config, whole), world, options, num_layers).base_model
    return _load(Checkpoint(type(whole.base_model), source, config, whole), world, options, num_layers)


def _load(
    checkpoint: Checkpoint, world: World, options: Options | None, num_layers: int | None = None
) -> PreTrainedModel:
    """The model in eval mode, no gradients; float32 products in float32."""
    cut = _text_part(checkpoint.model_class, checkpoint.whole, num_layers)
    model = STRATEGIES[world.layout.strategy].load(replace(checkpoint, model_class=cut), world, options or {})
    if type(model) is cut:  # FSDP2 puts a class of its own in front
        model.__class__ = checkpoint.model_class
    use_exact_float32()
    return model.eval().requires_grad_(False)


def _text_part(
    model_class: type[PreTrainedModel], whole: PreTrainedModel, num_layers: int | None
) -> type[PreTrainedModel]:
    """A class of the model, or of its base, that has the first `num_layers` decoder layers, and no vision tower.

    The configuration stays whole, because a layer may depend on the number of layers: MiniCPM scales its residuals by
    it, and the last layers of Gemma 3n, counted from the end, take keys from those before.
    """
    if num_layers is None and not model_class.config_class.sub_configs:
        return model_class
    prefix = "" if model_class is type(whole) else f"{whole.base_model_prefix}."
    name = None if num_layers is None else decoder_layers_name(whole).removeprefix(prefix)

    def init(self: PreTrainedModel, config: PretrainedConfig) -> None:
        model_class.__init__(self, config)
        if name is not None:
            layers = self.get_submodule(name)
            assert isinstance(layers, nn.ModuleList)
            del layers[num_layers:]
        leave_out_towers(self)

    return type(model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__})


def leave_out_towers(model: PreTrainedModel) -> None:
    """Take out the models within a model that read images or sound, because no text goes through them."""
    if not model.config.sub_configs:
        return
    decoder = model.get_decoder()
    for module in [module for module in model.modules() if decoder in set(module.children())]:
        for name, part in list(module.named_children()):
            if isinstance(part, PreTrainedModel) and part is not decoder:
                setattr(module, name, None)


def generation_of(source: ModelSource, config: PretrainedConfig) -> GenerationConfig:
    """How the checkpoint generates, as loading finds it."""
    return stored_generation(source) or GenerationConfig.from_model_config(config)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where `model` takes its input; its first weight may be away, on the disk or the host, between its uses."""
    device = model.device
    hook = getattr(model, "_hf_hook", None)  # accelerate's
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


def column_plans(
    model: PreTrainedModel, sites: Sequence[Site], shards: Mapping[str, int], world: World
) -> dict[str, ColumnPlan]:
    """Site → what this rank sees and writes of it; `shards` holds each site's columns of one shard of the store."""
    num_ranks = world.layout.tensor
    dealt = deal_shards([(site.width, shards[site.name]) for site in sites], num_ranks)
    plans = {}
    for site, owners in zip(sites, dealt, strict=True):
        whole = [((0, site.width),)]
        seen = whole if num_ranks == 1 else seen_columns(model.tp_plan, tap_of(model, site), num_ranks)
        plans[site.name] = plan_columns(site.width, shards[site.name], seen, owners)[world.column_rank]
    return plans


def token_plans(model: PreTrainedModel, sites: Sequence[Site], world: World) -> dict[str, list[ColumnPlan]]:
    """Site → what this rank sees and writes of a block of tokens, by the rank that owns all columns of the block."""
    num_ranks, plans = world.layout.tensor, {}
    for site in sites:
        whole = [((0, site.width),)]
        seen = whole if num_ranks == 1 else seen_columns(model.tp_plan, tap_of(model, site), num_ranks)
        of_owners = (plan_columns(site.width, site.width, seen, [owner]) for owner in range(num_ranks))
        plans[site.name] = [plans_of[world.column_rank] for plans_of in of_owners]
    return plans
