"""Compiled kernel behind `aura_dist.scoring.column_statistics`: one sort of a column, then every sum for every concept.

A sorted column is kept as its *runs*: the distinct values in ascending order, how many rows hold each, and the
run of every row. A concept then needs two counts a run, positives and negatives; all of its sums are taken in one
walk over the runs and one merge of the two classes. Rows that a concept does not label are taken out of its
counts, so that concepts with different labelled rows share the sort.

Names by shape: K rows ranked, M columns (neurons), C concepts, R runs of one column.
"""

from __future__ import annotations

import numpy as np
from numpy import int32

from aura_dist.scoring.auroc_kernels import (
    BLOCK_SIZE,
    DIGIT_BITS,
    I64,
    MAX_WIDTH,
    MIN_WIDTH,
    SCRATCH_KEYS,
    TABLE_SIZE,
    U32,
    gather,
    jit,
    sort_pairs,
    to_keys,
)
from aura_dist.scoring.run_kernels import F64, I32, runs_by_counting, runs_of_sorted, values_of_runs

# Rows of the two results of `column_sums`.
WHOLE_SUMS = ("twice_u", "squared_above", "squared_below", "num_distinct", "num_nan")
REAL_SUMS = (
    "ties", "average_precision", "mean_positive", "mean_negative", "squares_positive", "squares_negative",
    "min_positive", "min_negative", "max_positive", "max_negative", "cross",
)  # fmt: skip
_NUM_WHOLE, _NUM_REAL = len(WHOLE_SUMS), len(REAL_SUMS)


@jit
def _walk(
    pos_R: I32, rest_R: I32, num_runs: int, values_R: F64, whole: I64, real: F64, x_R: F64, y_R: F64, p_R: I32, q_R: I32
) -> tuple[int, int]:
    """Sums over one concept's runs in ascending order; its classes' own runs, and how many each has.

    `pos_R` counts the positives of each run and `rest_R` its labelled rows.
    """
    num_positive = num_labelled = np.int64(0)
    for r in range(num_runs):
        num_positive += pos_R[r]
        num_labelled += rest_R[r]
    num_negative = num_labelled - num_positive
    below_p = below_q = twice_u = above_aa = below_bb = num_distinct = np.int64(0)
    ties = precision = 0.0
    num_x = num_y = 0
    for r in range(num_runs):
        p, t = np.int64(pos_R[r]), np.int64(rest_R[r])
        q = t - p
        # Twice the mid-rank of a row among the other class, centred, so that its square stays small.
        a, b = 2 * below_q + q - num_negative, 2 * below_p + p - num_positive
        twice_u += p * a
        above_aa += p * a * a
        below_bb += q * b * b
        num_distinct += t > 0
        size = float(t)
        ties += size * (size * size - 1.0)
        left = num_labelled - below_p - below_q  # 0 where the last runs hold nothing but what is not labelled
        precision += float(p * (num_positive - below_p)) / float(left + (left == 0))
        x_R[num_x], p_R[num_x] = values_R[r], int32(p)
        num_x += int(p > 0)
        y_R[num_y], q_R[num_y] = values_R[r], int32(q)
        num_y += int(q > 0)
        below_p += p
        below_q += q
    whole[0], whole[1], whole[2], whole[3] = twice_u + num_positive * num_negative, above_aa, below_bb, num_distinct
    real[0], real[1] = ties, precision / float(num_positive)
    return num_x, num_y


@jit
def _moments(x_R: F64, p_R: I32, num_runs: int) -> tuple[float, float]:
    """Mean of a class and its sum of squared deviations, in two passes."""
    count, total = np.int64(0), 0.0
    for r in range(num_runs):
        count += p_R[r]
        total += p_R[r] * x_R[r]
    mean, squares = total / count, 0.0
    for r in range(num_runs):
        squares += p_R[r] * ((x_R[r] - mean) * (x_R[r] - mean))
    return mean, squares


@jit
def _cross(x_R: F64, p_R: I32, num_x: int, mean_x: float, y_R: F64, q_R: I32, num_y: int, mean_y: float) -> float:
    """Covariance of the classes under their monotone coupling: E[(x − x̄)(y − ȳ)], x and y rising together.

    Each class has mass 1, spread evenly over its rows; in units of 1 / (P Q) all masses are whole numbers.
    """
    num_positive = num_negative = np.int64(0)
    for r in range(num_x):
        num_positive += p_R[r]
    for r in range(num_y):
        num_negative += q_R[r]
    i = j = 0
    left_x, left_y, total = p_R[0] * num_negative, q_R[0] * num_positive, 0.0
    while True:
        mass = min(left_x, left_y)
        total += mass * ((x_R[i] - mean_x) * (y_R[j] - mean_y))
        left_x -= mass
        left_y -= mass
        if left_x == 0:
            i += 1
            if i == num_x:
                return float(total / (float(num_positive) * float(num_negative)))
            left_x = p_R[i] * num_negative
        if left_y == 0:
            j += 1
            left_y = q_R[j] * num_positive


