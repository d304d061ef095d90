"""Quantised weights: `--quantization NAME[:OPTION]`, and checkpoints that are quantised already. Imports no torch.

A library stores the linear layers' weights in fewer bits as they are read. All else keeps `--dtype`. The layers stay
`nn.Linear` to everyone who looks, so sites, taps and hooks need to know nothing of it.
"""

import json
import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from aura_dist.errors import ConfigError, MissingPackageError, ModelError
from aura_dist.models.strategies.table import STRATEGIES

if TYPE_CHECKING:
    from aura_dist.models.load import ModelSource

logger = logging.getLogger(__name__)

FLAG, EXTRA = "--quantization", "quantization"


@dataclass(frozen=True)
class Option:
    """One way in which a library stores weights."""

    summary: str
    bits: float  # of one weight of a linear layer, its share of the scales included
    arguments: Mapping[str, Any]  # of the library's configuration
    caution: str = ""  # what a user must know; the log says it


@dataclass(frozen=True)
class Library:
    """A library that transformers loads quantised weights with."""

    package: str  # as pip knows it
    methods: tuple[str, ...]  # `quant_method` of its checkpoints
    configuration: Callable[[Mapping[str, Any], str], Any]  # (arguments, dtype's name) → transformers' configuration
    options: Mapping[str, Option]  # the first is the default
    converts: Callable[[type], bool]  # whether it stores the weights of modules of a class in fewer bits
    aliases: Mapping[str, str] = field(default_factory=dict)  # another name of an option → its name


def _linear(kind: type) -> bool:
    """Whether a class is `nn.Linear` or inherits from it, by name, because this module imports no torch."""
    return any(one.__name__ == "Linear" for one in kind.__mro__)


def _no_subclass(kind: type) -> bool:
    """Whether a class is `nn.Linear` itself, or transformers' `Conv1D`: Falcon's `FalconLinear` is neither."""
    return kind.__name__ in ("Linear", "Conv1D")


