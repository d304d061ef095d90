"""Every statistic of a neuron as data: its name, dtype, definition and source, and the function that makes it.

Each is made from the same `ColumnSums`, and so from one read and one sort of the neuron's column. NaN and infinity:

- a NaN response in a row labelled for the concept makes every statistic of the neuron NaN for that concept, and
  `num_distinct` 0
- infinities are ordinary values where only order counts: `auroc`, `auroc_se`, `p_value`, `q_value`,
  `average_precision`, extremes and `num_distinct`
- means are ±inf, or NaN where both infinities meet in one class; the standard deviation of a class that holds one
  is NaN, and so are `linear_act_scale` and `linear_act_shift` where either class does

Names by shape: N samples, M neurons (columns), C concepts, P positives and Q negatives of a concept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # names and formulas are read where nothing is compiled
    from aura_dist.scoring.column_sums import F64, I64, ColumnSums


@dataclass(frozen=True)
class Statistic:
    """One statistic, [concept, neuron], of this name and dtype in the store."""

    name: str
    dtype: str
    summary: str
    # makes it, [C, M], from the sums; None where it needs the whole model
    of: Callable[[ColumnSums], NDArray[Any]] | None
    # whether it is made of `twice_u` alone: ranking takes a fraction of the time of all sums
    ranks_only: bool = False
    # where it needs the whole model: the statistic that it is made from, and the function of all neurons, [D] → [D]
    over_model: tuple[str, Callable[[F64], F64]] | None = None


def auroc(sums: ColumnSums) -> F64:
    """P(positive > negative) + ½ P(equal) = 2U / (2 P Q) (Mann & Whitney 1947; Hanley & McNeil 1982)."""
    return sums.twice_u / (2 * sums.num_positive * sums.num_negative)


def auroc_se(sums: ColumnSums) -> F64:
    """Standard error of the AUROC (DeLong, DeLong & Clarke-Pearson 1988), ties at one half.

    With a_i / 2Q the share of negatives that positive i beats, and b_j / 2P likewise, the variance is
    Var(a / 2Q) / P + Var(b / 2P) / Q, the variances with one degree of freedom less. NaN where P or Q is 1.
    """
    num_positive, num_negative = sums.num_positive, sums.num_negative
    excess = sums.twice_u - num_positive * num_negative  # Σ (a − Q), and −Σ (b − P)
    above = _about_mean(sums.squared_above, excess, num_positive)
    below = _about_mean(sums.squared_below, -excess, num_negative)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = above / (4.0 * num_negative**2 * (num_positive - 1) * num_positive)
        variance = variance + below / (4.0 * num_positive**2 * (num_negative - 1) * num_negative)
    return np.sqrt(np.where((num_positive > 1) & (num_negative > 1), variance, np.nan))


def _about_mean(squares: I64, total: I64, count: I64) -> F64:
    """Σ (v − v̄)² = squares − total² / count, in whole numbers as far as 64 bits go: exactly 0 where all are equal."""
    mean, rest = total // count, total % count
    whole = squares - mean * mean * count - 2 * mean * rest
    fits = whole < (1 << 62) // count
    exact = np.where(fits, count * np.where(fits, whole, 0) - rest * rest, 0) / count
    return np.where(fits, exact, whole - rest * rest / count)


def p_value(sums: ColumnSums) -> F64:
    """Two-sided p of the Mann–Whitney test: normal approximation, tie-corrected, no continuity correction.

    Var U = P Q / 12 · ((n³ − n) − Σ (t³ − t)) / (n (n − 1)), n = P + Q, t the sizes of the ties (Lehmann,
    *Nonparametrics*, 1975, section 1.4). 1 in a column that is constant.
    """
    num_pairs = (sums.num_positive * sums.num_negative).astype(np.float64)
    n = (sums.num_positive + sums.num_negative).astype(np.float64)
    variance = num_pairs / 12 * ((n * (n * n - 1) - sums.ties) / (n * (n - 1)))
    constant = sums.num_distinct <= 1
    deviation = np.abs(sums.twice_u - num_pairs) / 2
    z = np.where(constant, 0.0, deviation / np.sqrt(np.where(constant, 1.0, variance)))
    return _two_sided(z)


def _two_sided(z: F64) -> F64:
    """P(|Z| > z) = erfc(z / √2), accurate far into the tail."""
    return np.array([math.erfc(x) for x in (z / math.sqrt(2.0)).ravel().tolist()]).reshape(z.shape)


def benjamini_hochberg(p_D: F64) -> F64:
    """q-values of the p-values of a whole model: the least false discovery rate at which each is found.

    Benjamini & Hochberg (1995): q_(i) = min over j ≥ i of p_(j) · D / j, the p ascending. A NaN stays NaN and does
    not count.
    """
    q_D = np.full(p_D.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p_D))
    falling = tested[np.argsort(p_D[tested])[::-1]]
    rank = np.arange(falling.size, 0, -1)
    q_D[falling] = np.minimum.accumulate(np.minimum(p_D[falling] * (falling.size / rank), 1.0))
    return q_D


def std_positive(sums: ColumnSums) -> F64:
    return _std(sums.squares_positive, sums.num_positive, sums.min_positive == sums.max_positive)


def std_negative(sums: ColumnSums) -> F64:
    return _std(sums.squares_negative, sums.num_negative, sums.min_negative == sums.max_negative)


def _std(squares: F64, count: I64, constant: NDArray[np.bool_]) -> F64:
    return np.where(constant & np.isfinite(squares), 0.0, np.sqrt(squares / count))


def linear_act_scale(sums: ColumnSums) -> F64:
    """ω of the map z → ω z + b that carries the positives to the negatives (Linear-AcT; Rodríguez et al., ICLR 2025).

    Least squares of the negatives' quantiles on the positives' over their monotone coupling, ω = Cov(x, y) / Var(x):
    sorted x_i with sorted y_i where both classes are equally many; otherwise each row's mass, 1/P or 1/Q, is split
    at the other class's cuts. Positives that are all equal leave the slope open: ω = 1, and b moves their mean.
    """
    constant = (sums.min_positive == sums.max_positive) | (sums.squares_positive == 0)
    finite = np.isfinite(sums.mean_positive) & np.isfinite(sums.mean_negative)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = sums.cross / (sums.squares_positive / sums.num_positive)
    return np.where(finite, np.where(constant, 1.0, slope), np.nan)


def linear_act_shift(sums: ColumnSums) -> F64:
    """b = ȳ − ω x̄ of `linear_act_scale`'s map: the positives' mean goes to the negatives'."""
    with np.errstate(invalid="ignore"):
        return sums.mean_negative - linear_act_scale(sums) * sums.mean_positive


