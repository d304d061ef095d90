"""The methods of `fit`: each is a map z ← ω ⊙ z + b of the units of every site. Pure NumPy.

A new method is one row of `METHODS` and one function: of a store's statistics, or, in a module of its own, of a model.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aura_dist.errors import ConfigError, InputError

Scores = Mapping[str, NDArray[np.float64]]
Scales = dict[str, NDArray[np.float32]]
Shifts = dict[str, NDArray[np.float32]]
Map = tuple[NDArray[np.float32], NDArray[np.float32] | None]  # one site's scale and shift
Options = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class FromStatistics:
    """A method that computes its maps from a store's statistics.

    `maps(statistics, options)` returns site → [D] scale and site → [D] shift of every unit, chosen or not; no shifts
    where the method only scales.
    """

    summary: str  # what it does to a chosen unit, for `--help`
    maps: Callable[[Mapping[str, Scores], Options], tuple[Scores, Scores]]
    statistics: tuple[str, ...]  # those that `maps` reads
    pooling: str  # default of `--pooling`
    experts_only: bool = False  # without `--top-k`, it acts on the units with AUROC > ½, not on all with a score
    own_options: Options = field(default_factory=dict)  # further options that `maps` reads → their defaults
    by_layer: bool = True  # whether a layer's maps need the statistics of no other layer

    @property
    def options(self) -> dict[str, Any]:
        """Options of `fit` that the method reads → their defaults."""
        return {"pooling": self.pooling, "top_k": None, **self.own_options, "max_q": None}


@dataclass(frozen=True, kw_only=True)
class FromModel:
    """A method that trains its maps: it runs the model, and may take gradients.

    `train` names a function as `module:function`, imported when the method is used, because such modules import torch.
    It takes an `interventions.training.Training` and returns (site → [D] scale, site → [D] shift).
    """

    summary: str  # what it does, for `--help`
    train: str
    options: Options = field(default_factory=dict)  # options of `fit` that it reads → their defaults
    shardings: tuple[str, ...] = ("replicate",)  # ways to spread the model over all ranks under which it can train


def aura_scale(auroc: NDArray[np.float64]) -> NDArray[np.float32]:
    """AurA's scale of each neuron: α = 1 − 2 (AUROC − ½) where AUROC > ½, else 1.

    Suau et al., *Whispering Experts* (ICML 2024), eq. 5: an expert is damped in proportion to its Gini
    coefficient, down to 0 at AUROC = 1. `auroc` has any shape; α is 1 where it is NaN (no score).
    """
    alpha = np.ones(auroc.shape, dtype=np.float64)
    expert = auroc > 0.5
    alpha[expert] = 1.0 - 2.0 * (auroc[expert] - 0.5)
    return alpha.astype(np.float32)


def _aura(statistics: Mapping[str, Scores], options: Options) -> tuple[Scores, Scores]:
    return {site: aura_scale(auroc).astype(np.float64) for site, auroc in statistics["auroc"].items()}, {}


def _damp(statistics: Mapping[str, Scores], options: Options) -> tuple[Scores, Scores]:
    """The scale `alpha` (Suau et al., section 3.2)."""
    return {site: np.full_like(auroc, options["alpha"]) for site, auroc in statistics["auroc"].items()}, {}


def _det0(statistics: Mapping[str, Scores], options: Options) -> tuple[Scores, Scores]:
    """The scale 0 (Suau et al., section 3.1)."""
    return {site: np.zeros_like(auroc) for site, auroc in statistics["auroc"].items()}, {}


def _mean_act(statistics: Mapping[str, Scores], options: Options) -> tuple[Scores, Scores]:
    """b = m₀ − m₁, the difference of the mean responses without and with the concept (Rodríguez et al., ICLR 2025)."""
    positive, negative = statistics["mean_positive"], statistics["mean_negative"]
    return {s: np.ones_like(v) for s, v in positive.items()}, {s: negative[s] - v for s, v in positive.items()}


def _linear_act(statistics: Mapping[str, Scores], options: Options) -> tuple[Scores, Scores]:
    """Least squares over the monotone coupling of both classes (Rodríguez et al., ICLR 2025), as scored."""
    return statistics["linear_act_scale"], statistics["linear_act_shift"]


def _pid_act(statistics: Mapping[str, Scores], options: Options) -> tuple[Scores, Scores]:
    """b_l = K_p r_l + K_i Σ_{j<l} r_j + K_d (r_l − r_{l−1}), r = m₀ − m₁ (Nguyen et al., ICLR 2026, arXiv 2510.04309).

    l counts the layers of sites that have one name but for the layer's number, and one width. The first of them has
    no term of the derivative. A unit counts as 0 in later layers' sums where its difference is not finite.
    """
    shifts: dict[str, NDArray[np.float64]] = {}
    earlier: dict[tuple[str, int], tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for site, positive in statistics["mean_positive"].items():
        error = statistics["mean_negative"][site] - positive
        place = re.sub(r"\.\d+(?=\.|$)", ".*", site, count=1), len(error)
        known = np.where(np.isfinite(error), error, 0.0)
        total, last = earlier.get(place, (np.zeros_like(known), known))
        shifts[site] = options["kp"] * error + options["ki"] * total + options["kd"] * (error - last)
        earlier[place] = total + known, known
    return {site: np.ones_like(shift) for site, shift in shifts.items()}, shifts


METHODS: dict[str, FromStatistics | FromModel] = {
    "aura": FromStatistics(
        summary="α z, α = 1 − 2 (AUROC − ½): damps each expert in proportion to its expertise",
        maps=_aura, statistics=("auroc",), pooling="max", experts_only=True,
    ),
    "damp": FromStatistics(
        summary="`alpha` z: damps all experts alike",
        maps=_damp, statistics=("auroc",), pooling="max", experts_only=True, own_options={"alpha": 0.5},
    ),
    "det0": FromStatistics(
        summary="0: switches the experts off",
        maps=_det0, statistics=("auroc",), pooling="max", experts_only=True,
    ),
    "mean-act": FromStatistics(
        summary="z + b: moves the mean response to texts with the concept to the mean without it",
        maps=_mean_act, statistics=("mean_positive", "mean_negative"), pooling="mean",
    ),
    "linear-act": FromStatistics(
        summary="ω z + b: maps the responses to texts with the concept onto those without it",
        maps=_linear_act, statistics=("linear_act_scale", "linear_act_shift"), pooling="mean",
    ),
    "pid-act": FromStatistics(
        summary="z + b: mean-act's shift, with what the layers before it were to move, and by how much it changes",
        maps=_pid_act, statistics=("mean_positive", "mean_negative"), pooling="mean",
        own_options={"kp": 1.0, "ki": 0.1, "kd": 0.1}, by_layer=False,
    ),
    "lineas": FromModel(
        summary="ω z + b: learned at all sites together, so that texts with the concept respond as those without it",
        train="aura_dist.interventions.lineas:train",
        options={
            "texts_per_class": 32, "steps": 1000, "learning_rate": 0.1, "sparsity": 0.0, "group_sparsity": 0.0,
            "fit_seed": 0, "recompute": False,
        },
        shardings=("replicate", "fsdp"),
    ),
}  # fmt: skip


def find_method(name: str) -> FromStatistics | FromModel:
    """The row of `METHODS`; InputError if there is none of this name."""
    if name not in METHODS:
        raise InputError(f"--method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def check_sequential(name: str) -> None:
    """ConfigError if the maps of a layer need more than the responses of that layer."""
    method = find_method(name)
    if isinstance(method, FromModel) or not method.by_layer:
        able = [n for n, row in METHODS.items() if isinstance(row, FromStatistics) and row.by_layer]
        raise ConfigError(
            f"--method {name}: expected one whose maps of a layer need that layer's responses alone with --sequential "
            f"({', '.join(able)}), got one that needs more; fit it from a store, without --sequential"
        )


def method_options() -> set[str]:
    """Names of the options that some method reads; not every method reads all of them."""
    return {option for method in METHODS.values() for option in method.options}


def settle_options(method: str, given: Options) -> dict[str, Any]:
    """Every option that the method reads: as given, else (None) its default.

    ConfigError if an option is given that this method does not read; InputError if there is no such method.
    """
    read = find_method(method).options
    for name in (name for name, value in given.items() if value is not None and name not in read):
        readers = [other for other, row in METHODS.items() if name in row.options]
        raise ConfigError(
            f"--{name.replace('_', '-')}: expected it with --method {' or '.join(readers)} alone, got it with "
            f"{method}; leave it out"
        )
    return {name: default if given.get(name) is None else given[name] for name, default in read.items()}


def check_sharding(method: str, sharding: str) -> None:
    """ConfigError unless the model may be spread like this while the method's maps are fitted."""
    row = find_method(method)
    able = row.shardings if isinstance(row, FromModel) else ("replicate",)
    if sharding not in able:
        raise ConfigError(
            f"--sharding: expected {' or '.join(able)} with --method {method}, got {sharding!r}; leave it out"
        )


