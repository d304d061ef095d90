"""Load a model under a strategy: one interface over transformers (FSDP2, tensor parallelism), DeepSpeed, accelerate."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.distributed import DistributedConfig
from transformers.utils import logging as hf_logging

from aura_dist.errors import ConfigError, ModelError, brief
from aura_dist.models.strategies.tensor_plan import seen_columns, tensor_plan
from aura_dist.models.strategies.zero3 import check_offload, load_zero3
from aura_dist.ranks.world import World
from aura_dist.sites.find import decoder_layers_name, tap_of
from aura_dist.sites.ownership import ColumnPlan, plan_columns, whole_site
from aura_dist.sites.site import Site

_SIZE = r"\d+(\.\d+)?([KMGT]i?B)"
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


@dataclass(frozen=True)
class ShardingOptions:
    """What the strategies can be told beside their layout.

    Attributes
    ----------
    offload
        `zero3`: where weights lie between uses, `none`, `cpu` or `nvme:PATH`.
    max_memory
        `dispatch`: device → largest memory, as `{"0": "70GiB", "cpu": "200GiB"}`; None takes what is free.
    offload_folder
        `dispatch`: directory for the weights that go to disk.
    tensor_plan
        `tensor`: YAML file of module names and styles.
    """

    offload: str = "none"
    max_memory: Mapping[str, str] | None = None
    offload_folder: str | None = None
    tensor_plan: str | None = None


class _Flags(Protocol):
    """The settings that are read for the strategies; `aura_dist.config.verbs.ModelOptions` has them."""

    @property
    def offload(self) -> str: ...
    @property
    def max_memory(self) -> list[str]: ...
    @property
    def offload_folder(self) -> str | None: ...
    @property
    def tensor_plan(self) -> str | None: ...


def sharding_options(flags: _Flags) -> ShardingOptions:
    """The options as flags give them; ConfigError for one of another form.

    `--offload cpu`, `--max-memory 0=70GiB cpu=200GiB`, `--offload-folder PATH`, `--tensor-plan FILE`.
    """
    check_offload(flags.offload)
    limits = {}
    for limit in flags.max_memory:
        device, _, size = limit.partition("=")
        if not (device.isdecimal() or device in ("cpu", "disk")) or not re.fullmatch(_SIZE, size):
            raise ConfigError(f"--max-memory: expected devices and sizes such as 0=70GiB cpu=200GiB, got {limit!r}")
        limits[device] = size
    return ShardingOptions(flags.offload, limits or None, flags.offload_folder, flags.tensor_plan)


PLAIN = ShardingOptions()


def load_causal(source: ModelSource, world: World, options: ShardingOptions = PLAIN) -> PreTrainedModel:
    """The causal language model with its head, in eval mode, under the world's strategy."""
    return _load(type(skeleton(load_config(source))), source, world, options)


def load_base(
    source: ModelSource, world: World, options: ShardingOptions = PLAIN, *, num_layers: int | None = None
) -> PreTrainedModel:
    """The base model (no head), cut after `num_layers` decoder layers: what is not captured is not loaded.

    It has the class and the module names that the causal language model's base has.
    """
    whole = skeleton(load_config(source))
    base_class = type(whole.base_model)
    if num_layers is None:
        return _load(base_class, source, world, options)
    model = _load(_first_layers(whole, num_layers), source, world, options)
    if base_class in type(model).__bases__:  # FSDP2 puts a class of its own in front
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


def _load(
    loader: type[PreTrainedModel], source: ModelSource, world: World, options: ShardingOptions
) -> PreTrainedModel:
    layout = world.layout
    if layout.strategy == "zero3":
        dtype = DTYPES[source.dtype]
        return _ready(load_zero3(lambda: _from_pretrained(loader, source, {}), dtype, options.offload))
    if layout.strategy == "dispatch":
        return _ready(_from_pretrained(loader, source, _dispatched(options)))
    if layout.replica_size == 1:
        placed = {} if world.device == "cpu" else {"device_map": world.device}
        return _ready(_from_pretrained(loader, source, placed))
    _check_device(world)
    whole = _on_meta(loader, source)
    plan = tensor_plan(whole, layout.tensor, options.tensor_plan) if layout.tensor > 1 else {}
    layers = decoder_layers_name(whole)
    split = DistributedConfig(
        tp_size=layout.tensor,
        tp_plan=plan or None,
        fsdp_size=layout.fsdp,
        fsdp_plan={f"{layers}.*": "free_full_weight"} if layout.fsdp > 1 else None,
    )
    model = _from_pretrained(loader, source, {"distributed_config": split})
    if layout.fsdp > 1:
        for layer in model.get_submodule(layers).children():
            assert isinstance(layer, FSDPModule), "each decoder layer is gathered on its own"
    return _ready(model)


def _on_meta(loader: type[PreTrainedModel], source: ModelSource) -> PreTrainedModel:
    """What `loader` will load, without weights."""
    config = load_config(source)
    with torch.device("meta"):
        return loader(config if isinstance(config, loader.config_class) else config.get_text_config(decoder=True))


def _dispatched(options: ShardingOptions) -> dict[str, Any]:
    """accelerate's placement: the layers over the GPUs in order, then host memory, then disk."""
    given = options.max_memory
    limits = None if given is None else {int(k) if k.isdecimal() else k: v for k, v in given.items()}
    return {"device_map": "auto", "max_memory": limits, "offload_folder": options.offload_folder}


def _check_device(world: World) -> None:
    if world.device == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            f"--device cpu: expected cuda, as --sharding {world.layout.strategy} runs where the GPUs are; "
            "hide them with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )


def _from_pretrained(loader: type[PreTrainedModel], source: ModelSource, placement: dict[str, Any]) -> PreTrainedModel:
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # a cut model leaves weights unused; missing ones are checked below
    hf_logging.disable_progress_bar()
    try:
        model, info = loader.from_pretrained(
            source.name,
            revision=source.revision,
            dtype=DTYPES[source.dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below
            **placement,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
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
    return model


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """Eval mode, no gradients, and float32 products in float32: TF32 would change the fourth digit."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return model.eval().requires_grad_(False)


def column_plans(
    model: PreTrainedModel, sites: Sequence[Site], chunks: Mapping[str, int], world: World
) -> dict[str, ColumnPlan]:
    """What this rank sees and writes of each site.

    Parameters
    ----------
    model
        As `load_base` or `load_causal` gave it.
    sites
        What is captured.
    chunks
        Site → columns of one chunk of the store.
    world
        This process's place.
    """
    num_ranks = world.layout.tensor
    if num_ranks == 1:
        return {site.name: whole_site(site.width) for site in sites}
    plans = {}
    for site in sites:
        seen = seen_columns(model.tp_plan, tap_of(model, site), num_ranks)
        plans[site.name] = plan_columns(site.width, chunks[site.name], seen)[world.column_rank]
    return plans
