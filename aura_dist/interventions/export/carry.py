"""What stands beside the weights of a checkpoint: configuration, tokenizer, code, licence, index."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from aura_dist.errors import ModelError, brief
from aura_dist.interventions.export.rewrite import Target

# what is carried over; weights in whatever other format stay behind, as they would hold the old values
CARRIED = (
    "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.vocab", "*.spm", "*.bpe", "LICENSE*", "NOTICE*",
    "additional_chat_templates/*",
)  # fmt: skip
LEFT_BEHIND = ("*.index.json", "aura_dist.json")
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def carry_files(model: str, revision: str | None, target: Path) -> None:
    """Copy what stands beside the weights of a local directory or hub name.

    Raises
    ------
    ModelError
        The model is an adapter over another one, or the hub cannot be reached.
    """
    directory = _directory(model, revision)
    if (directory / "adapter_config.json").is_file():
        raise ModelError(f"--model {model!r} has an adapter: expected plain weights; merge the adapter into them first")
    left = {path for pattern in LEFT_BEHIND for path in directory.glob(pattern)}
    for path in sorted({p for pattern in CARRIED for p in directory.glob(pattern)} - left):
        if path.is_file():
            place = target / path.relative_to(directory)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)


def _directory(model: str, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(CARRIED)))
    except Exception as error:  # the hub's client has a dozen errors of its own
        raise ModelError(f"--model {model!r}: the files beside the weights cannot be had: {brief(error)}") from error


def write_config(directory: Path, config: PretrainedConfig, switches: Mapping[str, bool], *, as_float32: bool) -> None:
    """Change the carried `config.json`, and nothing else in it: settings of the text part, and the dtype.

    Raises
    ------
    ModelError
        The changed file does not give the settings that were meant.
    """
    path = directory / "config.json"
    if not switches and not as_float32:
        return
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    text = config.get_text_config(decoder=True)
    part = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
    (raw if part is None else raw.setdefault(part, {})).update(switches)
    if as_float32:
        _set_float32(raw)
        if not {"dtype", "torch_dtype"} & set(raw):
            raw["dtype"] = "float32"
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    read = AutoConfig.from_pretrained(directory).get_text_config(decoder=True)
    wrong = [name for name, value in switches.items() if getattr(read, name, None) != value]
    if wrong:
        raise ModelError(f"config.json: expected {wrong[0]} = {switches[wrong[0]]} to be read back, it is not")


def _set_float32(section: dict[str, Any]) -> None:
    for key, value in section.items():
        if key in ("dtype", "torch_dtype") and value in ("float16", "bfloat16"):
            section[key] = "float32"
        elif isinstance(value, dict):
            _set_float32(value)


def write_index(directory: Path, written: Mapping[str, Sequence[Target]], source: Path) -> None:
    """The index of weight files, where there are several; what the old one says of them otherwise is kept."""
    if list(written) == [SINGLE_FILE]:
        return
    metadata: dict[str, Any] = {}
    for name in (INDEX_FILE, "pytorch_model.bin.index.json"):
        if (source / name).is_file():
            metadata = dict(json.loads((source / name).read_text(encoding="utf-8")).get("metadata") or {})
            break
    tensors = {t.stored.name: (file, t.stored) for file, targets in written.items() for t in targets}
    metadata["total_size"] = sum(s.stop - s.start for _, s in tensors.values())
    index = {"metadata": metadata, "weight_map": {name: tensors[name][0] for name in sorted(tensors)}}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
