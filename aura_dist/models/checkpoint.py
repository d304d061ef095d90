"""A checkpoint's weights, read tensor by tensor, or loaded by transformers into a model, which is then checked."""

import copy
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging as hf_logging

from aura_dist.errors import ModelError, brief
from aura_dist.models.adapter import Adapter, merged_weights
from aura_dist.models.identity import checkpoint_files
from aura_dist.models.quantization import check_converts, configuration_of, of_checkpoint, resaving
from aura_dist.models.weights import open_weights
from aura_dist.ranks.torch_adapter import is_out_of_memory

if TYPE_CHECKING:
    from aura_dist.models.load import ModelSource


@dataclass(frozen=True)
class Checkpoint:
    """Weights, and the class that a strategy loads them into."""

    model_class: type[PreTrainedModel]
    source: "ModelSource"
    config: PretrainedConfig  # of the whole model
    # the causal language model on the meta device: made before, because ZeRO 3 splits at once what is made under it
    whole: PreTrainedModel

    @property
    def dtype(self) -> torch.dtype:
        return self.source.torch_dtype

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, on the meta device."""
        with torch.device("meta"):
            return self.model_class(self._config())

    def files(self) -> list[Path]:
        """The weight files."""
        return checkpoint_files(self.source.name, self.source.revision, self.config)

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
                        "tensor by tensor; " + resaving(self.source.name, self.source.revision, 'dtype="auto"')
                    )
            except (OSError, RuntimeError, SafetensorError) as error:
                raise ModelError(f"--model {self.source.name!r} cannot be loaded: {brief(error)}") from error
        return found

    def _config(self) -> PretrainedConfig:
        config, own = copy.deepcopy(self.config), self.model_class.config_class
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
        alike = isinstance(self.config, self.model_class.config_class)
        return {} if alike or of_checkpoint(self.config) is None else {"config": self._config()}

    def _merged(self, opened: ExitStack) -> dict[str, Any]:
        """What `from_pretrained` takes in place of a name, so that it loads the weights with the adapter merged."""
        merged = self._merged_tensors(opened)
        state = {name: weight[...] for name, weight in merged.items()} if is_deepspeed_zero3_enabled() else merged
        return {"config": self._config(), "state_dict": state, "generation_config": stored_generation(self.source)}

    def _merged_tensors(self, opened: ExitStack) -> dict[str, Any]:
        assert self.source.adapter is not None
        weights = [opened.enter_context(open_weights(file)) for file in self.files()]
        return dict(merged_weights(Adapter.load(self.source.adapter), self.whole, weights, self.dtype))


def _of_loaded_modules(model: PreTrainedModel, tensors: Sequence[str]) -> list[str]:
    """Which of a checkpoint's `tensors` belong to layers of `model` that have weights of their own.

    Others that are not loaded, such as a head, later layers and tables of positions, change nothing.
    """
    prefix = f"{model.base_model_prefix}."
    leaves = {name for name, m in model.named_modules() if m._parameters and not m._modules}
    return [t for t in tensors if any(t.startswith((f"{leaf}.", f"{prefix}{leaf}.")) for leaf in leaves)]


def stored_generation(source: "ModelSource") -> GenerationConfig | None:
    """How the checkpoint generates, where a file says it; the model's configuration has it otherwise."""
    try:
        return GenerationConfig.from_pretrained(source.name, revision=source.revision)
    except OSError:
        return None
