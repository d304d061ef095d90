"""From a store to an intervention on one concept, by any method. Imports torch for what runs the model alone."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist import __version__
from aura_dist.errors import ConfigError, InputError
from aura_dist.interventions.artifact import Intervention, check_no_gate
from aura_dist.interventions.gates import GateFit
from aura_dist.interventions.methods import (
    FromModel,
    Options,
    Scores,
    find_method,
    fit_maps,
    needed_statistics,
    settle_options,
)
from aura_dist.sites.kinds import KINDS, choose, except_for
from aura_dist.sites.site import Site
from aura_dist.store.access import local_path, store_around
from aura_dist.store.schema import StoreSpec

logger = logging.getLogger(__name__)

# `read(concept, pooling, statistic)`: site → [D] of all sites, in model order
ReadScores = Callable[[str, str, str], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Fit:
    """What to fit, for a concept of the store."""

    method: str  # one of `METHODS`
    concept: str
    modules: Sequence[str] = ()  # kinds and patterns of the store's sites to act on; empty for all
    strength: float = 1.0  # s of `methods.with_strength`
    options: Options = field(default_factory=dict)  # one that is missing or None takes the method's default
    gate: GateFit | None = None
    state: Path | None = None  # file of a training that was interrupted
    sharding: str = "replicate"  # how a trained method spreads the model: one of its `shardings`


def fit_intervention(
    group: zarr.Group, spec: StoreSpec, fit: Fit, read: ReadScores, earlier: Intervention | None = None
) -> Intervention:
    """The fitted intervention alone; `result @ earlier` is the one that acts after an earlier intervention.

    `read` reads the store's scores. A trained method runs the model under `earlier`, the intervention that the store
    was collected under. So does the fit of a gate of tokens without a threshold.

    Raises
    ------
    ConfigError
        An option is given that the method does not read.
    InputError
        The store has no such concept, pooling or modules, or nothing can change these; `top_k` exceeds the units to
        choose from; as of `gate_fitting.with_gates`.
    StoreError
        The store has not been scored, or is not finished where a gate needs it.
    """
    method, options = find_method(fit.method), settle_options(fit.method, fit.options)
    sites = spec.sites if not fit.modules else choose(spec.sites, fit.modules, partial(_unmatched, spec.sites))
    sites = changeable(sites, fit.modules)
    if isinstance(method, FromModel):
        from aura_dist.interventions.training import train_maps

        _check_before_training(group, spec, fit, sites, earlier)
        maps, evidence = train_maps(group, spec, fit.concept, sites, method, options, earlier, fit.state, fit.sharding)
    else:
        statistics: dict[str, Scores] = {}
        for name in needed_statistics(method, options):
            values = read(fit.concept, options["pooling"], name)
            statistics[name] = {site.name: values[site.name] for site in sites}
        maps = fit_maps(method, statistics, options)
        warn_of_unscored(sites, statistics)
        evidence = [values for scores in statistics.values() for values in scores.values()]
    fitted = Intervention(*maps).at_strength(fit.strength)
    if fit.gate is None:
        return replace(fitted, meta=meta_of(spec, fit, options, evidence))
    from aura_dist.interventions.gate_fitting import with_gates

    gated = with_gates(fitted, group, spec, fit.concept, fit.gate, sites, earlier)
    meta = meta_of(spec, fit, options, [*evidence, *gated.evidence])
    return replace(gated.intervention, meta={**meta, "gate": gated.about})


def _check_before_training(
    group: zarr.Group, spec: StoreSpec, fit: Fit, sites: Sequence[Site], earlier: Intervention | None
) -> None:
    """Raise what would be raised after the training, which may take hours: the maps or gates could not be used."""
    if earlier is not None:
        for site in sites:
            check_no_gate(site.name, earlier)
    if fit.gate is not None:
        from aura_dist.interventions.gate_fitting import stores_for_gates

        stores_for_gates(group, spec, fit.concept, fit.gate, sites, earlier)


def meta_of(
    spec: StoreSpec, fit: Fit, options: Mapping[str, Any], evidence: Iterable[NDArray[Any]], **how: Any
) -> dict[str, Any]:
    """What an artifact says of a fit to responses that `spec` describes; `how` joins the method's parameters."""
    return {
        "method": fit.method,
        "parameters": {**_parameters(fit, options), **how},
        "concept": fit.concept,
        "model": dict(spec.model),
        "data": dict(spec.data),
        "store_digest": _digest(spec, evidence),
        "aura_dist": __version__,
    }


