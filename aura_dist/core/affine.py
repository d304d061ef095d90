"""From a neuron's statistics to what is done to it: z ← ω ⊙ z + b per site. Pure NumPy."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from aura_dist.errors import InputError

Scores = Mapping[str, NDArray[np.float64]]
Scales = dict[str, NDArray[np.float32]]


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
        raise InputError(f"--top-k: expected at most {scored}, the number of scored neurons, got {top_k}")
    order = np.argsort(np.where(np.isnan(everything), np.inf, -everything), kind="stable")
    chosen = np.zeros(everything.shape, dtype=np.bool_)
    chosen[order[:top_k]] = True
    cuts = np.cumsum([len(v) for v in auroc.values()])[:-1]
    return dict(zip(auroc, np.split(chosen, cuts), strict=True))


def fit_scales(method: str, auroc: Scores, *, top_k: int | None = None, alpha: float = 0.5) -> Scales:
    """Site → [D] float32 scale ω of a method.

    Parameters
    ----------
    method
        `aura` (see `aura_scale`), `det0` (ω = 0 for the experts) or `damp` (ω = `alpha` for the experts);
        Suau et al., ICML 2024, sections 3.1 and 3.2.
    auroc
        Site → [D] AUROC, in model order.
    top_k
        Restrict to the k neurons of highest AUROC.
    alpha
        Scale of the experts under `damp`.

    Raises
    ------
    InputError
        The method is none of these, or `top_k` is too large.
    """
    experts = top_units(auroc, top_k)
    if method == "aura":
        return {s: np.where(experts[s], aura_scale(v), np.float32(1)) for s, v in auroc.items()}
    factors = {"det0": 0.0, "damp": alpha}
    if method not in factors:
        raise InputError(f"--method: expected one of aura, {', '.join(factors)}, got {method!r}")
    factor = np.float32(factors[method])
    return {s: np.where(experts[s], factor, np.float32(1)) for s in auroc}


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
    s = np.float64(strength)
    scaled = (1.0 + s * (scale.astype(np.float64) - 1.0)).astype(np.float32)
    return scaled, None if shift is None else (s * shift).astype(np.float32)


def compose(
    outer: tuple[NDArray[np.float32], NDArray[np.float32] | None],
    inner: tuple[NDArray[np.float32], NDArray[np.float32] | None],
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """`outer` after `inner` as one map: ω = ω₂ ω₁, b = ω₂ b₁ + b₂."""
    (scale_2, shift_2), (scale_1, shift_1) = outer, inner
    scale = scale_2 * scale_1
    if shift_1 is None:
        return scale, shift_2
    moved = scale_2 * shift_1
    return scale, moved if shift_2 is None else moved + shift_2


def count_changed(scales: Mapping[str, NDArray[np.float32]], shifts: Mapping[str, NDArray[np.float32]]) -> int:
    """Number of neurons that a set of maps changes."""
    sites: Sequence[str] = list({**scales, **shifts})
    total = 0
    for site in sites:
        scaled = scales[site] != 1 if site in scales else False
        shifted = shifts[site] != 0 if site in shifts else False
        total += int(np.count_nonzero(np.logical_or(scaled, shifted)))
    return total
