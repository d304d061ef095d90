"""export: a copy of a checkpoint with an intervention folded into its weights, for any loader."""

from dataclasses import replace
from pathlib import Path

from aura_dist import __version__
from aura_dist.config.verbs import ExportConfig
from aura_dist.errors import ConfigError, StoreError
from aura_dist.interventions.export.directory import warn_of_left_overs, write_checkpoint
from aura_dist.interventions.export.fold import plan_folds
from aura_dist.interventions.export.rewrite import product
from aura_dist.interventions.folded import folded_into, record_of
from aura_dist.interventions.hub import public_name, without_paths
from aura_dist.interventions.use import check_made_for, load_intervention
from aura_dist.models.extras import find_extras, with_extras
from aura_dist.models.fingerprints import FOLDED
from aura_dist.models.identity import checkpoint_files, earlier_fingerprint, fingerprint
from aura_dist.models.load import ModelSource, load_config, skeleton
from aura_dist.models.weights import Stored, open_weights
from aura_dist.sites.find import find_sites
from aura_dist.sites.tap import Vector
from aura_dist.store.access import local_path


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
    warn_of_left_overs(out)
    source = ModelSource(config.model, config.revision, "float32", trust_remote_code=config.trust_remote_code)
    model_config = load_config(source)
    model = skeleton(model_config, source)
    intervention = load_intervention(config.intervention, source, model_config, find_sites(model))
    stored = {file: _tensors(file) for file in checkpoint_files(config.model, config.revision, model_config)}
    file_of = {tensor: file for file, tensors in stored.items() for tensor in tensors}

    def multiply(matrix: Stored, vector: Vector, dim: int) -> Vector:
        return product(file_of[matrix], matrix, vector, dim)

    plan = plan_folds(model_config, model, intervention.at_strength(config.strength), file_of, multiply)
    found = with_extras(fingerprint(source, model_config), find_extras(source, model))
    check_made_for(intervention, config.intervention, source, found, lambda: earlier_fingerprint(source, model_config))
    folded = folded_into(model_config, config.model)
    if plan.sites:
        folded.append(record_of(intervention, config.strength))
    provenance = {
        "aura_dist": __version__,
        "model": {"name": public_name(config.model), "revision": config.revision, "fingerprint": found},
        "intervention": without_paths(intervention.meta),
        "intervention_digest": intervention.digest,
        "strength": config.strength,
        "dtype": config.dtype,
        "modules": list(plan.sites),
        "switches": dict(plan.switches),
        FOLDED: folded,
    }
    plan = replace(plan, switches={**plan.switches, FOLDED: folded}) if folded else plan
    as_float32 = config.dtype == "float32"
    write_checkpoint(out, source, model_config, plan, stored, provenance, as_float32=as_float32)
    num_left = len(intervention.sites) - len(plan.sites)
    print(
        f"folded {len(plan.sites)} of {len(intervention.sites)} modules into {config.out} "
        f"({len(plan.folds)} tensors changed, {len(plan.added)} biases added"
        f"{f'; the intervention leaves {num_left} modules as they are' if num_left else ''})"
    )


def _tensors(file: Path) -> list[Stored]:
    with open_weights(file) as weights:
        return list(weights.tensors)
