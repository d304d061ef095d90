"""The sums that every statistic of a neuron is made of: one plain and one fast way to them.

With a_i = 2 · #(negatives below positive i) + #(negatives equal to it), and b_j the same for negative j among the
positives: Σ a = 2U, and the spread of a and of b is the variance of the AUROC (see `statistics`). a and b are whole
numbers and summed as such, centred on Q and P, which is where they are if the classes do not differ.

Names by shape: N samples, M neurons (columns), C concepts, P positives and Q negatives of a concept.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOT_LABELLED = -1
# The largest bits, sign left out, that are a number and not NaN.
FLOAT32_INFINITY, FLOAT16_INFINITY = 0x7F800000, 0x7C00
# Keys that the kernel holds of the columns that it gathers at once.
SCRATCH_KEYS = 1 << 22
# Values converted at once, where they are not float32 in C order already.
CONVERTED_VALUES = 1 << 23
# Sums of squared ranks of more rows do not fit into 64 bits.
MAX_ROWS = 1 << 21

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class ColumnSums:
    """Sums of every concept and column, [C, M] each; `num_positive` and `num_negative` are [C, 1].

    Where ranks alone were asked for, `twice_u` and `num_nan` are made; the others may be 0 or NaN.
    """

    num_positive: I64
    num_negative: I64
    twice_u: I64  # 2U = #(positive > negative) · 2 + #(positive == negative)
    num_nan: I64  # NaN among the rows labelled for the concept; where it is not 0 the other sums have no meaning
    squared_above: I64  # Σ (a − Q)² over the positives
    squared_below: I64  # Σ (b − P)² over the negatives
    num_distinct: I64  # distinct values among the rows labelled for the concept
    ties: F64  # Σ (t³ − t) over the distinct values, t the rows that hold one
    average_precision: F64  # Σ over the thresholds, falling, of (recall gained) · precision
    mean_positive: F64
    mean_negative: F64
    squares_positive: F64  # sum of squared deviations from the mean
    squares_negative: F64
    min_positive: F64
    min_negative: F64
    max_positive: F64
    max_negative: F64
    cross: F64  # E[(x − x̄)(y − ȳ)] of positives x and negatives y under their monotone coupling


# The sums that are whole numbers, and those that are not; ranks alone make the first two of the whole ones.
_NAMES = tuple(field.name for field in fields(ColumnSums))
NUM_RANK_SUMS, WHOLE_SUMS, REAL_SUMS = 2, _NAMES[2:7], _NAMES[7:]


def sums_of_columns(values_NM: NDArray[Any], labels_CN: NDArray[np.int8], *, ranks_only: bool) -> ColumnSums:
    """The sums of every column for every concept: the fast way where float32 holds all values of the dtype.

    Values are [N, M] of any real dtype. Labels are 1, 0, or −1 for a row that is left out for that concept; every
    concept has both classes. `ranks_only`: whether `twice_u` and `num_nan` suffice.
    """
    fits = np.can_cast(values_NM.dtype, np.float32)  # bfloat16 does too
    return (sums_fast if fits else sums_plain)(values_NM, labels_CN, ranks_only=ranks_only)


def sums_fast(values_NM: NDArray[Any], labels_CN: NDArray[np.int8], *, ranks_only: bool = False) -> ColumnSums:
    """By the compiled kernel: one ordering of a column serves all concepts. Values must fit in float32.

    Where ranks suffice, and all concepts label the same rows, the kernel ranks the rows and makes no other sum.
    """
    from aura_dist.scoring.kernels import column_sums  # numba takes as long to load as many verbs to run

    num_columns = values_NM.shape[1]
    is_positive_N = (labels_CN == 1).any(axis=0)
    is_negative_N = (labels_CN != NOT_LABELLED).any(axis=0) & ~is_positive_N
    rows_K = np.concatenate([np.flatnonzero(is_positive_N), np.flatnonzero(is_negative_N)])
    labels_CK = labels_CN[:, rows_K]
    positives, starts_P = _where(labels_CK == 1)
    unlabelled, starts_U = _where(labels_CK == NOT_LABELLED)
    ranks_only = ranks_only and not unlabelled.size
    num_whole, num_real = (NUM_RANK_SUMS, 0) if ranks_only else (len(WHOLE_SUMS), len(REAL_SUMS))
    whole = np.empty((num_whole, len(labels_CN), num_columns), np.int64)
    real = np.empty((num_real, len(labels_CN), num_columns), np.float64)
    in_place = values_NM.dtype == np.float32 and values_NM.dtype.isnative and values_NM.flags.c_contiguous
    step = max(1, num_columns if in_place else CONVERTED_VALUES // max(1, len(values_NM)))
    for first in range(0, num_columns if rows_K.size else 0, step):
        block = slice(first, first + step)
        bits_NM, nan_above, is_half = _float_bits(values_NM[:, block])
        whole[..., block], real[..., block] = column_sums(
            bits_NM, nan_above, is_half, ranks_only,
            rows_K, int(is_positive_N.sum()), positives, starts_P, unlabelled, starts_U,
        )  # fmt: skip
    return _gathered(labels_CN, whole, real)


def _float_bits(values_NM: NDArray[Any]) -> tuple[NDArray[np.uint32], int, bool]:
    """Bits, uint32 [N, M], that order as float32 and as the values do; those above which they are NaN; if float16."""
    is_half = values_NM.dtype == np.float16 and values_NM.dtype.isnative
    if is_half:
        # In the upper half of a word they are 16-bit keys, which are counted instead of sorted.
        bits_NM = np.left_shift(values_NM.view(np.uint16), 16, dtype=np.uint32, order="C")
        infinity = FLOAT16_INFINITY << 16
    else:
        bits_NM = np.require(values_NM, np.float32, ["C", "ALIGNED"]).view(np.uint32)
        infinity = FLOAT32_INFINITY
    bits_NM.flags.writeable = False  # a writable array is another type, for which numba would compile again
    return bits_NM, infinity, bool(is_half)


def _where(mask_CK: NDArray[np.bool_]) -> tuple[I64, I64]:
    starts = np.concatenate([[0], np.cumsum(np.count_nonzero(mask_CK, axis=1))]).astype(np.int64)
    return np.nonzero(mask_CK)[1], starts


def _gathered(labels_CN: NDArray[np.int8], whole: I64, real: F64) -> ColumnSums:
    """The sums by name, [C, M] each; those that were not made are 0 or NaN, and take no memory."""
    counts = ((labels_CN == value).sum(axis=1, keepdims=True, dtype=np.int64) for value in (1, 0))
    shape = whole.shape[1:]
    no_whole = [np.broadcast_to(np.int64(0), shape)] * (len(WHOLE_SUMS) - len(whole))
    no_real = [np.broadcast_to(np.nan, shape)] * (len(REAL_SUMS) - len(real))
    return ColumnSums(*counts, *whole, *no_whole, *real, *no_real)


def sums_plain(values_NM: NDArray[Any], labels_CN: NDArray[np.int8], *, ranks_only: bool = False) -> ColumnSums:
    """In NumPy, column by column and by the definitions, in the dtype of the values.

    The reference for `sums_fast`, and the way for dtypes that float32 cannot hold. Values are compared in their own
    dtype; means, deviations, extremes and the coupling are in float64.
    """
    shape = (len(labels_CN), values_NM.shape[1])
    whole = np.zeros((NUM_RANK_SUMS if ranks_only else len(WHOLE_SUMS), *shape), np.int64)
    real = np.full((0 if ranks_only else len(REAL_SUMS), *shape), np.nan)
    for c, labels_N in enumerate(labels_CN):
        for m in range(shape[1]):
            positives, negatives = (np.sort(values_NM[labels_N == value, m]) for value in (1, 0))
            num_nan = sum(np.count_nonzero(v != v) for v in (positives, negatives))
            if num_nan:
                whole[1, c, m] = num_nan
            elif ranks_only:
                whole[0, c, m] = _twice_below(negatives, positives).sum()
            else:
                whole[:, c, m], real[:, c, m] = _column_plain(positives, negatives)
    return _gathered(labels_CN, whole, real)


def _twice_below(others: NDArray[Any], values: NDArray[Any]) -> I64:
    """For each of `values` 2 · #(others below it) + #(others equal to it); `others` are sorted."""
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")).astype(np.int64)


