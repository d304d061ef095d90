"""Plans for tensor parallelism: which layers' weights are split over the ranks, and how, by module name.

A plan maps module names (`*` for layer numbers) to transformers' styles, as transformers' own plans do. Ours are for
architectures without one. They keep attention's outputs whole, because then its code needs to know nothing of the
ranks, and any number of heads can be split.
"""

from collections.abc import Mapping
from pathlib import Path

from transformers import Conv1D, PreTrainedModel

from aura_dist.errors import ConfigError, ModelError
from aura_dist.models.strategies.table import STRATEGIES
from aura_dist.sites.find import own_names
from aura_dist.sites.kinds import except_for
from aura_dist.sites.ownership import Interval
from aura_dist.sites.tap import OUTPUT_BLOCKS, Tap, generic
from aura_dist.sites.transformers_adapter import WHOLE_EXPERTS, WHOLE_EXPERTS_WEIGHT

Plan = dict[str, str]

_GATHER, _SPLIT_INPUT = "colwise_gather_output", "rowwise_split_input"


def _others() -> str:
    """The strategies that split no columns, for messages; last the table's first, which spreads no weights."""
    whole, *others = (s.name for s in STRATEGIES.values() if "tensor_plan" not in s.options)
    return f"--sharding {', '.join(others)} or {whole}"


def _plan(layers: str, attention_in: str, attention_out: str, mlp_in: str, mlp_out: str, embedding: str) -> Plan:
    """The plan of a decoder with one projection into and out of its MLP; attention may have several into it."""
    styles = dict.fromkeys(attention_in.split(), _GATHER)
    styles |= {attention_out: _SPLIT_INPUT, mlp_in: "colwise", mlp_out: "rowwise"}
    return {f"{layers}.{name}": style for name, style in styles.items()} | {embedding: "embedding_rowwise"}


_FALCON = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_OPT = ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
# model type → plan, with names as in the base model
PLANS = {
    "falcon": _plan("h.*", *_FALCON, "word_embeddings"),
    "bloom": _plan("h.*", *_FALCON, "word_embeddings"),
    "mpt": _plan("blocks.*", "attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj", "wte"),
    "opt": _plan("decoder.layers.*", *_OPT, "decoder.embed_tokens"),
}


def read_plan(file: str) -> Plan:
    """A user's plan from a YAML file; ConfigError unless it maps names to known styles."""
    import yaml

    try:
        document = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--tensor-plan {file!r} cannot be read: {error}") from error
    known = OUTPUT_BLOCKS.keys() | {"embedding_rowwise", "embedding_colwise"}
    if not isinstance(document, dict) or not document:
        raise ConfigError(f"--tensor-plan {file!r}: expected module names and styles, got {type(document).__name__}")
    for name, style in document.items():
        if style not in known:
            raise ConfigError(
                f"--tensor-plan {file!r}: {name}: expected one of {', '.join(sorted(known))}, got {style!r}"
            )
    return {str(name): str(style) for name, style in document.items()}


def tensor_plan(model: PreTrainedModel, num_ranks: int, file: str | None = None) -> Plan:
    """The whole plan for `num_ranks` ranks of a causal language model or its base (on the meta device), with its names.

    It comes from a user's YAML `file`, which may use the causal language model's names, else from transformers or from
    `PLANS`.

    ModelError if there is no plan for the architecture, more ranks than hidden values, or the plan names a module that
    is missing or cannot be split.
    """
    width = getattr(model.config.get_text_config(decoder=True), "hidden_size", num_ranks)
    if num_ranks > width:
        raise ModelError(
            f"--sharding tensor: expected at most {width} ranks, because {type(model).__name__} has hidden states of "
            f"that width, got {num_ranks}; use {_others()}"
        )
    own = dict(model.tp_plan)
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    modules = {generic(name): module for name, module in model.named_modules()}
    apart = _whole_experts(model, num_ranks)
    if file is not None:
        plan = own | _users_plan(file, model)
    elif any(not style.startswith("embedding") for style in base.tp_plan.values()):
        plan = own | _whole_heads(own, model, num_ranks)
    elif model.config.model_type in PLANS:
        plan = own | {f"{prefix}{name}": style for name, style in PLANS[model.config.model_type].items()}
        if base is not model:  # it often shares its weight with the embeddings, which are split
            plan["lm_head"] = _GATHER
    elif apart:  # nothing else is split, but the embeddings
        embeddings = model.get_input_embeddings()
        plan = {n: "embedding_rowwise" for n, module in model.named_modules() if module is embeddings} | own
    else:
        transposed = any(isinstance(module, Conv1D) for module in modules.values())
        why = "its Conv1D layers' weights are transposed" if transposed else "write one with --tensor-plan"
        raise ModelError(f"{type(model).__name__}: there is no plan for --sharding tensor: {why}; or use {_others()}")
    for name, style in plan.items():
        if style != "replicate" and isinstance(modules.get(name), Conv1D):
            raise ModelError(
                f"--sharding tensor: {name!r} of {type(model).__name__} is a Conv1D, whose transposed weight "
                f"cannot be split; use {_others()}"
            )
    return plan if plan.keys() & apart else plan | apart


def _whole_experts(model: PreTrainedModel, num_ranks: int) -> Plan:
    """Styles that give each rank equally many whole experts; empty where transformers has none, or they do not fit."""
    plan = dict(model.ep_plan)
    numbers = [len(p) for name, p in model.named_parameters() if generic(name) in plan]
    known = set(plan.values()) == {WHOLE_EXPERTS, WHOLE_EXPERTS_WEIGHT}
    return plan if known and not any(number % num_ranks for number in numbers) else {}


def _users_plan(file: str, model: PreTrainedModel) -> Plan:
    """A user's plan with names as in `model`; ModelError for a name that it lacks."""
    plan = {own_names(model)(name): style for name, style in read_plan(file).items()}
    known = {generic(name) for name, _ in [*model.named_modules(), *model.named_parameters()]}
    for name in plan:
        if name not in known:
            raise ModelError(f"--tensor-plan {file!r}: {type(model).__name__} has no module {name!r}")
    return plan


def _whole_heads(plan: Mapping[str, str], model: PreTrainedModel, num_ranks: int) -> Plan:
    """Styles that keep attention's outputs whole where the ranks cannot have equally many heads."""
    text = model.config.get_text_config(decoder=True)
    heads = [getattr(text, n, None) for n in ("num_attention_heads", "num_key_value_heads")]
    if all(h is None or (isinstance(h, int) and h % num_ranks == 0) for h in heads):
        return {}
    replaced = {"colwise": _GATHER, "rowwise": _SPLIT_INPUT}
    return {n: replaced[s] for n, s in plan.items() if "attn" in n and s in replaced}


def seen_columns(plan: Mapping[str, str], tap: Tap, num_ranks: int) -> list[tuple[Interval, ...]]:
    """Per rank, the columns of a site that its tap passes; ModelError where a rank sees no whole columns."""
    seen = tap.seen_columns(plan, num_ranks)
    if seen is None:
        raise ModelError(
            f"--sharding tensor: module {tap.site!r} is split as {plan.get(generic(tap.place))!r}, which is not by "
            f"columns; leave it out by --modules … {except_for([tap.site])}, or use {_others()}"
        )
    return seen