def _bitsandbytes(arguments: Mapping[str, Any], dtype: str) -> Any:
    compute = {"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in arguments else {}
    return resolve_name("transformers:BitsAndBytesConfig")(**arguments, **compute)


def _quanto(arguments: Mapping[str, Any], dtype: str) -> Any:
    return resolve_name("transformers:QuantoConfig")(**arguments)


def _torchao(arguments: Mapping[str, Any], dtype: str) -> Any:
    how = resolve_name(f"torchao.quantization:{arguments['quant_type']}")()
    return resolve_name("transformers:TorchAoConfig")(how)


_COMPILES = (
    "quanto compiles C++ when it is first used, which takes minutes; if that is cut off, delete the file `lock` below "
    "optimum/quanto/library/extensions, for which it would wait without end"
)
# of each 64 weights bitsandbytes keeps a float32 scale, of each 128 quanto a float32 scale and shift; a scale a row
# counts as nothing
LIBRARIES: dict[str, Library] = {
    "bitsandbytes": Library(
        package="bitsandbytes",
        methods=("bitsandbytes", "bitsandbytes_8bit", "bitsandbytes_4bit"),
        configuration=_bitsandbytes,
        converts=_no_subclass,
        options={
            "8bit": Option(
                "LLM.int8(): 8 bits, and 16 for the columns of a batch that hold outliers", 8, {"load_in_8bit": True},
                caution="a column that is an outlier for one token of a batch counts in 16 bits for all of them, so "
                "numbers depend a little on which texts share a batch; bitsandbytes:8bit-rows does not",
            ),
            "8bit-rows": Option(
                "8 bits, each token alone: no outliers", 8, {"load_in_8bit": True, "llm_int8_threshold": 0.0}
            ),
            "nf4": Option("4 bits, normal float (QLoRA)", 4.5, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
            "fp4": Option("4 bits, float", 4.5, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        },
        aliases={"4bit": "nf4"},
    ),
    "quanto": Library(
        package="optimum-quanto",
        methods=("quanto",),
        configuration=_quanto,
        converts=_linear,
        options={
            "int8": Option("8 bits, a scale a row", 8, {"weights": "int8"}),
            "float8": Option("float8_e4m3, a scale a row", 8, {"weights": "float8"}),
            "int4": Option("4 bits, unpacked by C++ that is compiled once", 4.5, {"weights": "int4"}, _COMPILES),
            "int2": Option("2 bits, unpacked by C++ that is compiled once", 2.5, {"weights": "int2"}, _COMPILES),
        },
    ),
    "torchao": Library(
        package="torchao",
        methods=("torchao",),
        configuration=_torchao,
        converts=_linear,
        options={
            "int8wo": Option("8 bits, a scale a row", 8, {"quant_type": "Int8WeightOnlyConfig"}),
            "int8da": Option(
                "8 bits, activations too, each token alone", 8, {"quant_type": "Int8DynamicActivationInt8WeightConfig"}
            ),
            "float8wo": Option("float8_e4m3, a scale a row", 8, {"quant_type": "Float8WeightOnlyConfig"}),
        },
        aliases={"int8": "int8wo"},
    ),
}  # fmt: skip


# `quant_method` of a checkpoint → the class of transformers that can load its weights in 16 bits
_UNPACKED = {
    "fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config", "compressed-tensors": "CompressedTensorsConfig",
}  # fmt: skip


def spellings() -> dict[str, str]:
    """Every value of `--quantization` → its summary; other names of the same are left out."""
    return {f"{name}:{option}": row.summary for name, lib in LIBRARIES.items() for option, row in lib.options.items()}


def settled(spelled: str) -> str:
    """The one spelling of a value of `--quantization`; ConfigError if there is no such library or option."""
    name, colon, option = spelled.partition(":")
    own = next((key for key, library in LIBRARIES.items() if name in (key, library.package)), None)
    if own is None:
        raise ConfigError(f"{FLAG}: expected one of {', '.join(spellings())}, got {spelled!r}")
    library = LIBRARIES[own]
    option = library.aliases.get(option, option) if colon else next(iter(library.options))
    if option not in library.options:
        known = ", ".join(f"{own}:{each}" for each in library.options)
        raise ConfigError(f"{FLAG}: expected one of {known}, got {spelled!r}")
    return f"{own}:{option}"


def _parts(quantization: str) -> tuple[Library, Option]:
    """The rows of a settled spelling."""
    name, _, option = quantization.partition(":")
    return LIBRARIES[name], LIBRARIES[name].options[option]


def settle(config: Any) -> str | None:
    """`settled` of a verb's settings; ConfigError, too, if their strategy cannot hold such weights."""
    if config.quantization is None:
        return None
    quantization = settled(config.quantization)
    strategy = next((s for s in STRATEGIES.values() if s.takes(config.sharding)), None)
    if strategy is not None:
        _check_strategy(strategy.name, f"{FLAG} {quantization}")
    return quantization


def of_checkpoint(config: Any) -> dict[str, Any] | None:
    """What a model's configuration says of weights that are quantised already; None where they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:  # a vision-language model may say it of its language part
        found = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    found = found if found is None or isinstance(found, dict) else dict(found.to_dict())
    return found or None  # an empty one says nothing


def method_of(config: Any) -> str:
    """The method of a quantised checkpoint, for people; empty where it is not quantised."""
    found = of_checkpoint(config)
    return "" if found is None else str(getattr(found.get("quant_method"), "value", found.get("quant_method")))


def conversion(config: Any, model: str, revision: str | None) -> str:
    """How to store a quantised checkpoint once in 16 bits, as the end of an error: a command where there is one."""
    method = method_of(config)
    if method in _UNPACKED:
        loading, then = f'dtype="bfloat16", quantization_config=t.{_UNPACKED[method]}(dequantize=True)', ""
    elif method in LIBRARIES["bitsandbytes"].methods:
        loading, then = 'dtype="bfloat16"', "m.dequantize(); "
    else:
        return f"save the model once in 16 bits, with the library that quantised it ({method})"
    # or saving takes back what loading did: weights get the names of quantised ones, or it fails
    return resaving(model, revision, loading, f'{then}vars(m).pop("_weight_conversions", None); ')


def resaving(model: str, revision: str | None, loading: str, then: str = "") -> str:
    """The command that saves a model again: arguments of `from_pretrained`, and statements about the model `m`."""
    which = json.dumps(model, ensure_ascii=False)
    which += "" if revision is None else f", revision={json.dumps(revision)}"
    program = (
        f"import transformers as t; m = t.AutoModelForCausalLM.from_pretrained({which}, {loading}); {then}"
        f'm.save_pretrained("CONVERTED"); t.AutoTokenizer.from_pretrained({which}).save_pretrained("CONVERTED")'
    )
    return f"convert it once: python -c {shlex.quote(program)}"


def check_float(quantization: str | None, config: Any, model: str) -> None:
    """ModelError if a checkpoint that is quantised already is to be quantised."""
    if quantization is not None and (method := method_of(config)):
        raise ModelError(
            f"{FLAG} {quantization}: expected a checkpoint of float weights, got --model {model!r}, whose weights are "
            f"quantised already ({method}); leave {FLAG} out"
        )


def check_can_load(source: "ModelSource", config: Any, strategy: str) -> None:
    """Refuse before weights are read what could not be loaded, and warn of a pitfall.

    MissingPackageError if the library is not installed; ConfigError as of `check_held`.
    """
    check_held(source, config, strategy)
    quantization = source.quantization
    library, what = _library(quantization, config)
    if library is None:
        return
    # it logs for every layer of every forward that it computes in float16
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)
    try:
        version(library.package)
    except PackageNotFoundError as error:
        raise MissingPackageError(what, library.package, EXTRA) from error
    if quantization is not None and (caution := _parts(quantization)[1].caution):
        logger.warning("%s: %s", what, caution)


def converts(quantization: str | None, config: Any) -> Callable[[type], bool]:
    """Whether the weights of modules of a class are stored in fewer bits; nobody says it of other libraries."""
    library, _ = _library(quantization, config)
    return (lambda kind: _linear(kind) or _no_subclass(kind)) if library is None else library.converts


def check_converts(quantization: str | None, model: Any) -> None:
    """ModelError if `--quantization` would change no weight of `model`; a warning if it leaves most of them as floats.

    `model` may be on the meta device. Its head is left out, because no library converts it.
    """
    if quantization is None:
        return
    library, body = _parts(quantization)[0], model.base_model
    outside = {id(table.weight) for table in (model.get_input_embeddings(),) if table is not None}
    sizes = {id(p): p.numel() for p in body.parameters() if id(p) not in outside}
    converted = sum(m.weight.numel() for m in body.modules() if library.converts(type(m)))
    if not converted:
        raise ModelError(
            f"{FLAG} {quantization}: expected linear layers that {library.package} can store in fewer bits, found none "
            f"in {type(model).__name__}; use another library, or leave it out"
        )
    share = 1 - converted / sum(sizes.values())
    if share > 0.5:
        logger.warning(
            "%s %s: %.0f%% of the layers' weights stay floats, because %s converts linear layers alone, and a "
            "mixture's experts are none", FLAG, quantization, 100 * share, library.package,
        )  # fmt: skip


def by_library(quantization: str | None, config: Any) -> bool:
    """Whether one of `LIBRARIES` stores the weights, on load or in the checkpoint."""
    return _library(quantization, config)[0] is not None


def check_held(source: "ModelSource", config: Any, strategy: str) -> None:
    """ConfigError if a strategy cannot hold the weights; those of other libraries are left to transformers."""
    library, what = _library(source.quantization, config)
    if library is not None:
        converted = f", or {conversion(config, source.name, source.revision)}"
        _check_strategy(strategy, what, "" if source.quantization else converted)


def _library(quantization: str | None, config: Any) -> tuple[Library | None, str]:
    """The library that stores the weights, or stored a checkpoint's; and a name of these weights."""
    if quantization is not None:
        return _parts(quantization)[0], f"{FLAG} {quantization}"
    method = method_of(config)
    known = next((lib for lib in LIBRARIES.values() if method in lib.methods), None)
    return known, f"a checkpoint whose weights are quantised ({method})"


def _check_strategy(strategy: str, what: str, more: str = "") -> None:
    if not STRATEGIES[strategy].holds_quantised:
        able = " or ".join(s.name for s in STRATEGIES.values() if s.holds_quantised)
        raise ConfigError(
            f"--sharding {strategy}: expected float weights to spread, got {what}; use --sharding {able}{more}"
        )


def configuration_of(quantization: str, dtype: str) -> Any:
    """transformers' configuration, which leaves the head and what is tied to the embeddings as they are."""
    library, option = _parts(quantization)
    return library.configuration(option.arguments, dtype)


def bits(quantization: str | None, config: Any) -> float | None:
    """Bits of one weight of a quantised linear layer; None where there is none, or nobody says it."""
    if quantization is not None:
        return _parts(quantization)[1].bits
    found = of_checkpoint(config) or {}
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return 4.5 if found.get("load_in_4bit") else 8
    number = found.get("bits") or {"fp8": 8, "mxfp4": 4.25, "fbgemm_fp8": 8, "torchao": 8}.get(method_of(config))
    return float(number) if isinstance(number, int | float) else None
