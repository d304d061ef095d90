"""Find a model, check it, and load it as the strategy of the launch spreads it."""

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
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
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging as hf_logging

from aura_dist.errors import AuraError, ConfigError, ModelError, brief
from aura_dist.models.adapter import Adapter, check_adapter, merged_weights
from aura_dist.models.identity import checkpoint_files
from aura_dist.models.quantization import (
    by_library,
    check_converts,
    check_float,
    configuration_of,
    of_checkpoint,
    settle,
)
from aura_dist.models.strategies.strategy import Options
from aura_dist.models.strategies.table import STRATEGIES
from aura_dist.models.strategies.tensor_plan import seen_columns
from aura_dist.models.weights import open_weights
from aura_dist.ranks.device import use_exact_float32
from aura_dist.ranks.torch_adapter import is_out_of_memory
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
    whole = skeleton(load_config(source), source)
    return _load(type(whole), whole, source, world, options)


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
        return _load(type(whole), whole, source, world, options, num_layers).base_model
    return _load(type(whole.base_model), whole, source, world, options, num_layers)


def _load(
    model_class: type[PreTrainedModel],
    whole: PreTrainedModel,
    source: ModelSource,
    world: World,
    options: Options | None,
    num_layers: int | None = None,
) -> PreTrainedModel:
    """The model in eval mode, no gradients; float32 products in float32."""
    cut = _text_part(model_class, whole, num_layers)
    model = STRATEGIES[world.layout.strategy].load(Checkpoint(cut, source, whole), world, options or {})
    if type(model) is cut:  # FSDP2 puts a class of its own in front
        model.__class__ = model_class
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


