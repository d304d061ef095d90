"""From stores to the gates of an intervention: a Dask task a site.

Dask's threads, not workers as in `score`: a site takes seconds, NumPy and scikit-learn compute most of them without
holding Python's lock, and a process would read the store's description again.
"""

import json
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.errors import AuraError, InputError, StoreError
from aura_dist.interventions.artifact import Intervention, check_no_gate
from aura_dist.interventions.gates import (
    FITTED_ON,
    GATES,
    PASSING_SHARE,
    Gate,
    GateFit,
    posterior,
    settled,
)
from aura_dist.interventions.separation import Separation, separate, site_bytes
from aura_dist.ranks.process import available_cores, free_memory
from aura_dist.ranks.progress import Progress
from aura_dist.sites.kinds import KINDS, except_for
from aura_dist.sites.site import Site
from aura_dist.store.access import open_group, read_array
from aura_dist.store.schema import DONE, StoreSpec, activation_path

logger = logging.getLogger(__name__)

MEAN, MEAN_SQUARE = "mean", "mean_square"


@dataclass(frozen=True)
class Texts:
    """Some texts of a finished store, and which of them carry the concept."""

    path: str
    group: zarr.Group
    spec: StoreSpec
    rows: NDArray[np.int64]  # which of the store's rows
    is_positive: NDArray[np.bool_]  # of these rows

    def responses(self, site: str, pooling: str) -> NDArray[Any]:
        """[N, D] of its texts; StoreError if a chunk is missing or damaged."""
        values: NDArray[Any] = read_array(self.group, activation_path(site, pooling), complete=True)[self.rows]
        return values

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """[N] tokens that are pooled; special ones that are left out count too, because no store has their number."""
        counts = read_array(self.group, "samples/num_tokens")[self.rows].astype(np.int64)
        return np.maximum(counts - self.spec.skip_first_tokens, 1)


@dataclass(frozen=True)
class Gated:
    """An intervention with gates, what its description says of them, and what they depend on."""

    intervention: Intervention
    about: dict[str, Any]
    evidence: list[NDArray[Any]]


def with_gates(
    fitted: Intervention,
    group: zarr.Group,
    spec: StoreSpec,
    concept: str,
    fit: GateFit,
    sites: Sequence[Site],
    earlier: Intervention | None,
) -> Gated:
    """`fitted` with a gate at each site that it changes; sites and units without a gate are left as they are.

    Raises
    ------
    InputError
        A store lacks a pooling, the control store is of another model or other sites, or no site separates the classes.
    ModelError
        A site's values cannot have such a gate; or, where the threshold comes from single tokens, the store's model or
        texts cannot be loaded.
    StoreError
        A store is not finished, or damaged.
    """
    changed = [site for site in sites if fitted.restricted([site.name]).num_changed]
    stores = stores_for_gates(group, spec, concept, fit, changed, earlier)
    gates, about = _KINDS[fit.kind].find(stores, changed, fit, earlier)
    evidence = [part for gate in gates.values() for part in gate.parts.values()]
    if fit.control is not None:
        control = stores[1]
        about["control"] = {"store": control.path, "data": dict(control.spec.data), "num_texts": len(control.rows)}
    kept = fitted.restricted(list(gates))
    closed = _closed_where_unknown(kept, gates)
    if kept.num_changed > closed.num_changed:
        if not closed.num_changed:
            raise _no_gate(len(changed))
        number = kept.num_changed - closed.num_changed
        logger.warning("%d neurons have NaN or infinite responses, so no gate: they are left as they are", number)
    return Gated(closed, about, evidence)


def stores_for_gates(
    group: zarr.Group,
    spec: StoreSpec,
    concept: str,
    fit: GateFit,
    sites: Sequence[Site],
    earlier: Intervention | None,
) -> list[Texts]:
    """The texts that gates of these sites are fitted from, the controls last; raises as `with_gates` does."""
    _check_kinds(fit, sites)
    for site in sites:
        if earlier is not None and site.name in earlier.sites:
            check_no_gate(site.name, Intervention({}, gate={site.name: Gate(fit.kind, {})}))
    stores = [_labelled(group, spec, concept)]
    if fit.control is not None:
        stores.append(_control(fit.control, stores[0], sites))
    for store in stores:
        _check_store(store, _poolings(fit))
    return stores


def _poolings(fit: GateFit) -> tuple[str, ...]:
    """Those that it is fitted from."""
    return _KINDS[fit.kind].poolings if fit.pooling is None else (fit.pooling,)