def _column_plain(x_P: NDArray[Any], y_Q: NDArray[Any]) -> tuple[list[int], list[float]]:
    """`WHOLE_SUMS` and `REAL_SUMS` of one column from its classes, each sorted."""
    above, below = _twice_below(y_Q, x_P), _twice_below(x_P, y_Q)
    distinct, sizes = np.unique(np.concatenate([x_P, y_Q]), return_counts=True)
    not_below = len(x_P) - np.searchsorted(x_P, distinct, "left")  # positives at or above each threshold
    at_threshold = not_below - np.append(not_below[1:], 0)
    precision = not_below / (not_below + len(y_Q) - np.searchsorted(y_Q, distinct, "left"))
    whole = [
        int(above.sum()),
        0,
        int(((above - len(y_Q)) ** 2).sum()),
        int(((below - len(x_P)) ** 2).sum()),
        len(distinct),
    ]
    x, y = x_P.astype(np.float64), y_Q.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # infinities make NaN, as they should
        x_mean, y_mean = x.mean(), y.mean()
        squares = [float(np.square(v - mean).sum()) for v, mean in ((x, x_mean), (y, y_mean))]
        cross = _cross_plain(x - x_mean, y - y_mean)
    sizes = sizes.astype(np.float64)
    ties, ap = (sizes * (sizes**2 - 1)).sum(), (at_threshold * precision).sum() / len(x)
    return whole, [ties, ap, x_mean, y_mean, *squares, x[0], y[0], x[-1], y[-1], cross]


def _cross_plain(x_P: F64, y_Q: F64) -> float:
    """E[x y] under the monotone coupling: both quantile functions are constant between the cuts i/P and j/Q."""
    num_x, num_y = len(x_P), len(y_Q)
    cuts = np.union1d(np.arange(num_x + 1) * num_y, np.arange(num_y + 1) * num_x)  # in units of 1 / (P Q)
    pieces = ((b - a) * x_P[a // num_y] * y_Q[a // num_x] for a, b in pairwise(cuts.tolist()))
    return float(sum(pieces)) / (num_x * num_y)


# Memory of a worker's process before it has work: Python, NumPy, Zarr, Dask, the compiled kernels.
WORKER_BYTES = 300_000_000


def scoring_bytes(num_rows: int, num_columns: int, item_bytes: int, num_concepts: int, num_threads: int = 1) -> int:
    """Bytes that a worker needs to score chunk columns, `num_threads` at once; `--memory-limit` must be as large.

    They are a chunk column as it was read, an eighth of it for the chunks being decoded, values converted for the
    kernel where they are not float32, the kernel's scratch, and the sums of every statistic.
    """
    values = num_rows * num_columns * item_bytes
    converted = 0 if item_bytes == 4 else 4 * min(CONVERTED_VALUES, num_rows * num_columns)
    scratch = 4 * SCRATCH_KEYS + 80 * num_rows
    sums = 3 * 8 * (len(WHOLE_SUMS) + len(REAL_SUMS)) * num_concepts * num_columns
    return WORKER_BYTES + num_threads * (values + values // 8 + converted + scratch + sums)