def _made(of: Callable[[ColumnSums], F64], *, ranks_only: bool = False) -> Statistic:
    return Statistic(of.__name__, "float64", (of.__doc__ or "").partition("\n")[0], of, ranks_only)


def _sum(name: str, summary: str, dtype: str = "float64") -> Statistic:
    return Statistic(name, dtype, summary, attrgetter(name))


# A statistic's place here is its bit in the markers of a store: the order never changes, new statistics come last.
_TABLE = (
    _made(auroc, ranks_only=True),
    _made(auroc_se),
    _made(p_value),
    Statistic(
        "q_value",
        "float64",
        "p-values adjusted over the model (Benjamini & Hochberg 1995)",
        None,
        over_model=("p_value", benjamini_hochberg),
    ),
    _sum("average_precision", "Σ (recall gained) · precision over the thresholds, falling; not interpolated"),
    _sum("mean_positive", "mean of the positives; Mean-AcT needs it and `mean_negative`"),
    _sum("mean_negative", "mean of the negatives"),
    Statistic("std_positive", "float64", "standard deviation of the positives, √(Σ (x − x̄)² / P)", std_positive),
    Statistic("std_negative", "float64", "standard deviation of the negatives, √(Σ (y − ȳ)² / Q)", std_negative),
    _sum("min_positive", "least response of a positive"),
    _sum("min_negative", "least response of a negative"),
    _sum("max_positive", "greatest response of a positive"),
    _sum("max_negative", "greatest response of a negative"),
    _sum("num_distinct", "distinct values among the rows labelled for the concept; −0 is +0", "int64"),
    _made(linear_act_scale),
    _made(linear_act_shift),
)
STATISTICS: dict[str, Statistic] = {s.name: s for s in _TABLE}
