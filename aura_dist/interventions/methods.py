"""From a neuron's statistics to what is done to it: z ← ω ⊙ z + b per site. Pure NumPy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aura_dist.errors import InputError

Scores = Mapping[str, NDArray[np.float64]]
Scales = dict[str, NDArray[np.float32]]
Shifts = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Method:
    """What a method reads and where it acts.

    Attributes
    ----------
    statistics
        Names of the store's statistics that the map is made of.
    pooling
        Pooling whose statistics it is meant for.
    experts_only
        Without a number of units: acts on the units with AUROC > ½, rather than on all that have a score.
    """

    statistics: tuple[str, ...]
    pooling: str
    experts_only: bool


METHODS = {
    "aura": Method(("auroc",), "max", experts_only=True),
    "damp": Method(("auroc",), "max", experts_only=True),
    "det0": Method(("auroc",), "max", experts_only=True),
    "mean-act": Method(("mean_positive", "mean_negative"), "mean", experts_only=False),
    "linear-act": Method(("linear_act_scale", "linear_act_shift"), "mean", experts_only=False),
}


def needed_statistics(method: str, *, top_k: int | None, max_q: float | None) -> tuple[str, ...]:
    """Names of the statistics that `fit_maps` reads; InputError if there is no such method."""
    if method not in METHODS:
        raise InputError(f"--method: expected one of {', '.join(METHODS)}, got {method!r}")
    chosen_by = (["auroc"] if top_k is not None else []) + (["q_value"] if max_q is not None else [])
    return tuple(dict.fromkeys([*METHODS[method].statistics, *chosen_by]))


def aura_scale(auroc: NDArray[np.float64]) -> NDArray[np.float32]:
    """AurA's scale of each neuron: α = 1 − 2 (AUROC − ½) where AUROC > ½, else 1.

    Suau et al., *Whispering Experts* (ICML 2024), eq. 5: an expert is damped in proportion to its Gini
    coefficient, down to 0 at AUROC = 1.

    Parameters
    ----------
    auroc
        Any shape; NaN (no score) gives 1.
    """
    alpha = np.ones(auroc.shape, dtype=np.float64)
    expert = auroc > 0.5
    alpha[expert] = 1.0 - 2.0 * (auroc[expert] - 0.5)
    return alpha.astype(np.float32)


def top_units(auroc: Scores, top_k: int | None) -> dict[str, NDArray[np.bool_]]:
    """Which neurons are experts: exactly the `top_k` of highest AUROC in the whole model, or all above ½.

    Ties are broken by model order, then unit, so that the choice is the same everywhere.

    Parameters
    ----------
    auroc
        Site → [D] AUROC, in model order; NaN is never chosen.
    top_k
        Number of neurons, or None for all with AUROC > ½.

    Raises
    ------
    InputError
        `top_k` is larger than the number of scored neurons.
    """
    if top_k is None:
        return {site: values > 0.5 for site, values in auroc.items()}
    everything = np.concatenate(list(auroc.values()))
    scored = int(np.count_nonzero(~np.isnan(everything)))
    if top_k > scored:
        raise InputError(f"--top-k: expected at most {scored}, the number of neurons to choose from, got {top_k}")
    order = np.argsort(np.where(np.isnan(everything), np.inf, -everything), kind="stable")
    chosen = np.zeros(everything.shape, dtype=np.bool_)
    chosen[order[:top_k]] = True
    cuts = np.cumsum([len(v) for v in auroc.values()])[:-1]
    return dict(zip(auroc, np.split(chosen, cuts), strict=True))


def fit_maps(
    method: str,
    statistics: Mapping[str, Scores],
    *,
    top_k: int | None = None,
    max_q: float | None = None,
    alpha: float = 0.5,
) -> tuple[Scales, Shifts]:
    """Site → [D] float32 scale ω, and site → [D] float32 shift b where the method has one.

    ===========  ======================  =====================================================================
    method       map of a chosen unit    source
    ===========  ======================  =====================================================================
    aura         α z                     Suau et al., *Whispering Experts* (ICML 2024), eq. 5: see `aura_scale`
    damp         `alpha` z               the same, section 3.2
    det0         0                       the same, section 3.1
    mean-act     z + (m₀ − m₁)           Rodríguez et al., *Controlling Language and Diffusion Models by
                                         Transporting Activations* (ICLR 2025): m₁, m₀ are the means of the
                                         responses to texts with and without the concept
    linear-act   ω z + b                 the same: least squares over the monotone coupling of the two samples
    ===========  ======================  =====================================================================

    Chosen are the `top_k` units of highest AUROC; without `top_k` those with AUROC > ½ under aura, damp and
    det0, and all under the others. Other units, and units without a finite map, are left as they are.

    Parameters
    ----------
    method
        One of `METHODS`.
    statistics
        Statistic → site → [D] float64, all sites in model order: at least `needed_statistics`.
    top_k
        Choose exactly this many units.
    max_q
        Choose among the units with a q-value of at most this.
    alpha
        Scale of the chosen units under damp.

    Raises
    ------
    InputError
        There is no such method, or there are fewer units than `top_k` to choose from.
    """
    needed_statistics(method, top_k=top_k, max_q=max_q)
    scale, shift = _maps_of_all(method, statistics, alpha)
    chosen = _chosen(method, statistics, top_k, max_q)
    scales: Scales = {}
    shifts: Shifts = {}
    for site, units in chosen.items():
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and left out as such
            scaled = scale[site].astype(np.float32)
            moved = shift[site].astype(np.float32) if site in shift else None
        mapped = np.isfinite(scaled) & units
        if moved is not None:
            mapped &= np.isfinite(moved)
            shifts[site] = np.where(mapped, moved, np.float32(0))
        scales[site] = np.where(mapped, scaled, np.float32(1))
    return scales, shifts


def _maps_of_all(method: str, statistics: Mapping[str, Scores], alpha: float) -> tuple[Scores, Scores]:
    """The map of every unit, chosen or not: site → [D] scale, and site → [D] shift for the methods that shift."""
    first = statistics[METHODS[method].statistics[0]]
    if method == "aura":
        return {s: aura_scale(v).astype(np.float64) for s, v in first.items()}, {}
    if method == "mean-act":
        means = statistics["mean_negative"]
        return {s: np.ones_like(v) for s, v in first.items()}, {s: means[s] - v for s, v in first.items()}
    if method == "linear-act":
        return first, statistics["linear_act_shift"]
    factor = {"det0": 0.0, "damp": alpha}[method]
    return {s: np.full_like(v, factor) for s, v in first.items()}, {}


def _chosen(
    method: str, statistics: Mapping[str, Scores], top_k: int | None, max_q: float | None
) -> dict[str, NDArray[np.bool_]]:
    """Which units a method acts on."""
    deciding = statistics["auroc"] if "auroc" in statistics else statistics[METHODS[method].statistics[0]]
    if max_q is not None:
        # NaN is "not scored", so that a unit without a q-value is left alone
        deciding = {s: np.where(statistics["q_value"][s] <= max_q, v, np.nan) for s, v in deciding.items()}
    if top_k is None and not METHODS[method].experts_only:
        return {s: ~np.isnan(v) for s, v in deciding.items()}
    return top_units(deciding, top_k)


def with_strength(
    scale: NDArray[np.float32], shift: NDArray[np.float32] | None, strength: float
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """The map at strength s: ω_s = 1 + s (ω − 1), b_s = s b. s = 0 is the identity, exactly; s = 1 the map itself.

    Raises
    ------
    InputError
        s is negative, infinite or NaN.
    """
    if not 0 <= strength < np.inf:
        raise InputError(f"--strength: expected a finite number of at least 0, got {strength}")
    if strength == 1.0:
        return scale, shift
    if strength == 0.0:  # also of a map that is not finite
        return np.ones_like(scale), None if shift is None else np.zeros_like(shift)
    s = np.float64(strength)
    scaled = (1.0 + s * (scale.astype(np.float64) - 1.0)).astype(np.float32)
    return scaled, None if shift is None else (s * shift).astype(np.float32)


def compose(
    outer: tuple[NDArray[np.float32], NDArray[np.float32] | None],
    inner: tuple[NDArray[np.float32], NDArray[np.float32] | None],
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """`outer` after `inner` as one map: ω = ω₂ ω₁, b = ω₂ b₁ + b₂, rounded once."""
    (scale_2, shift_2), (scale_1, shift_1) = outer, inner
    scale = scale_2 * scale_1
    if shift_1 is None:
        return scale, shift_2
    moved = scale_2.astype(np.float64) * shift_1
    return scale, (moved if shift_2 is None else moved + shift_2).astype(np.float32)


def count_changed(scales: Mapping[str, NDArray[np.float32]], shifts: Mapping[str, NDArray[np.float32]]) -> int:
    """Number of neurons that a set of maps changes."""
    sites: Sequence[str] = list({**scales, **shifts})
    total = 0
    for site in sites:
        scaled = scales[site] != 1 if site in scales else False
        shifted = shifts[site] != 0 if site in shifts else False
        total += int(np.count_nonzero(np.logical_or(scaled, shifted)))
    return total
