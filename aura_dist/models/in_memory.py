"""A model that the caller has loaded: what identifies it, and how it is used without being changed."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from aura_dist.errors import ModelError, brief
from aura_dist.models.extras import own_code, with_extras
from aura_dist.models.identity import digest_of
from aura_dist.models.load import DTYPES, ModelSource, skeleton
from aura_dist.ranks.device import exact_float32
from aura_dist.ranks.torch_adapter import own_hooks
from aura_dist.ranks.world import World
from aura_dist.sites.find import SiteTable, decoder_layers_name, find_sites
from aura_dist.sites.transformers_adapter import has_adapters

logger = logging.getLogger(__name__)

HASHING_THREADS = 8
# fields that fingerprints of earlier versions leave out
_EARLIER_NOT_HASHED = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}


@dataclass(frozen=True)
class InMemory:
    """A causal language model, or the base model of one, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def source(self) -> ModelSource:
        """A name for people, and the dtype; ModelError if we have no name for that."""
        for name, dtype in DTYPES.items():
            if dtype == self.model.dtype:
                name_or_path = self.model.name_or_path or type(self.model).__name__
                return ModelSource(name_or_path, None, name, trust_remote_code=bool(own_code(self.model)))
        raise ModelError(f"model: expected weights in {', '.join(DTYPES)}, got {self.model.dtype}; convert it")

    def sites(self) -> SiteTable:
        """Its sites, under the names that the causal language model has for them."""
        is_base = self.model.base_model is self.model
        return find_sites(skeleton(self.config, self.source) if is_base else self.model)

    def extras(self) -> dict[str, Any]:
        """The record of code that came with the model, as of one on disk; its weights show a quantisation."""
        return {"adapter": None, "own_code": own_code(self.model) or None, "quantization": None}

    def fingerprint(self) -> str:
        """The identity of the model: its configuration, the class of each module, and all values that it holds.

        Of each weight, and of each buffer that is not saved, its name, dtype, shape and the sha256 of all bytes count.
        Threads hash the weights side by side, at 0.5 to 2 GB/s each. No checkpoint on disk has this fingerprint,
        because nothing tells whether weights were changed since they were loaded. ModelError if one is not in memory,
        or if adapters are within the model, because their weights do not tell how much of them is added.
        """
        if has_adapters(self.model):
            raise ModelError("model: expected one without adapters of peft in its layers; merge them, or delete them")
        classes = [(name, type(module).__qualname__) for name, module in self.model.named_modules()]
        saved = self.model.state_dict().keys()
        others = {name: buffer for name, buffer in self.model.named_buffers() if name not in saved}
        described = [*self._weights(), *_describe_all(others)]
        return with_extras(digest_of(self.config, described, "in memory", classes), self.extras())

    def earlier_fingerprint(self) -> str:
        """The fingerprint that earlier versions gave the model, to compare with what they wrote."""
        config = {f: value for f, value in self.config.to_dict().items() if f not in _EARLIER_NOT_HASHED}
        return hashlib.sha256(json.dumps([config, self._weights()], sort_keys=True, default=str).encode()).hexdigest()

    def _weights(self) -> list[tuple[str, str, list[int], str]]:
        return _describe_all({name: w for name, w in self.model.state_dict().items() if isinstance(w, Tensor)})

    @contextmanager
    def base(self, world: World, num_layers: int) -> Iterator[PreTrainedModel]:
        """Its base model in eval mode, without the decoder layers from `num_layers` on; on exit it is as before."""
        base = self.model.base_model
        _warn_of_hooks(base)
        holder, _, name = decoder_layers_name(base).rpartition(".")
        parent = base.get_submodule(holder)
        layers, modes = getattr(parent, name), [(module, module.training) for module in self.model.modules()]
        try:
            setattr(parent, name, layers[:num_layers])
            with exact_float32():  # as for a model that is loaded by name
                yield base.eval()
        finally:
            setattr(parent, name, layers)
            for module, training in modes:
                module.training = training


def _describe_all(values: Mapping[str, Tensor]) -> list[tuple[str, str, list[int], str]]:
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return (
            list(pool.map(_describe, *zip(*sorted(values.items(), key=itemgetter(0)), strict=True))) if values else []
        )


def _describe(name: str, weight: Tensor) -> tuple[str, str, list[int], str]:
    try:
        flat = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return name, str(weight.dtype), list(weight.shape), hashlib.sha256(flat.numpy().data).hexdigest()
    except (RuntimeError, TypeError) as error:  # weights on the meta device, or of other tensor classes
        raise ModelError(f"model: {name!r} cannot be read: {brief(error)}; give the model's name instead") from error


def _warn_of_hooks(base: PreTrainedModel) -> None:
    """Say that hooks of the caller's run too, because the store's identity does not show them."""
    for name, module in base.named_modules():
        if any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in own_hooks(module)):
            logger.warning("module %r has a forward hook: the store does not record what it changes", name)
            return
