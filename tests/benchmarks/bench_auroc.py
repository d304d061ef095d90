"""AUROC per neuron: the compiled way, the plain NumPy way and scikit-learn, side by side on one thread.

    python tests/benchmarks/bench_auroc.py

The three take turns, several times over, and medians are printed, so that other work on the machine falls
on all of them; only the ratios carry over to another machine. scikit-learn and the plain way, being slow,
see the first columns only. Compilation (once per installation, some ten seconds) is left out.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[variable] = "1"  # before NumPy reads them
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402

from aura_dist.scoring.column_sums import sums_plain  # noqa: E402
from aura_dist.scoring.columns import statistics_by_concept  # noqa: E402

Array = NDArray[Any]
NUM_REPETITIONS = 7
PLAIN_COLUMNS, SKLEARN_COLUMNS = 64, 24


@dataclass(frozen=True)
class Case:
    name: str
    num_rows: int
    num_columns: int
    dtype: Any
    num_concepts: int = 1


CASES = (
    Case("bfloat16 values in float32", 2_500, 8_192, ml_dtypes.bfloat16),
    Case("float16", 2_500, 8_192, np.float16),
    Case("any float32", 2_500, 8_192, np.float32),
    Case("bfloat16 values, six concepts", 2_500, 8_192, ml_dtypes.bfloat16, 6),
    Case("any float32, six concepts", 2_500, 8_192, np.float32, 6),
    Case("bfloat16 values in float32", 10_000, 1_024, ml_dtypes.bfloat16),
    Case("any float32", 10_000, 1_024, np.float32),
)


def make_case(case: Case) -> tuple[Array, NDArray[np.int8]]:
    """Normal values, each neuron of its own mean and scale; one row in five is positive, as in the paper."""
    rng = np.random.default_rng(0)
    shape = (case.num_rows, case.num_columns)
    means, scales = rng.uniform(-1, 1, case.num_columns), rng.uniform(0.5, 2, case.num_columns)
    values = (rng.standard_normal(shape, np.float32) * scales + means).astype(case.dtype)
    order = np.stack([rng.permutation(case.num_rows) for _ in range(case.num_concepts)])
    labels_CN = (order < case.num_rows // 5).astype(np.int8)
    return values if case.dtype == np.float16 else values.astype(np.float32), labels_CN


def sklearn_auroc(values: Array, labels_CN: NDArray[np.int8]) -> Array:
    """As it is called for many columns: the label repeated, one 'multilabel' call a concept."""
    repeat = values.shape[1]
    return np.stack(
        [roc_auc_score(np.repeat(labels[:, None], repeat, axis=1), values, average=None) for labels in labels_CN]
    )


def plain_auroc(values: Array, labels_CN: NDArray[np.int8]) -> Array:
    sums = sums_plain(values, labels_CN, ranks_only=True)
    result: Array = sums.twice_u / (2 * sums.num_positive * sums.num_negative)
    return result


def fast_auroc(values: Array, labels_CN: NDArray[np.int8]) -> Array:
    return statistics_by_concept(values, labels_CN, ["auroc"])["auroc"]


def median_us(calls: dict[str, tuple[Callable[[], Array], int]]) -> dict[str, float]:
    """Median microseconds per neuron of each call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(NUM_REPETITIONS):
        for name, (call, num_columns) in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) / num_columns * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def run_case(case: Case) -> str:
    values, labels_CN = make_case(case)
    some, few = values[:, :PLAIN_COLUMNS].copy(), values[:, :SKLEARN_COLUMNS].copy()
    fast = fast_auroc(values, labels_CN)  # compiles, and is checked before it is timed
    np.testing.assert_array_equal(fast[:, :PLAIN_COLUMNS], plain_auroc(some, labels_CN))
    np.testing.assert_allclose(fast[:, :SKLEARN_COLUMNS], sklearn_auroc(few, labels_CN), rtol=0, atol=1e-12)
    us = median_us(
        {
            "fast": (lambda: fast_auroc(values, labels_CN), case.num_columns),
            "plain": (lambda: plain_auroc(some, labels_CN), PLAIN_COLUMNS),
            "sklearn": (lambda: sklearn_auroc(few, labels_CN), SKLEARN_COLUMNS),
        }
    )
    ratios = f"{us['plain'] / us['fast']:8.1f} {us['sklearn'] / us['fast']:10.1f}"
    sizes = f"{case.name:30} {case.num_rows:6} {case.num_columns:7}"
    return f"{sizes} {us['fast']:9.1f} {us['plain']:9.1f} {us['sklearn']:9.1f} {ratios}"


def main() -> None:
    print(f"µs per neuron (all concepts), one thread, median of {NUM_REPETITIONS}, compilation left out")
    head = f"{'values':30} {'rows':>6} {'neurons':>7} {'fast':>9} {'plain':>9} {'sklearn':>9}"
    print(f"{head} {'× plain':>8} {'× sklearn':>10}")
    for case in CASES:
        print(run_case(case), flush=True)


if __name__ == "__main__":
    main()
