"""Which model this is, wherever its files are: a digest of its shape and of the ends of its weights."""

import hashlib
import json
from pathlib import Path

import torch
from transformers import PretrainedConfig

from aura_dist.errors import ModelError
from aura_dist.models.weights import STORED_DTYPES, Source, Stored, as_bytes, open_weights
from aura_dist.sites.transformers_adapter import find_file

END_BYTES = 64 * 1024
ARCHITECTURE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


def fingerprint(name: str, revision: str | None, config: PretrainedConfig) -> str:
    """sha256 over the config's architecture fields and, sorted by tensor name, (name, dtype, shape, ends).

    `ends` is the sha256 of the first and last 64 KiB of a tensor's bytes. A fine-tuned model differs from its base; a
    copy, or the same weights split into other files, does not. 40B parameters take a second.

    ModelError if there is no weight file, or one is damaged.
    """
    text = config.get_text_config(decoder=True)
    digest = hashlib.sha256(json.dumps([getattr(text, f, None) for f in ARCHITECTURE_FIELDS], default=str).encode())
    tensors: list[tuple[str, str, tuple[int, ...], str]] = []
    for file in checkpoint_files(name, revision, config):
        with open_weights(file) as weights:
            for tensor in weights.tensors:
                # a file in torch's own format counts with torch's names, as it always has
                dtype = tensor.dtype if file.suffix == ".safetensors" else str(STORED_DTYPES[tensor.dtype])
                tensors.append((tensor.name, dtype, tensor.shape, _ends(weights, tensor)))
    digest.update(json.dumps(sorted(tensors)).encode())
    return digest.hexdigest()


def _ends(weights: Source, tensor: Stored) -> str:
    digest, length = hashlib.sha256(), min(END_BYTES, tensor.stop - tensor.start)
    for start in (tensor.start, tensor.stop - length):
        buffer = torch.empty(length, dtype=torch.uint8)
        weights.read(start, buffer)
        digest.update(as_bytes(buffer))
    return digest.hexdigest()


def checkpoint_files(name: str, revision: str | None, config: PretrainedConfig | None = None) -> list[Path]:
    """The weight files of a local directory or hub name: those that `config` names, else safetensors, else `.bin`."""
    named = getattr(config, "transformers_weights", None)
    if named is not None and not str(named).endswith(".safetensors"):
        raise ModelError(
            f"--model {name!r}: expected a .safetensors file as transformers_weights of its config, got {named!r}; "
            "save the model again with save_pretrained"
        )
    singles = _SINGLE_FILES if named is None else (str(named),)
    for single in singles:  # in the order in which transformers looks, because these are the files that it loads
        file = _find(name, revision, single)
        if file is not None:
            return [file]
        index = _find(name, revision, f"{single}.index.json")
        if index is not None:
            shards = _shards(index)
            found = [_find(name, revision, shard) for shard in shards]
            missing = [shard for shard, file in zip(shards, found, strict=True) if file is None]
            if missing:
                raise ModelError(f"--model {name!r}: expected the weight file {missing[0]!r} of its index, found none")
            return [file for file in found if file is not None]
    raise ModelError(f"--model {name!r}: expected weights in {' or '.join(singles)}, found none")


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"weight index {str(index)!r} is damaged: {error}; download the checkpoint again") from error


def _find(name: str, revision: str | None, file: str) -> Path | None:
    try:
        return find_file(name, revision, file)
    except OSError as error:
        raise ModelError(f"--model {name!r}: {error}") from error