def fitting_bytes(sites: Sequence[Site], poolings: Sequence[str], num_texts: int) -> dict[str, int]:
    """Kind of gate that a store of `poolings` can be asked for, with its flags → most bytes of a thread that fits it.

    `num_texts` are those of all stores that it is fitted from.
    """
    found = {}
    for name, kind in _KINDS.items():
        size = max((kind.num_bytes(num_texts, site.width) for site in sites if _can_have(name, site)), default=0)
        others = [pooling for pooling in FITTED_ON if pooling in poolings and "gate_pooling" in GATES[name].options]
        if size and set(kind.poolings) <= set(poolings):
            found[name] = size
        elif size and others:
            found[f"{name} --gate-pooling {others[0]}"] = size
    return found


def _closed_where_unknown(fitted: Intervention, gates: Mapping[str, Gate]) -> Intervention:
    """`fitted` under `gates`, without the units whose gate is not finite."""
    scales, shifts, kept = dict(fitted.scale), dict(fitted.shift), {}
    for site, gate in gates.items():
        each = [values for name, values in gate.parts.items() if gate.row.parts[name]]
        known = np.logical_and.reduce([np.isfinite(values) for values in each])
        kept[site] = Gate(gate.kind, {n: np.where(np.isfinite(v), v, np.float32(0)) for n, v in gate.parts.items()})
        for maps, neutral in ((scales, 1), (shifts, 0)):
            if site in maps:
                maps[site] = np.where(known, maps[site], np.float32(neutral))
    return Intervention(scales, shifts, fitted.meta, kept)


def _can_have(kind: str, site: Site) -> bool:
    return KINDS[site.kind].whole_tokens or not GATES[kind].of_token


def _check_kinds(fit: GateFit, sites: Sequence[Site]) -> None:
    parted = [site for site in sites if not _can_have(fit.kind, site)]
    if parted:
        raise InputError(
            f"--gate {fit.kind}: expected modules that hold all values of a token together, got {parted[0].name!r} of "
            f"kind {parted[0].kind}; leave it out: {except_for(site.name for site in parted)}, or take --gate units"
        )


# stores


def _labelled(group: zarr.Group, spec: StoreSpec, concept: str) -> Texts:
    labels = read_array(group, "samples/label")[:, spec.concepts.index(concept)]
    rows = np.flatnonzero(labels >= 0)
    return Texts(str(group.store_path), group, spec, rows, labels[rows] == 1)


def _control(path: str, of: Texts, sites: Sequence[Site]) -> Texts:
    """All texts of the control store, as negatives; InputError unless it was collected as the other one."""
    group = open_group(path)
    spec = StoreSpec.of(group)
    widths = {site.name: site.width for site in spec.sites}
    if spec.to_attributes() == of.spec.to_attributes():
        raise InputError(f"--control {path!r}: expected another store than --store, got the same; collect other texts")
    for what, ours, theirs in (
        ("the model", of.spec.model["fingerprint"][:12], spec.model["fingerprint"][:12]),
        ("--dtype", of.spec.dtype, spec.dtype),
        ("the intervention", _under(of.spec), _under(spec)),
        ("--chat and --system", _chat(of.spec), _chat(spec)),
        ("--skip-special-tokens", of.spec.skip_special_tokens, spec.skip_special_tokens),
        ("--skip-first-tokens", of.spec.skip_first_tokens, spec.skip_first_tokens),
    ):
        if ours != theirs:
            raise InputError(
                f"--control {path!r}: expected a collection with {what} of --store ({ours}), got {theirs}; collect the "
                "control texts in the same way"
            )
    for site in sites:
        if widths.get(site.name) != site.width:
            raise InputError(
                f"--control {path!r}: expected the modules of --store, found no {site.name!r} of {site.width} neurons; "
                "collect the control texts with the same --modules"
            )
    rows = np.arange(len(read_array(group, "samples/row")))
    return Texts(path, group, spec, rows, np.zeros(len(rows), dtype=np.bool_))


def _under(spec: StoreSpec) -> str:
    under = spec.intervention
    return "none" if under is None else f"{under['digest'][:12]} at strength {under['strength']}"


def _chat(spec: StoreSpec) -> str:
    return json.dumps(spec.tokenizer.get("chat") or "none", sort_keys=True, ensure_ascii=False)


def _check_store(texts: Texts, poolings: Sequence[str]) -> None:
    lacks = [pooling for pooling in poolings if pooling not in texts.spec.poolings]
    if lacks:
        raise InputError(
            f"--gate: expected the pooling {' and '.join(poolings)} in {texts.path!r}, found "
            f"{', '.join(texts.spec.poolings)}; collect with `--pooling {' '.join([*texts.spec.poolings, *lacks])}`"
        )
    done = read_array(texts.group, DONE)
    if not done.all():
        raise StoreError(
            f"store {texts.path!r}: expected it finished, for a gate, found {int(done.sum())} of {len(done)} "
            "tasks done; run the same `collect` to finish it"
        )


