"""Percentile bootstrap (Efron and Tibshirani, 1993), seeded and vectorised."""

import numpy as np
from numpy.typing import NDArray

NUM_DRAWS = 2000
LEVELS = (0.025, 0.975)
_MAX_INDICES = 4_000_000


def bootstrap_means(table_PM: NDArray[np.float64], seed: int, num_draws: int = NUM_DRAWS) -> NDArray[np.float64]:
    """[num_draws, M] means over P rows drawn with replacement; the rows drawn depend on P and the seed alone."""
    rng, num_rows = np.random.default_rng(seed), len(table_PM)
    block = max(1, _MAX_INDICES // max(1, num_rows))  # bounds the memory of the indices
    means = [
        table_PM[rng.integers(0, num_rows, (min(block, num_draws - start), num_rows))].mean(axis=1)
        for start in range(0, num_draws, block)
    ]
    return np.concatenate(means)


def interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of draws, by order statistics: infinite ones do no harm, one that is no number spoils it."""
    if np.isnan(draws).any():
        return float("nan"), float("nan")
    low, high = np.quantile(draws, LEVELS, method="inverted_cdf")
    return float(low), float(high)