def _unmatched(sites: Sequence[Site], word: str) -> InputError:
    return InputError(
        f"--modules {word!r} matches none of the {len(sites)} modules of the store ({sites[0].name}, …); "
        "collect them, or name others"
    )


def changeable(sites: Sequence[Site], modules: Sequence[str]) -> tuple[Site, ...]:
    """The sites that an intervention can change; InputError if `modules` name others, or none is left."""
    fixed = [site for site in sites if site.kind in KINDS and not KINDS[site.kind].acts]
    if fixed and (modules or len(fixed) == len(sites)):
        raise InputError(
            f"--modules: expected modules that an intervention can change, got {fixed[0].name!r} of kind "
            f"{fixed[0].kind}; leave it out: {except_for(site.name for site in fixed)}, or collect others"
        )
    return tuple(site for site in sites if site not in fixed)


def warn_of_unscored(sites: Sequence[Site], statistics: Mapping[str, Scores]) -> None:
    """Say how many modules and units have no finite statistics; `fit_maps` leaves them as they are."""
    scored = {s.name: np.logical_and.reduce([np.isfinite(of[s.name]) for of in statistics.values()]) for s in sites}
    if unscored := sum(int((~units).sum()) for units in scored.values()):
        logger.warning(
            "%d of %d modules and %d of %d units have no finite scores (NaN or infinite responses): they are left "
            "as they are",
            sum(not units.any() for units in scored.values()), len(sites), unscored, sum(s.width for s in sites),
        )  # fmt: skip


def _parameters(fit: Fit, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the artifact says of the fit; `pooling` and `top_k` are written as null too, as they always were."""
    written = {name: options[name] for name in ("pooling", "top_k") if name in options}
    written["strength"] = fit.strength
    written |= {name: value for name, value in options.items() if name not in written and value is not None}
    if fit.gate is not None:
        written |= {"gate": fit.gate.kind, **fit.gate.written}
    return {**written, **({"modules": list(fit.modules)} if fit.modules else {})}


def _digest(spec: StoreSpec, evidence: Iterable[NDArray[Any]]) -> str:
    """sha256 of what fixes a store's numbers, and of the values that the maps were made of."""
    digest = hashlib.sha256(json.dumps(spec.to_attributes(), sort_keys=True).encode())
    for values in evidence:
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def earlier_intervention(store: str, spec: StoreSpec, onto: str | None) -> Intervention | None:
    """The intervention at `onto`, at the strength under which the store was collected; None without `onto`.

    InputError if the store was collected under another intervention: the fitted map would act on other responses than
    it was fitted to. StoreError if there is no intervention at `onto`.
    """
    under = spec.intervention
    if onto is None:
        if under is not None:
            logger.warning(
                "%s was collected under an intervention (%s), and this fit acts on top of it: name it with --onto",
                store, under.get("method"),
            )  # fmt: skip
        return None
    earlier = Intervention.load(onto)
    if under is None:
        logger.warning("%s was collected without an intervention, not under --onto %s", store, onto)
        return earlier
    if earlier.digest != under["digest"]:
        raise InputError(
            f"--onto {onto!r}: expected the intervention that {store!r} was collected under "
            f"(digest {under['digest'][:12]}), got another ({earlier.digest[:12]}); collect with --intervention {onto}"
        )
    return earlier.at_strength(under["strength"])


def finish(fitted: Intervention, method: str, earlier: Intervention | None, onto: str | None, out: str) -> Intervention:
    """`fitted` after the intervention at `onto`, as one, written to the directory `out`, if that is not empty."""
    whole = fitted if earlier is None else fitted @ earlier
    if out:
        whole.save(out)
        logger.info(
            "wrote %s: %s changes %d of %d neurons%s", out, method, fitted.num_changed, fitted.num_neurons,
            f", onto {onto}" if onto else "",
        )  # fmt: skip
    return whole


def check_out(out: str, onto: str | None) -> None:
    """ConfigError unless `out` can be the directory of a new intervention; it may take hours to make one."""
    if local_path(out) != Path(out):
        raise ConfigError(f"--out: expected a local directory, got the URL {out!r}; give its path")
    place = Path(out).resolve()
    there = next(path for path in (place, *place.parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is read-only for you" if there.is_dir() else "is a file"
        raise ConfigError(f"--out: {out!r} cannot be written, because {str(there)!r} {why}; give another directory")
    store = store_around(place)
    if store is not None:
        raise ConfigError(f"--out: expected a directory outside any store, got {out!r}, within {str(store)!r}")
    if onto is not None and place == Path(onto).resolve():
        raise ConfigError(f"--out: expected another directory than --onto, got {out!r} for both")