# gates of tokens


def _token_gates(
    stores: Sequence[Texts], sites: Sequence[Site], fit: GateFit, earlier: Intervention | None
) -> tuple[dict[str, Gate], dict[str, Any]]:
    is_positive = np.concatenate([store.is_positive for store in stores])
    (pooling,) = _poolings(fit)

    def of(site: Site) -> Separation | None:
        return separate(np.concatenate([store.responses(site.name, pooling) for store in stores]), is_positive)

    bytes_of = [_KINDS[fit.kind].num_bytes(len(is_positive), site.width) for site in sites]
    each = zip(sites, _each(of, sites, bytes_of), strict=True)
    found = {site.name: one for site, one in each if one is not None}
    if len(found) < len(sites):
        logger.warning(
            "%d of %d modules have NaN, infinite or only equal responses, so no gate: they are left as they are",
            len(sites) - len(found), len(sites),
        )  # fmt: skip
    if sites and not found:
        raise _no_gate(len(sites))
    kept = _that_separate(found, is_positive, fit)
    gates = {name: one.gate for name, one in kept.items()}
    if fit.threshold is None and kept:
        moves = _from_tokens(stores, [site for site in sites if site.name in kept], gates, earlier)
    else:
        moves = dict.fromkeys(kept, (fit.threshold or 0.0, fit.settled_sharpness))
    if fit.sharpness is not None:
        moves = {name: (threshold, fit.sharpness) for name, (threshold, _) in moves.items()}
    about = {
        "kind": fit.kind,
        "pooling": pooling,
        "threshold": _rule(stores) if fit.threshold is None else fit.threshold,
        "sites": {
            name: {
                "accuracy": one.accuracy, "inverse_strength": one.inverse_strength, "threshold": moves[name][0],
                "sharpness": moves[name][1],
            }
            for name, one in kept.items()
        },
    }  # fmt: skip
    return {name: gate.moved(*moves[name]) for name, gate in gates.items()}, about


def _that_separate(
    found: Mapping[str, Separation], is_positive: NDArray[np.bool_], fit: GateFit
) -> dict[str, Separation]:
    """The modules whose regression is right often enough; InputError if there are none."""
    least = _above_chance(is_positive) if fit.min_accuracy is None else fit.min_accuracy
    kept = {name: one for name, one in found.items() if one.accuracy >= least}
    if found and not kept:
        best = f"the best of {len(found)} tells {max(one.accuracy for one in found.values()):.3f}"
        if fit.min_accuracy is None:
            raise InputError(
                f"--gate tokens: expected a module that tells {least:.3f} of held-out texts rightly, three standard "
                f"errors above chance, {best}; collect more texts, or give --gate-min-accuracy"
            )
        raise InputError(
            f"--gate-min-accuracy: expected a share of held-out texts that some module tells rightly, got {least}; "
            f"{best}; give a smaller one"
        )
    if fit.min_accuracy is None and len(kept) < len(found):
        logger.warning(
            "%d of %d modules tell held-out texts apart hardly better than by chance (under %.3f), so no gate: they "
            "are left as they are; --gate-min-accuracy sets another limit", len(found) - len(kept), len(found), least,
        )  # fmt: skip
    if kept:
        accuracies = [one.accuracy for one in kept.values()]
        logger.info(
            "gates of %d of %d modules: of held-out texts they tell %.1f %% to %.1f %% rightly", len(kept), len(found),
            100 * min(accuracies), 100 * max(accuracies),
        )  # fmt: skip
    return kept


def _no_gate(num_sites: int) -> InputError:
    return InputError(
        f"--gate: expected a module with finite responses that differ, got none among {num_sites}; leave out of "
        "--modules what the model does not use, or collect with another --dtype"
    )


def _above_chance(is_positive_N: NDArray[np.bool_]) -> float:
    """Three standard errors above what guesses reach.

    Where nothing is told apart, all logits are nearly the same, so that a gate is half open at every token.
    """
    shares = [1 / int(is_positive_N.sum()), 1 / int((~is_positive_N).sum())]
    return min(1.0, 0.5 + 3 * 0.25 * math.sqrt(sum(shares)))


def _rule(stores: Sequence[Texts]) -> str:
    return f"{PASSING_SHARE:.0%} of tokens {'of the control texts' if len(stores) > 1 else 'without the concept'}"