@dataclass(frozen=True)
class Checkpoint:
    """Weights, and the class that a strategy loads them into."""

    model_class: type[PreTrainedModel]
    source: ModelSource
    # the causal language model on the meta device: made before, because ZeRO 3 splits at once what is made under it
    whole: PreTrainedModel

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.source.dtype]

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, on the meta device."""
        with torch.device("meta"):
            return self.model_class(self._config())

    def files(self) -> list[Path]:
        """The weight files."""
        return checkpoint_files(self.source.name, self.source.revision, load_config(self.source))

    def tensors(self, opened: ExitStack) -> dict[str, Any]:
        """Name → tensor, with the adapter merged; each is read when it is indexed, as long as `opened` is.

        ModelError if a file is damaged, or cannot be read tensor by tensor.
        """
        if self.source.adapter is not None:
            return self._merged_tensors(opened)
        found: dict[str, Any] = {}
        for file in self.files():
            try:
                if file.suffix == ".safetensors":
                    tensors = opened.enter_context(safe_open(file, framework="pt", device="cpu"))
                    found |= {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                elif is_zipfile(file):
                    found |= torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                else:
                    raise ModelError(
                        f"weight file {str(file)!r}: expected safetensors, or torch's format since 1.6, to read it "
                        'tensor by tensor; convert it once: python -c "from transformers import AutoModelForCausalLM '
                        f"as M; M.from_pretrained({self.source.name!r}, dtype='auto').save_pretrained('CONVERTED')\""
                    )
            except (OSError, RuntimeError, SafetensorError) as error:
                raise ModelError(f"--model {self.source.name!r} cannot be loaded: {brief(error)}") from error
        return found

    def _config(self) -> PretrainedConfig:
        config, own = load_config(self.source), self.model_class.config_class
        if isinstance(config, own):
            return config
        text = config.get_text_config(decoder=True)
        if (found := of_checkpoint(config)) is not None:
            text.quantization_config = found
        return text

    def read(self, **placement: Any) -> PreTrainedModel:
        """The model with weights; `placement` goes to `from_pretrained`. ModelError if a weight is missing."""
        name, opened = self.source.name, ExitStack()
        verbosity = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()  # a cut model leaves weights unused; missing ones are checked below
        hf_logging.disable_progress_bar()
        try:
            placement = placement | self._quantised() | ({} if self.source.adapter is None else self._merged(opened))
            model, info = self.model_class.from_pretrained(
                None if "state_dict" in placement else name,
                revision=self.source.revision,
                dtype=self.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # named below
                **placement,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):  # the stage says what fits
                raise
            raise ModelError(f"--model {name!r} cannot be loaded: {brief(error)}") from error
        finally:
            opened.close()
            hf_logging.set_verbosity(verbosity)
            hf_logging.enable_progress_bar()
        broken = [*info["missing_keys"], *(str(m[0]) for m in info["mismatched_keys"])]
        if broken:
            raise ModelError(
                f"--model {name!r}: the checkpoint lacks {len(broken)} of the model's weights, "
                f"{sorted(broken)[0]!r} among them; use a whole checkpoint of this architecture"
            )
        assert isinstance(model, PreTrainedModel)
        self.check_left_out(model, info["unexpected_keys"])
        return model

    def check_left_out(self, model: PreTrainedModel, unexpected: Iterable[str]) -> None:
        """ModelError if tensors of the checkpoint that `model` has no place for belong to its layers."""
        unused = _of_loaded_modules(model, sorted(unexpected))
        if unused and getattr(model.config, "quantization_config", None) is None:
            raise ModelError(
                f"--model {self.source.name!r}: loading would leave out {len(unused)} of the checkpoint's tensors, "
                f"{unused[0]!r} among them: expected weights that config.json describes, without the parts of an "
                "adapter, scales of quantised weights, or biases that it does not have; save the model again, or "
                "correct its config.json"
            )

    def _quantised(self) -> dict[str, Any]:
        """What `from_pretrained` takes beside, so that weights are quantised as they are read, or known to be.

        A part of a checkpoint's configuration may not say what the whole says of its weights.
        """
        quantization = self.source.quantization
        if quantization is not None:
            check_converts(quantization, self.whole)
            return {"quantization_config": configuration_of(quantization, self.source.dtype)}
        config = load_config(self.source)
        alike = isinstance(config, self.model_class.config_class)
        return {} if alike or of_checkpoint(config) is None else {"config": self._config()}

    def _merged(self, opened: ExitStack) -> dict[str, Any]:
        """What `from_pretrained` takes in place of a name, so that it loads the weights with the adapter merged."""
        merged = self._merged_tensors(opened)
        state = {name: weight[...] for name, weight in merged.items()} if is_deepspeed_zero3_enabled() else merged
        return {"config": self._config(), "state_dict": state, "generation_config": _generation(self.source)}

    def _merged_tensors(self, opened: ExitStack) -> dict[str, Any]:
        assert self.source.adapter is not None
        assert self.whole is not None
        weights = [opened.enter_context(open_weights(file)) for file in self.files()]
        return dict(merged_weights(Adapter.load(self.source.adapter), self.whole, weights, self.dtype))


def _of_loaded_modules(model: PreTrainedModel, tensors: Sequence[str]) -> list[str]:
    """Which of a checkpoint's `tensors` belong to layers of `model` that have weights of their own.

    Others that are not loaded, such as a head, later layers and tables of positions, change nothing.
    """
    prefix = f"{model.base_model_prefix}."
    leaves = {name for name, m in model.named_modules() if m._parameters and not m._modules}
    return [t for t in tensors if any(t.startswith((f"{leaf}.", f"{prefix}{leaf}.")) for leaf in leaves)]


def generation_of(source: ModelSource, config: PretrainedConfig) -> GenerationConfig:
    """How the checkpoint generates, as loading finds it."""
    return _generation(source) or GenerationConfig.from_model_config(config)


def _generation(source: ModelSource) -> GenerationConfig | None:
    """How the checkpoint generates, where a file says it; the model's configuration has it otherwise."""
    try:
        return GenerationConfig.from_pretrained(source.name, revision=source.revision)
    except OSError:
        return None


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