def needed_statistics(method: FromStatistics, options: Options) -> tuple[str, ...]:
    """Names of the statistics that `fit_maps` reads under these options."""
    chosen_by = [s for name, s in (("top_k", "auroc"), ("max_q", "q_value")) if options.get(name) is not None]
    return tuple(dict.fromkeys([*method.statistics, *chosen_by]))


def fit_maps(method: FromStatistics, statistics: Mapping[str, Scores], options: Options) -> tuple[Scales, Shifts]:
    """Site → [D] float32 scale ω, and site → [D] float32 shift b where the method has one.

    The method maps the chosen units: the `top_k` units of highest AUROC; without `top_k`, the units with AUROC > ½
    (`experts_only`) or all units; among them only those with a q-value of at most `max_q`. Other units, and units
    without a finite map, keep ω = 1 and b = 0.

    Parameters
    ----------
    statistics
        Statistic → site → [D] float64, all sites in model order: at least `needed_statistics`.
    options
        As `settle_options` returns them.

    Raises
    ------
    InputError
        There are fewer units than `top_k` to choose from.
    """
    scale, shift = method.maps(statistics, options)
    scales: Scales = {}
    shifts: Shifts = {}
    for site, units in _chosen(method, statistics, options).items():
        with np.errstate(over="ignore"):  # float32 overflows to infinity, and such a unit keeps its output
            scaled = scale[site].astype(np.float32)
            moved = shift[site].astype(np.float32) if site in shift else None
        mapped = np.isfinite(scaled) & units
        if moved is not None:
            mapped &= np.isfinite(moved)
            shifts[site] = np.where(mapped, moved, np.float32(0))
        scales[site] = np.where(mapped, scaled, np.float32(1))
    return scales, shifts