def _from_tokens(
    stores: Sequence[Texts], sites: Sequence[Site], gates: Mapping[str, Gate], earlier: Intervention | None
) -> dict[str, tuple[float, float]]:
    """Site → threshold and sharpness, from single tokens of the control texts, or of the negatives where none are.

    Not over both, because negatives such as rude but not toxic comments have single tokens like those of the positives:
    a gate that 1 % of these pass hardly opens.
    """
    from aura_dist.interventions.token_thresholds import logits_of_tokens

    *_, last = stores
    try:
        kept = (last.group, last.spec, last.rows[~last.is_positive])
        found = logits_of_tokens(*kept, sites, gates, earlier)
    except AuraError as error:
        poolings = " ".join(last.spec.poolings)
        collect = f"collect {last.path!r} with `--pooling {poolings} tokens`, which needs no model here, or "
        keeps = {site.name for site in sites} <= set(last.spec.tokens)
        raise type(error)(
            f"{error}; or {'' if keeps else collect}give --gate-threshold, such as 0, which needs no tokens"
        ) from error
    made = {site: settled(logits_T, PASSING_SHARE) for site, logits_T in found.items()}
    open_means = [mean for *_, mean in made.values() if mean > 2 * PASSING_SHARE]
    if open_means:
        logger.warning(
            "%d of %d gates are open at every token that must stay as it is, to %.3f at most on average, because their "
            "logits hardly differ; --gate-sharpness makes them steeper, --gate-min-accuracy leaves modules out",
            len(open_means), len(made), max(open_means),
        )  # fmt: skip
    return {site: (threshold, sharpness) for site, (threshold, sharpness, _) in made.items()}


def _each(work: Callable[[Site], Any], sites: Sequence[Site], bytes_of: Sequence[int]) -> list[Any]:
    """What `work` makes of each site, in as many threads as there are cores, and room for."""
    import dask
    from threadpoolctl import threadpool_limits

    room = free_memory() // 2 // max(bytes_of, default=1)
    num_threads = max(1, min(available_cores(), len(sites), room))
    progress = Progress("gates", len(sites), sum(bytes_of), unit="modules", cost_unit="bytes")

    one_at_a_time = threading.Lock()

    def one(site: Site, num_bytes: int) -> Any:
        made = work(site)
        with one_at_a_time:
            progress.advance(1, num_bytes)
        return made

    tasks = [dask.delayed(partial(one, *site))() for site in zip(sites, bytes_of, strict=True)]
    # one thread for each product, so that the number of workers changes no sum
    with threadpool_limits(1):
        made = dask.compute(*tasks, scheduler="threads", num_workers=num_threads)
    progress.finish()
    return list(made)


# gates of units


def _unit_gates(
    stores: Sequence[Texts], sites: Sequence[Site], fit: GateFit, earlier: Intervention | None
) -> tuple[dict[str, Gate], dict[str, Any]]:
    weight_of = [(store.num_tokens.astype(np.float64), store.is_positive) for store in stores]

    def of(site: Site) -> Gate:
        moments = []
        for pooling in (MEAN, MEAN_SQUARE):
            sums, counts = np.zeros((2, site.width)), np.zeros(2)
            for store, (tokens_N, is_positive_N) in zip(stores, weight_of, strict=True):
                values_ND = store.responses(site.name, pooling)
                for which, rows in enumerate((is_positive_N, ~is_positive_N)):
                    counts[which] += tokens_N[rows].sum()
                    sums[which] += tokens_N[rows] @ values_ND[rows]
            moments.append(sums / counts[:, None])
        (m1, m0), (square1, square0) = moments
        return posterior((m1, m0), (square1, square0))

    num_texts = sum(len(store.rows) for store in stores)
    bytes_of = [_KINDS[fit.kind].num_bytes(num_texts, site.width) for site in sites]
    each = zip(sites, _each(of, sites, bytes_of), strict=True)
    found = {site.name: gate.moved(fit.threshold or 0.0, fit.settled_sharpness) for site, gate in each}
    about = {
        "kind": fit.kind, "threshold": fit.threshold or 0.0, "sharpness": fit.settled_sharpness, "prior_odds": 1.0,
        "sites": {name: {} for name in found},
    }  # fmt: skip
    return found, about


@dataclass(frozen=True)
class _Kind:
    poolings: tuple[str, ...]  # that it is fitted from, if no other is given
    find: Callable[..., tuple[dict[str, Gate], dict[str, Any]]]
    num_bytes: Callable[[int, int], int]  # of N texts × D units, at most


_KINDS = {
    "tokens": _Kind((MEAN,), _token_gates, lambda n, d: 2 * site_bytes(n, d, np.dtype(np.float32).itemsize)),
    "units": _Kind((MEAN, MEAN_SQUARE), _unit_gates, lambda n, d: 16 * n * d),
}
