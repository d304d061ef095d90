"""Which model this is, wherever its files are: a digest of its shape and of the ends of its weights."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from zipfile import is_zipfile

import torch
from transformers import PretrainedConfig

from aura_dist.errors import ModelError
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

    Raises
    ------
    ModelError
        There is no weight file, or one is damaged.
    """
    text = config.get_text_config(decoder=True)
    digest = hashlib.sha256(json.dumps([getattr(text, f, None) for f in ARCHITECTURE_FIELDS], default=str).encode())
    tensors: list[tuple[str, str, list[int], str]] = []
    for file in checkpoint_files(name, revision, config):
        try:
            tensors += _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
        except Exception as error:  # a damaged file fails in as many ways as there are formats
            raise ModelError(f"weight file {str(file)!r} is damaged: {error}; download the checkpoint again") from error
    digest.update(json.dumps(sorted(tensors)).encode())
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


def _safetensors(file: Path) -> Iterator[tuple[str, str, list[int], str]]:
    """(name, dtype, shape, digest of both ends) of each tensor, from the header's offsets."""
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(header_bytes))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            stream.seek(begin)
            head = stream.read(min(END_BYTES, end - begin))
            stream.seek(max(begin, end - END_BYTES))
            tail = stream.read(min(END_BYTES, end - begin))
            yield name, entry["dtype"], entry["shape"], hashlib.sha256(head + tail).hexdigest()


def _pickled(file: Path) -> Iterator[tuple[str, str, list[int], str]]:
    """The same for torch's own format; plain weights alone are unpickled, all but its first version memory-mapped."""
    state = torch.load(file, map_location="cpu", mmap=is_zipfile(file), weights_only=True)
    for name, tensor in state.items():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        ends = bytes(flat[:END_BYTES].numpy()) + bytes(flat[-END_BYTES:].numpy())
        yield name, str(tensor.dtype), list(tensor.shape), hashlib.sha256(ends).hexdigest()
