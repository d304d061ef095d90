"""The directory of an exported checkpoint: new weight files, their index, and what is carried over from the old one.

It is made under another name beside its place and renamed when it is whole, so that a killed run leaves no half
checkpoint.
"""

import glob
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from aura_dist.errors import ModelError, StoreError, brief
from aura_dist.interventions.export.fold import FoldPlan
from aura_dist.interventions.export.rewrite import Target, layout, write
from aura_dist.interventions.folded import PROVENANCE_FILE
from aura_dist.models.load import ModelSource, load_config
from aura_dist.models.weights import Stored, open_weights
from aura_dist.ranks.progress import Progress
from aura_dist.ranks.signals import StopFlag

logger = logging.getLogger(__name__)

# what is carried over; weights in other formats stay behind, because they would hold the old values
CARRIED = (
    "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.vocab", "*.spm", "*.bpe", "LICENSE*", "NOTICE*",
    "additional_chat_templates/*",
)  # fmt: skip
# describe weights in a format that is not written: of Meta and Mistral, adapters, ONNX, OpenVINO, MLC
OTHER_FORMATS = (
    "params.json", "adapter_*", "ort_config.json", "genai_config.json", "openvino_*", "mlc-chat-config.json",
    "ndarray-cache*.json", "tensor-cache*.json",
)  # fmt: skip
LEFT_BEHIND = ("*.index.json", PROVENANCE_FILE, *OTHER_FORMATS)
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_INDEX = "pytorch_model.bin.index.json"


def warn_of_left_overs(out: Path) -> None:
    """Name the directories that killed exports to `out` have left."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.export-*"):
        logger.warning("%s was left by an export that was killed, unless one runs now: remove it", left)


def write_checkpoint(
    out: Path,
    source: ModelSource,
    config: PretrainedConfig,
    plan: FoldPlan,
    stored: Mapping[Path, Sequence[Stored]],
    provenance: Mapping[str, Any],
    *,
    as_float32: bool,
) -> None:
    """Make the directory `out` from the checkpoint `source`, whose weight files hold the tensors `stored`.

    `as_float32` widens 16-bit tensors; `provenance` goes into `aura_dist.json` and the weight files' headers.

    Raises
    ------
    StoreError
        The disk has no room, or cannot be written.
    ModelError
        The old files cannot be read, or a folded float16 value overflows.
    RunInterruptedError
        A signal came; nothing is left.
    """
    targets = {file: layout(tensors, plan, as_float32=as_float32) for file, tensors in stored.items()}
    needed = sum(t.stored.stop - t.stored.start for file in targets.values() for t in file)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if needed > free:
            raise StoreError(f"--out {str(out)!r}: expected {needed:,} bytes of free disk, found {free:,}")
        with (
            StopFlag("nothing is left of it: run the same command again") as stop,
            ExitStack() as ending,
            tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.export-") as scratch,
        ):
            made = Path(scratch) / out.name
            made.mkdir()
            _carry_files(source.name, source.revision, made, written={file.name for file in targets})
            _write_config(made, source, config, plan.switches, as_float32=as_float32)
            written = _write_weights(made, plan, targets, provenance)
            _write_index(made, written, next(iter(targets)).parent)
            (made / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
            ending.enter_context(stop.deferred())  # a signal from here on finds the directory in place
            made.rename(out)
    except OSError as error:
        raise StoreError(f"--out {str(out)!r} cannot be written: {error}") from error


def _carry_files(model: str, revision: str | None, target: Path, *, written: Set[str]) -> None:
    """Copy the files beside the weights, and name those that stay behind; ModelError if the hub cannot be reached.

    `written` are the weight files that are written again.
    """
    directory = _directory(model, revision)
    left = {path for pattern in LEFT_BEHIND for path in directory.glob(pattern)}
    carried = {p for pattern in CARRIED for p in directory.glob(pattern) if p.is_file()} - left
    for path in sorted(carried):
        place = target / path.relative_to(directory)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    known = {*written, PROVENANCE_FILE, INDEX_FILE if "safetensors" in "".join(written) else PICKLED_INDEX}
    known |= {path.relative_to(directory).parts[0] for path in carried}
    others = [p.name + "/" * p.is_dir() for p in sorted(directory.iterdir()) if p.name not in known | {".git"}]
    if others:
        logger.info("left out, because it is no part of the new weights: %s", ", ".join(others))


def _directory(model: str, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(CARRIED)))
    except Exception as error:  # the hub's client raises a dozen errors of its own
        raise ModelError(
            f"--model {model!r}: the files beside the weights cannot be downloaded: {brief(error)}"
        ) from error


def _write_config(
    directory: Path, source: ModelSource, config: PretrainedConfig, switches: Mapping[str, Any], *, as_float32: bool
) -> None:
    """Change settings of the text part, and the dtype, in the carried `config.json`; ModelError if that fails."""
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
    read = load_config(replace(source, name=str(directory), revision=None)).get_text_config(decoder=True)
    wrong = [name for name, value in switches.items() if getattr(read, name, None) != value]
    if wrong:
        raise ModelError(f"config.json: expected {wrong[0]} = {switches[wrong[0]]} to be read back, but it is not")


def _set_float32(section: dict[str, Any]) -> None:
    for key, value in section.items():
        if key in ("dtype", "torch_dtype") and value in ("float16", "bfloat16"):
            section[key] = "float32"
        elif isinstance(value, dict):
            _set_float32(value)


def _write_index(directory: Path, written: Mapping[str, Sequence[Target]], source: Path) -> None:
    """The index of several weight files; other metadata of the old index is kept."""
    if list(written) == [SINGLE_FILE]:
        return
    metadata: dict[str, Any] = {}
    for name in (INDEX_FILE, PICKLED_INDEX):
        if (source / name).is_file():
            metadata = dict(json.loads((source / name).read_text(encoding="utf-8")).get("metadata") or {})
            break
    tensors = {t.stored.name: (file, t.stored) for file, targets in written.items() for t in targets}
    metadata["total_size"] = sum(s.stop - s.start for _, s in tensors.values())
    index = {"metadata": metadata, "weight_map": {name: tensors[name][0] for name in sorted(tensors)}}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    made: Path, plan: FoldPlan, targets: Mapping[Path, list[Target]], provenance: Mapping[str, Any]
) -> dict[str, list[Target]]:
    """Write every weight file; name of the new file → its tensors."""
    written: dict[str, list[Target]] = {}
    folded: set[str] = set()
    num_bytes = sum(t.stored.stop - t.stored.start for tensors in targets.values() for t in tensors)
    progress = Progress("export", len(targets), num_bytes, unit="files", cost_unit="bytes")
    for file, tensors in targets.items():
        name = file.name if file.suffix == ".safetensors" else file.stem.replace("pytorch_", "") + ".safetensors"
        with open_weights(file) as weights:
            metadata = {**weights.metadata, "format": "pt", "aura_dist": json.dumps(provenance)}
            write(weights, made / name, tensors, metadata)
        written[name] = tensors
        folded |= {t.stored.name for t in tensors if t.folds}
        progress.advance(1, sum(t.stored.stop - t.stored.start for t in tensors))
    progress.finish()
    assert folded == set(plan.folds), "every planned tensor is in one of the files"
    return written