def _chosen(method: FromStatistics, statistics: Mapping[str, Scores], options: Options) -> dict[str, NDArray[np.bool_]]:
    """Site → [D] whether the method acts on the unit."""
    deciding = statistics["auroc"] if "auroc" in statistics else statistics[method.statistics[0]]
    top_k, max_q = options.get("top_k"), options.get("max_q")
    if max_q is not None:
        # NaN means "no score", so a unit without a q-value is never chosen
        deciding = {s: np.where(statistics["q_value"][s] <= max_q, v, np.nan) for s, v in deciding.items()}
    if top_k is None and not method.experts_only:
        return {s: ~np.isnan(v) for s, v in deciding.items()}
    return top_units(deciding, top_k)


def top_units(auroc: Scores, top_k: int | None) -> dict[str, NDArray[np.bool_]]:
    """Which neurons are experts: exactly the `top_k` of highest AUROC in the whole model, or all above ½.

    Model order, then unit, breaks ties, so that the choice is the same everywhere. `auroc` is in model order; NaN is
    never chosen. InputError if `top_k` is larger than the number of scored neurons.
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


def with_strength(scale: NDArray[np.float32], shift: NDArray[np.float32] | None, strength: float) -> Map:
    """The map at strength s: ω_s = 1 + s (ω − 1), b_s = s b. s = 0 is the identity, exactly; s = 1 the map itself.

    InputError if s is negative, infinite or NaN.
    """
    if not 0 <= strength < np.inf:
        raise InputError(f"--strength: expected a finite number of at least 0, got {strength}")
    if strength == 1.0:
        return scale, shift
    if strength == 0.0:  # the formula would make NaN of a map that is not finite
        return np.ones_like(scale), None if shift is None else np.zeros_like(shift)
    s = np.float64(strength)
    scaled = (1.0 + s * (scale.astype(np.float64) - 1.0)).astype(np.float32)
    return scaled, None if shift is None else (s * shift).astype(np.float32)


def compose(outer: Map, inner: Map) -> Map:
    """`outer` after `inner` as one map: ω = ω₂ ω₁, b = ω₂ b₁ + b₂, rounded once."""
    (scale_2, shift_2), (scale_1, shift_1) = outer, inner
    scale = scale_2 * scale_1
    if shift_1 is None:
        return scale, shift_2
    moved = scale_2.astype(np.float64) * shift_1
    return scale, (moved if shift_2 is None else moved + shift_2).astype(np.float32)
