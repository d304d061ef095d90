"""fit: scores → an intervention directory. Never imports torch."""

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import zarr

from aura_dist import __version__
from aura_dist.config.verbs import FitConfig
from aura_dist.errors import ConfigError, InputError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.methods import METHODS, Scores, fit_maps, needed_statistics
from aura_dist.scoring.concept_scores import read_scores
from aura_dist.sites.site import Site, matching
from aura_dist.store.access import local_path, open_group, store_around
from aura_dist.store.schema import StoreSpec

logger = logging.getLogger(__name__)


def run(config: FitConfig) -> None:
    """Write the intervention of `config.method`, or with `config.onto` that and the earlier one as one."""
    fit(config)


def fit(config: FitConfig) -> Intervention:
    """The same intervention, written only if `config.out` names a place."""
    group = open_group(config.store)
    if config.out:
        _check_out(config)
    spec = StoreSpec.from_attributes(group.attrs)
    sites = _chosen_sites(config, spec.sites)
    statistics = _read(config, group, spec, sites)
    scales, shifts = fit_maps(config.method, statistics, top_k=config.top_k, max_q=config.max_q, alpha=config.alpha)
    maps = Intervention(scales, shifts).at_strength(config.strength)
    fitted = replace(maps, meta=_meta(config, spec, statistics))
    earlier = _earlier(config, spec)
    whole = fitted if earlier is None else fitted @ earlier
    if config.out:
        whole.save(config.out)
        total = sum(len(s) for s in scales.values())
        logger.info(
            "wrote %s: %s changes %d of %d neurons%s",
            config.out, config.method, fitted.num_changed, total, f", onto {config.onto}" if earlier else "",
        )  # fmt: skip
    return whole


def _check_out(config: FitConfig) -> None:
    if local_path(config.out) != Path(config.out):
        raise ConfigError(f"--out: expected a local directory, got the URL {config.out!r}; give its path")
    out = Path(config.out).resolve()
    store = store_around(out)
    if store is not None:
        raise ConfigError(f"--out: expected a directory outside any store, got {config.out!r}, within {str(store)!r}")
    if config.onto is not None and out == Path(config.onto).resolve():
        raise ConfigError(f"--out: expected another directory than --onto, got {config.out!r} for both")


def _chosen_sites(config: FitConfig, sites: tuple[Site, ...]) -> list[str]:
    """Names in model order of the store's sites that `--modules` chooses."""
    chosen: set[str] = set()
    for wanted in config.modules:
        names = matching(sites, wanted)
        if not names:
            raise InputError(
                f"--modules {wanted!r} matches none of the {len(sites)} modules of {config.store!r} "
                f"({sites[0].name}, …); collect them, or name others"
            )
        chosen |= names
    return [s.name for s in sites if s.name in chosen or not config.modules]


def _read(config: FitConfig, group: zarr.Group, spec: StoreSpec, sites: list[str]) -> dict[str, Scores]:
    """Statistic → site → [D] of what the method needs."""
    statistics: dict[str, Scores] = {}
    for name in needed_statistics(config.method, top_k=config.top_k, max_q=config.max_q):
        values = read_scores(group, spec, config.concept, _pooling(config), name)
        statistics[name] = {site: values[site] for site in sites}
    return statistics


def _pooling(config: FitConfig) -> str:
    return config.pooling or METHODS[config.method].pooling


def _meta(config: FitConfig, spec: StoreSpec, statistics: dict[str, Scores]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(spec.to_attributes(), sort_keys=True).encode())
    for scores in statistics.values():
        for values in scores.values():
            digest.update(values.tobytes())
    parameters: dict[str, Any] = {"pooling": _pooling(config), "top_k": config.top_k, "strength": config.strength}
    if config.method == "damp":
        parameters["alpha"] = config.alpha
    if config.max_q is not None:
        parameters["max_q"] = config.max_q
    if config.modules:
        parameters["modules"] = list(config.modules)
    return {
        "method": config.method,
        "parameters": parameters,
        "concept": config.concept,
        "model": dict(spec.model),
        "data": dict(spec.data),
        "store_digest": digest.hexdigest(),
        "aura_dist": __version__,
    }


def _earlier(config: FitConfig, spec: StoreSpec) -> Intervention | None:
    """The intervention of `--onto`, as strong as it was when the store was collected.

    Raises
    ------
    InputError
        The store was collected under another intervention: the fitted map would be applied to other responses
        than it was fitted on.
    """
    under = spec.intervention
    if config.onto is None:
        if under is not None:
            logger.warning(
                "%s was collected under an intervention (%s): what is fitted here belongs on top of it; "
                "give that intervention with --onto", config.store, under.get("method"),
            )  # fmt: skip
        return None
    earlier = Intervention.load(config.onto)
    if under is None:
        logger.warning("%s was collected without an intervention, not under --onto %s", config.store, config.onto)
        return earlier
    if earlier.digest != under["digest"]:
        raise InputError(
            f"--onto {config.onto!r}: expected the intervention that {config.store!r} was collected under "
            f"(digest {under['digest'][:12]}), got another ({earlier.digest[:12]}); collect with --intervention "
            f"{config.onto}"
        )
    return earlier.at_strength(under["strength"])
