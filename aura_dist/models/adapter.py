"""LoRA adapters: found beside weights, refused or merged into them as they are read.

Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models* (2021): W becomes W + s B A, with s = alpha / r, or
alpha / √r (rank-stabilised, Kalajdzievski, 2023). Files are those of the package peft.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel

from aura_dist.errors import AuraError, ModelError, brief
from aura_dist.models.weights import FLOATS, STORED_DTYPES, Source, Stored, open_weights
from aura_dist.sites.transformers_adapter import find_file, loaded_names, tied_to

CONFIG_FILE = "adapter_config.json"
_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# fields of the configuration that say how it was trained, or that the weights show; of the others, one that is set may
# mean another sum than W + s B A
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ephemeral_gpu_offload", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}
_MERGE = "merge the adapter with peft (`merge_and_unload`) and save the whole model"


def check_adapter(name: str, revision: str | None, adapter: str | None, flag: str = "--model") -> None:
    """ModelError if an adapter comes with the model `name` and is not `adapter`, or if `adapter` is no plain LoRA.

    Loaders differ in what they do with such an adapter: some leave it out, some add it, some load its base model.
    """
    try:
        beside = find_file(name, revision, CONFIG_FILE)
        has_model = beside is None or find_file(name, revision, "config.json") is not None
    except AuraError:  # a signal
        raise
    except Exception:  # whoever loads the model says more
        beside, has_model = None, True
    if beside is not None and not has_model:
        base = _read_config(beside).get("base_model_name_or_path")
        raise ModelError(
            f"{flag} {name!r} is an adapter without a model: expected the model that it belongs to, {base!r} by its "
            f"{CONFIG_FILE}, with --adapter {name}; or {_MERGE}"
        )
    if beside is not None and (adapter is None or not _same(adapter, name)):
        raise ModelError(
            f"{flag} {name!r} has an adapter beside its weights ({CONFIG_FILE}): expected one or the other; add "
            f"--adapter {name}, where the verb takes it; or {_MERGE}; or move the adapter away to use the weights alone"
        )
    if adapter is not None:
        _check_config(adapter, _read_config(adapter_files(adapter)[0]))


def _same(adapter: str, model: str) -> bool:
    return adapter == model or (Path(model).is_dir() and Path(adapter).resolve() == Path(model).resolve())


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter: module of the causal language model → A [r, inputs], B [outputs, r], and s."""

    name: str
    parts: Mapping[str, tuple[Tensor, Tensor, float]]

    @classmethod
    def load(cls, name: str) -> "Adapter":
        """Read a directory or hub name; ModelError if there is none, or it is of another kind."""
        config_file, weight_file = adapter_files(name)
        config = _read_config(config_file)
        _check_config(name, config)
        found: dict[str, dict[str, Tensor]] = {}
        with open_weights(weight_file) as weights:
            for stored in weights.tensors:
                key = _KEY.fullmatch(stored.name)
                if key is None or len(stored.shape) != 2 or stored.dtype not in FLOATS:
                    raise ModelError(
                        f"--adapter {name!r}: expected LoRA of linear layers, got {stored.name!r}; {_MERGE}"
                    )
                found.setdefault(key[1], {})[key[2]] = _read(weights, stored)
        parts = {}
        for module, pair in found.items():
            if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                raise ModelError(f"--adapter {name!r}: expected A and B of one rank at {module!r}; save it again")
            parts[module] = (pair["A"].float(), pair["B"].float(), _scaling(name, config, module, pair["A"].shape[0]))
        return cls(name, parts)

    def added(self, model: PreTrainedModel, tensors: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
        """Name of a checkpoint's tensor → a call that computes what is added to it, in float32.

        `model` is the causal language model on the meta device, `tensors` are the names in its checkpoint. ModelError
        if the adapter does not fit them.
        """
        loaded, parameters = loaded_names(model), dict(model.named_parameters())
        stored = {renamed: name for name in tensors for renamed, joined in [loaded(name)] if not joined}
        found: dict[str, Callable[[], Tensor]] = {}
        for module, (a, b, scaling) in self.parts.items():
            weight = f"{module}.weight"
            layer = model.get_submodule(module) if weight in parameters else None
            transposed = isinstance(layer, Conv1D)
            shape = (b.shape[0], a.shape[1])
            if not isinstance(layer, (nn.Linear, Conv1D)) or weight not in stored or tied_to(model, weight):
                raise ModelError(
                    f"--adapter {self.name!r}: expected linear layers that the model's checkpoint holds alone, got "
                    f"{module!r}; {_MERGE}"
                )
            if tuple(layer.weight.shape) != (shape[::-1] if transposed else shape):
                raise ModelError(
                    f"--adapter {self.name!r}: expected {tuple(layer.weight.shape)} at {module!r}, got {shape}; name "
                    "the model that it belongs to"
                )
            found[stored[weight]] = partial(_product, a, b, scaling, transposed=transposed)
        return found


def adapter_files(name: str) -> tuple[Path, Path]:
    """The configuration and the weights of an adapter; ModelError if one is missing."""
    try:
        config = find_file(name, None, CONFIG_FILE)
        weights = next(filter(None, (find_file(name, None, file) for file in _WEIGHT_FILES)), None)
    except AuraError:  # a signal
        raise
    except Exception as error:  # the hub's client raises a dozen errors of its own
        raise ModelError(f"--adapter {name!r}: {brief(error)}") from error
    if config is None or weights is None:
        missing = CONFIG_FILE if config is None else _WEIGHT_FILES[0]
        raise ModelError(f"--adapter {name!r}: expected a directory or a hub name with {missing}, found none")
    return config, weights


def adapter_digest(name: str) -> str:
    """sha256 of an adapter's configuration and weights, wherever they are."""
    digest = hashlib.sha256()
    for path in adapter_files(name):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def merged_weights(
    adapter: Adapter, model: PreTrainedModel, files: Sequence[Source], dtype: torch.dtype
) -> dict[str, "MergedWeight"]:
    """The tensors of a checkpoint's open files, to which the adapter is added when they are read.

    A changed tensor is summed in float32 and rounded once, to `dtype`.
    """
    tensors = {stored.name: (file, stored) for file in files for stored in file.tensors}
    added = adapter.added(model, list(tensors))
    for name in added:
        if tensors[name][1].dtype not in FLOATS:
            raise ModelError(f"--adapter: expected float weights, got {tensors[name][1].dtype} at {name!r}; {_MERGE}")
    return {name: MergedWeight(file, stored, added.get(name), dtype) for name, (file, stored) in tensors.items()}


@dataclass(frozen=True)
class MergedWeight:
    """A tensor that is read when it is indexed, as the slices of safetensors that transformers loads."""

    file: Source
    stored: Stored
    added: Callable[[], Tensor] | None
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        """As a slice of safetensors has it."""
        return list(self.stored.shape)

    def __getitem__(self, index: Any) -> Tensor:
        tensor = _read(self.file, self.stored)
        if self.added is not None:
            tensor = (tensor.float() + self.added()).to(self.dtype)
        return tensor[index]


def _product(a: Tensor, b: Tensor, scaling: float, *, transposed: bool) -> Tensor:
    product = (b @ a) * scaling
    return product.T if transposed else product


def _read(file: Source, stored: Stored) -> Tensor:
    tensor = torch.empty(stored.shape, dtype=STORED_DTYPES[stored.dtype])
    file.read(stored.start, tensor.reshape(-1).view(torch.uint8))
    return tensor


def _read_config(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(path)!r}: expected an adapter's configuration in JSON: {brief(error)}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{str(path)!r}: expected a JSON object, got {type(document).__name__}")
    return document


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    """ModelError unless it describes plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"--adapter {name!r}: expected peft_type LORA, got {kind!r}; {_MERGE}")
    for field, value in config.items():
        plain = value in _PLAIN[field] if field in _PLAIN else field in _HARMLESS or not value
        if not plain:
            raise ModelError(
                f"--adapter {name!r}: expected plain LoRA, got {field} = {brief(str(value), 60)}; {_MERGE}"
            )


def _scaling(name: str, config: Mapping[str, Any], module: str, rank: int) -> float:
    """s of one module, whose matrices have this rank; ModelError if the configuration says another rank, or no numbers.

    8 is peft's own default of both numbers.
    """
    alpha = _number_of(name, config, module, "lora_alpha", "alpha_pattern")
    if (said := _number_of(name, config, module, "r", "rank_pattern")) != rank:
        raise ModelError(
            f"--adapter {name!r}: expected the rank of its {CONFIG_FILE}, {said:g}, at {module!r}, got {rank}; take "
            "both files from one adapter"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number_of(name: str, config: Mapping[str, Any], module: str, field: str, pattern: str) -> float:
    """A field for one module; patterns are those of peft: the end of a module's name, as a regular expression."""
    try:
        special = {p: v for p, v in (config.get(pattern) or {}).items() if re.fullmatch(rf"(.*\.)?({p})", module)}
        value = float(next(iter(special.values()), config.get(field, 8)))
    except (AttributeError, TypeError, ValueError, OverflowError, re.error):  # any JSON may be there
        value = math.nan
    if not math.isfinite(value):
        raise ModelError(
            f"--adapter {name!r}: expected numbers as {field} and {pattern} of its {CONFIG_FILE}, got "
            f"{config.get(field)!r} and {brief(str(config.get(pattern)), 60)}; save it again"
        )
    return value
