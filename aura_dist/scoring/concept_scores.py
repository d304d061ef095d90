"""Scores of one concept over the whole model. Without xarray, which takes longer to import than a fit takes."""

import logging
from typing import Any

import zarr
from numpy.typing import NDArray

from aura_dist.errors import InputError, StoreError
from aura_dist.scoring.scores import read_statistic, score_attributes, scored_statistics
from aura_dist.store.schema import StoreSpec

logger = logging.getLogger(__name__)


def read_scores(
    group: zarr.Group, spec: StoreSpec, concept: str, pooling: str, statistic: str = "auroc"
) -> dict[str, NDArray[Any]]:
    """Site → [D] one statistic of one concept, in model order.

    Raises
    ------
    InputError
        The store has no such concept or pooling.
    StoreError
        The store has not been scored, or not wholly.
    """
    if concept not in spec.concepts:
        raise InputError(f"--concept: expected one of {', '.join(spec.concepts)}, got {concept!r}")
    if pooling not in spec.poolings:
        raise InputError(
            f"--pooling: expected one of {', '.join(spec.poolings)}, got {pooling!r}; "
            f"collect with `--pooling {' '.join([*spec.poolings, pooling])}` for it"
        )
    which = spec.concepts.index(concept)
    scores: dict[str, NDArray[Any]] = {}
    for site in spec.sites:
        if statistic not in scored_statistics(group, site.name, pooling):
            raise StoreError(
                f"--store {group.store_path}: {site.name} has not been scored ({statistic}); "
                "run `aura-dist score` first"
            )
        scores[site.name] = read_statistic(group, site.name, pooling, statistic)[which]
    basis = score_attributes(group)
    if basis["partial"]:
        where = str(group.store_path)
        logger.warning("%s: the scores are of %d of %d rows", where, basis["num_rows"], basis["total_rows"])
    return scores