@jit
def column_sums(
    bits_NM: U32,
    nan_above: int,
    is_half: bool,
    rows_K: I64,
    positives: I64,
    starts_P: I64,
    unlabelled: I64,
    starts_U: I64,
) -> tuple[I64, F64]:
    """Every sum of every concept and column.

    Parameters
    ----------
    bits_NM : uint32 [N, M], C order
        Values as the bits of float32 numbers; of float16 numbers in the upper half if `is_half`.
    nan_above : int
        Bits without the sign above this are NaN.
    rows_K : int64 [K]
        Rows that some concept labels. 0 < K < 2**21, so that sums of squared ranks fit.
    positives, starts_P : int64 [·], int64 [C + 1]
        The positives of concept c are rows_K[positives[starts_P[c] : starts_P[c + 1]]]; at least one.
    unlabelled, starts_U : int64 [·], int64 [C + 1]
        The rows of rows_K that concept c does not label, likewise; they leave it a negative.

    Returns
    -------
    whole : int64 [len(WHOLE_SUMS), C, M]
    real : float64 [len(REAL_SUMS), C, M]
        Without meaning where `num_nan` is not 0.
    """
    num_rows, num_columns, num_concepts = rows_K.size, bits_NM.shape[1], starts_P.size - 1
    whole_SCM = np.zeros((_NUM_WHOLE, num_concepts, num_columns), np.int64)
    real_SCM = np.zeros((_NUM_REAL, num_concepts, num_columns), np.float64)
    max_width = max(MIN_WIDTH, min(MAX_WIDTH, SCRATCH_KEYS // num_rows))
    columns_WK = np.empty((max_width, num_rows), np.uint32)
    table, block_used = np.zeros(TABLE_SIZE, np.uint32), np.zeros(TABLE_SIZE // BLOCK_SIZE, np.bool_)
    pairs_K, spare_K = np.empty(num_rows, np.uint64), np.empty(num_rows, np.uint64)
    counts = np.empty(1 << DIGIT_BITS, np.uint32)
    run_K = np.empty(num_rows, np.int32)
    # One place more than there can be runs: some loops write a place before they know whether it is kept.
    keys_R, values_R = np.empty(num_rows + 1, np.uint32), np.empty(num_rows + 1, np.float64)
    nan_R, all_R = np.empty(num_rows + 1, np.bool_), np.empty(num_rows + 1, np.int32)
    pos_R, rest_R = np.empty(num_rows + 1, np.int32), np.empty(num_rows + 1, np.int32)
    x_R, y_R = np.empty(num_rows + 1, np.float64), np.empty(num_rows + 1, np.float64)
    p_R, q_R = np.empty(num_rows + 1, np.int32), np.empty(num_rows + 1, np.int32)
    whole, real = np.empty(_NUM_WHOLE, np.int64), np.empty(_NUM_REAL, np.float64)
    for first in range(0, num_columns, max_width):
        width = min(max_width, num_columns - first)
        gather(bits_NM, rows_K, first, width, columns_WK)
        for j in range(width):
            num_nan, short = to_keys(columns_WK[j], nan_above)
            if short:
                num_runs = runs_by_counting(columns_WK[j], table, block_used, run_K, keys_R, all_R)
            else:
                sort_pairs(columns_WK[j], pairs_K, spare_K, counts)
                num_runs = runs_of_sorted(pairs_K, run_K, keys_R, all_R)
            values_of_runs(keys_R, num_runs, nan_above, is_half, values_R, nan_R)
            for c in range(num_concepts):
                pos_R[:num_runs] = int32(0)
                rest_R[:num_runs] = all_R[:num_runs]
                for i in range(starts_P[c], starts_P[c + 1]):
                    pos_R[run_K[positives[i]]] += int32(1)
                for i in range(starts_U[c], starts_U[c + 1]):
                    rest_R[run_K[unlabelled[i]]] -= int32(1)
                num_x, num_y = _walk(pos_R, rest_R, num_runs, values_R, whole, real, x_R, y_R, p_R, q_R)
                whole[4] = 0
                if num_nan:
                    for r in range(num_runs):
                        whole[4] += rest_R[r] if nan_R[r] else 0
                real[2], real[4] = _moments(x_R, p_R, num_x)
                real[3], real[5] = _moments(y_R, q_R, num_y)
                real[6], real[7], real[8], real[9] = x_R[0], y_R[0], x_R[num_x - 1], y_R[num_y - 1]
                real[10] = _cross(x_R, p_R, num_x, real[2], y_R, q_R, num_y, real[3])
                whole_SCM[:, c, first + j] = whole
                real_SCM[:, c, first + j] = real
    return whole_SCM, real_SCM
