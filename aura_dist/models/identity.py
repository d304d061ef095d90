"""Which model this is, wherever its files are: a digest of all its weights and of what its configuration computes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from aura_dist.errors import ModelError
from aura_dist.models.digests import tensor_digests
from aura_dist.models.fingerprints import FOLDED, marked
from aura_dist.models.weights import STORED_DTYPES, Source, Stored, as_bytes, open_weights
from aura_dist.sites.transformers_adapter import find_file, implementations

if TYPE_CHECKING:
    from aura_dist.models.load import ModelSource

# fields of a configuration that cannot change a number; all others are part of a model's identity
NOT_COUNTED = frozenset(
    {
        # names and versions
        "_name_or_path", "architectures", "transformers_version", FOLDED,
        # --dtype decides, and the weights show their own
        "dtype", "torch_dtype",
        # in which file and at which commit of the hub weights and code are; `extras.own_code` reads the code
        "transformers_weights", "_commit_hash", "auto_map", "custom_pipelines",
        # what else a forward returns, and whether it may keep keys and values
        "output_hidden_states", "use_cache",
        # training: initial values, losses, memory; dropout is off in eval mode, see `_is_dropout`
        "initializer_range", "initializer_factor", "init_std", "gradient_checkpointing", "output_router_logits",
        "router_aux_loss_coef", "router_z_loss_coef",
        # heads of other tasks
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
        "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
        # where texts begin and end: the tokenizer and the key of continuations decide
        "bos_token_id", "eos_token_id", "pad_token_id",
    }
)  # fmt: skip
# models whose positions depend on the id of padding
PAD_MOVES_POSITIONS = frozenset(
    {
        "camembert", "data2vec-text", "prophetnet", "roberta", "roberta-prelayernorm", "trocr", "xglm", "xlm-roberta",
        "xlm-roberta-xl", "xmod",
    }
)  # fmt: skip

END_BYTES = 64 * 1024
# the fields that fingerprints of earlier versions cover
EARLIER_FIELDS = (
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


def fingerprint(source: "ModelSource", config: PretrainedConfig) -> str:
    """The identity of a checkpoint: all bytes of its weights, and what its resolved configuration computes.

    A copy, other file names and another split into files do not change it, nor does saving it again. The dtype of the
    weights counts. The first call reads all weights at the disk's speed; the next ones find the digests in the cache.

    ModelError if there is no weight file, or one is damaged.
    """
    files = checkpoint_files(source.name, source.revision, config)
    tensors = sorted(tensor for file in files for tensor in tensor_digests(file))
    return digest_of(config, tensors)


def digest_of(config: PretrainedConfig, tensors: Sequence[Any], *more: Any) -> str:
    """The fingerprint of a configuration, the descriptions of all weights, and what else counts."""
    return marked(json.dumps([counted_fields(config), tensors, *more], sort_keys=True, default=str))


def counted_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Field → value of a configuration and of its parts, of all fields that can change a number.

    Defaults are filled in, so a field that a config.json leaves out equals one that it writes. A field that is None
    counts as missing, because later versions of transformers add such fields.
    """
    fields: dict[str, Any] = config.to_dict()
    fields |= {
        name: part for name in config.sub_configs if isinstance(part := getattr(config, name, None), PretrainedConfig)
    }
    fields["implementations"] = implementations(config)
    keep_pad = {"pad_token_id"} if config.model_type in PAD_MOVES_POSITIONS else set()
    left_out = NOT_COUNTED - keep_pad
    return {
        name: _plain(value)
        for name, value in fields.items()
        if name not in left_out and not _is_dropout(name) and value is not None
    }


def _is_dropout(field: str) -> bool:
    return "dropout" in field or field.endswith(("pdrop", "layerdrop"))


def _plain(value: Any) -> Any:
    """A value in one spelling: 1.0 as 1, a part of a configuration as its counted fields."""
    if isinstance(value, PretrainedConfig):
        return counted_fields(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def earlier_fingerprint(source: "ModelSource", config: PretrainedConfig) -> str:
    """The fingerprint that versions before `RULE` gave a checkpoint, to compare with what they wrote.

    sha256 over `EARLIER_FIELDS` and, sorted by tensor name, (name, dtype, shape, sha256 of the first and last 64 KiB).
    """
    text = config.get_text_config(decoder=True)
    digest = hashlib.sha256(json.dumps([getattr(text, f, None) for f in EARLIER_FIELDS], default=str).encode())
    tensors: list[tuple[str, str, tuple[int, ...], str]] = []
    for file in checkpoint_files(source.name, source.revision, config):
        with open_weights(file) as weights:
            for tensor in weights.tensors:
                # a file in torch's own format counted with torch's names
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
