"""fit: scores → an intervention directory. Never imports torch."""

import hashlib
import json
import logging

from aura_dist import __version__
from aura_dist.config import FitConfig
from aura_dist.core.affine import fit_scales, with_strength
from aura_dist.errors import ConfigError
from aura_dist.store.access import contains, local_path, open_group
from aura_dist.store.artifact import Intervention
from aura_dist.store.schema import StoreSpec
from aura_dist.store.view import read_scores

logger = logging.getLogger(__name__)


def run(config: FitConfig) -> None:
    """Write the intervention of `config.method`."""
    group = open_group(config.store)
    if local_path(config.out) is None:
        raise ConfigError(f"--out: expected a local directory, got {config.out!r}")
    if contains(config.store, config.out):
        raise ConfigError(f"--out: expected a directory outside the store, got {config.out!r}")
    spec = StoreSpec.from_attributes(group.attrs)
    scores = read_scores(group, spec, config.concept, config.pooling)
    scales = fit_scales(config.method, scores, top_k=config.top_k, alpha=config.alpha)
    scales = {site: with_strength(scale, None, config.strength)[0] for site, scale in scales.items()}
    digest = hashlib.sha256(json.dumps(spec.to_attributes(), sort_keys=True).encode())
    for values in scores.values():
        digest.update(values.tobytes())
    parameters = {"pooling": config.pooling, "top_k": config.top_k, "strength": config.strength}
    if config.method == "damp":
        parameters["alpha"] = config.alpha
    intervention = Intervention(
        scales,
        meta={
            "method": config.method,
            "parameters": parameters,
            "concept": config.concept,
            "model": dict(spec.model),
            "data": dict(spec.data),
            "store_digest": digest.hexdigest(),
            "aura_dist": __version__,
        },
    )
    intervention.save(config.out)
    total = sum(len(s) for s in scales.values())
    logger.info("wrote %s: %s changes %d of %d neurons", config.out, config.method, intervention.num_changed, total)
