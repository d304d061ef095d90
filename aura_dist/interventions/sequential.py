"""Fit layer by layer in one pass: each layer on responses under the maps of the layers before it.

All texts are at a layer before any goes on. The layer runs for its responses, its maps are made, and it runs again
under them. So no layer corrects what an earlier one has corrected already, and the weights are read once.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from transformers import PreTrainedModel

from aura_dist.errors import InputError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.fitting import Fit, meta_of, warn_of_unscored
from aura_dist.interventions.hooks import intervene
from aura_dist.interventions.methods import (
    FromStatistics,
    Scales,
    Scores,
    Shifts,
    find_method,
    fit_maps,
    needed_statistics,
    settle_options,
)
from aura_dist.models.layerwise import Layerwise
from aura_dist.sites.site import Site
from aura_dist.store.schema import StoreSpec

logger = logging.getLogger(__name__)

Responses = Mapping[str, NDArray[Any]]  # site → [N, D]


def fit_by_layer(
    model: PreTrainedModel,
    executor: Layerwise,
    spec: StoreSpec,
    fit: Fit,
    respond: Callable[[int, Sequence[Site]], Responses],
    statistics: Callable[[Responses, Sequence[str]], Mapping[str, Scores]],
    advance: Callable[[int], None],
) -> Intervention:
    """The intervention on the sites of `spec`; `top_k` and `max_q` choose among the units of each layer.

    Parameters
    ----------
    respond
        Returns the pooled responses of all texts at sites of a layer that is loaded.
    statistics
        Returns statistic → site → [D], from responses and names of statistics.
    advance
        Runs all texts through a layer that is loaded.

    InputError if a layer has fewer units than `top_k`.
    """
    method, options = find_method(fit.method), settle_options(fit.method, fit.options)
    assert isinstance(method, FromStatistics)
    by_layer = defaultdict[int, list[Site]](list)
    for site in spec.sites:
        by_layer[site.layer].append(site)
    _check_enough(by_layer, options.get("top_k"))
    scales: Scales = {}
    shifts: Shifts = {}
    seen: dict[str, dict[str, Any]] = defaultdict(dict)
    last = max(by_layer)
    for layer in executor.layers(last + 1):
        sites = by_layer.get(layer, [])
        of_layer = Intervention({})
        if sites:
            found = statistics(respond(layer, sites), needed_statistics(method, options))
            try:
                maps = fit_maps(method, found, options)
            except InputError as error:
                raise InputError(f"{error} (--sequential chooses in each layer; this is layer {layer})") from error
            of_layer = Intervention(*maps).at_strength(fit.strength)
            scales |= of_layer.scale
            shifts |= of_layer.shift
            for name, scores in found.items():
                seen[name] |= scores
            logger.info(
                "layer %d, the last is %d: %d of %d units change", layer, last, of_layer.num_changed,
                of_layer.num_neurons,
            )  # fmt: skip
        if layer < last:
            with intervene(model, of_layer):
                advance(layer)
    warn_of_unscored(spec.sites, seen)
    evidence = [values for scores in seen.values() for values in scores.values()]
    return Intervention(scales, shifts, meta_of(spec, fit, options, evidence, sequential=True))


def _check_enough(by_layer: Mapping[int, Sequence[Site]], top_k: int | None) -> None:
    """InputError if a layer has fewer units than are to be chosen in each."""
    layer, units = min(((i, sum(s.width for s in sites)) for i, sites in by_layer.items()), key=lambda found: found[1])
    if top_k is not None and top_k > units:
        raise InputError(
            f"--top-k: expected at most {units}, the units of layer {layer}, because --sequential chooses in each "
            f"layer, got {top_k}"
        )
