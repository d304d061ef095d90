"""export: a copy of a checkpoint with an intervention folded into its weights, for any loader.

The new directory is made under another name beside its place and takes it when it is whole: a run that is killed
leaves no half checkpoint.
"""

import glob
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from aura_dist import __version__
from aura_dist.config.verbs import ExportConfig
from aura_dist.errors import ConfigError, StoreError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.export.carry import carry_files, write_config, write_index
from aura_dist.interventions.export.checkpoint import Stored, open_weights
from aura_dist.interventions.export.fold import FoldPlan, plan_folds
from aura_dist.interventions.export.rewrite import Target, layout, write
from aura_dist.interventions.hub import public_name, without_paths
from aura_dist.interventions.use import load_intervention
from aura_dist.models.identity import checkpoint_files, fingerprint
from aura_dist.models.load import ModelSource, load_config, skeleton
from aura_dist.ranks.progress import Progress
from aura_dist.ranks.signals import StopFlag
from aura_dist.sites.find import find_sites
from aura_dist.store.access import local_path

logger = logging.getLogger(__name__)

PROVENANCE_FILE = "aura_dist.json"


def run(config: ExportConfig) -> None:
    """Write the checkpoint.

    Raises
    ------
    ConfigError
        The target is a URL.
    StoreError
        The target exists, or cannot be written.
    ModelError
        The intervention does not fit the model, or cannot be folded into its checkpoint.
    """
    out = Path(config.out)
    if local_path(config.out) != out:
        raise ConfigError(f"--out: expected a local directory, got the URL {config.out!r}; give its path")
    if out.exists() or out.is_symlink():
        raise StoreError(f"--out: expected a directory that does not exist yet, {config.out!r} does")
    for left in out.parent.glob(f".{glob.escape(out.name)}.export-*"):
        logger.warning("%s was left by an export that was killed, unless one runs now: remove it", left)
    source = ModelSource(config.model, config.revision, "float32")
    model_config = load_config(source)
    found = fingerprint(config.model, config.revision, model_config)
    model = skeleton(model_config)
    intervention = load_intervention(config.intervention, source, find_sites(model), found)
    files = checkpoint_files(config.model, config.revision, model_config)
    stored = {file: _tensors(file) for file in files}
    everything = [t for tensors in stored.values() for t in tensors]
    plan = plan_folds(model_config, model, intervention.at_strength(config.strength), everything)
    targets = {file: layout(stored[file], plan, as_float32=config.dtype == "float32") for file in files}
    provenance = _provenance(config, intervention, found, plan)
    with StopFlag("nothing is left of it: run the same command again") as stop:
        _make(config, out, model_config, plan, targets, provenance, stop)
    num_left = len(intervention.sites) - len(plan.sites)
    print(
        f"folded {len(plan.sites)} of {len(intervention.sites)} modules into {config.out} "
        f"({len(plan.folds)} tensors changed, {len(plan.added)} biases added"
        f"{f'; the intervention leaves {num_left} modules as they are' if num_left else ''})"
    )


def _tensors(file: Path) -> list[Stored]:
    with open_weights(file) as weights:
        return list(weights.tensors)


def _provenance(config: ExportConfig, intervention: Intervention, found: str, plan: FoldPlan) -> dict[str, Any]:
    return {
        "aura_dist": __version__,
        "model": {"name": public_name(config.model), "revision": config.revision, "fingerprint": found},
        "intervention": without_paths(intervention.meta),
        "intervention_digest": intervention.digest,
        "strength": config.strength,
        "dtype": config.dtype,
        "modules": list(plan.sites),
        "switches": dict(plan.switches),
    }


def _make(
    config: ExportConfig,
    out: Path,
    model_config: PretrainedConfig,
    plan: FoldPlan,
    targets: Mapping[Path, list[Target]],
    provenance: Mapping[str, Any],
    stop: StopFlag,
) -> None:
    """Write all files aside, then put them in place at once."""
    needed = sum(t.stored.stop - t.stored.start for file in targets.values() for t in file)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if needed > free:
            raise StoreError(f"--out {config.out!r}: expected {needed:,} bytes of free disk, found {free:,}")
        with (
            ExitStack() as ending,
            tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.export-") as scratch,
        ):
            made = Path(scratch) / out.name
            made.mkdir()
            carry_files(config.model, config.revision, made)
            write_config(made, model_config, plan.switches, as_float32=config.dtype == "float32")
            names = _write_weights(made, plan, targets, provenance)
            write_index(made, names, next(iter(targets)).parent)
            text = json.dumps(provenance, indent=2) + "\n"
            (made / PROVENANCE_FILE).write_text(text, encoding="utf-8")
            ending.enter_context(stop.deferred())  # from here on it is there
            made.rename(out)
    except OSError as error:
        raise StoreError(f"--out {config.out!r} cannot be written: {error}") from error


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
        folded |= {t.stored.name for t in tensors if t.fold is not None}
        progress.advance(1, sum(t.stored.stop - t.stored.start for t in tensors))
    progress.finish()
    assert folded == set(plan.folds), "every planned tensor is in one of the files"
    return written
