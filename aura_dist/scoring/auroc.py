"""AUROC of many columns at once: exact, with ties at mid-rank.

The area under the ROC curve is the Mann–Whitney U statistic of the positives, divided by the number of
pairs (Mann & Whitney 1947; Hanley & McNeil 1982):

    AUROC = (2 · #(positive > negative) + #(positive == negative)) / (2 · P · Q)

for P positives and Q negatives. The numerator, 2U, is an integer and is computed as one; the division
is the only rounding. With r the mid-rank among all rows (the mean rank of a run of equal values),
2U = Σ over positives of 2r − P (P + 1): one ranking of the rows serves every concept.

Names by shape: N samples, M neurons (columns), C concepts, K the rows labelled for some concepts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aura_dist.errors import InputError, brief
from aura_dist.scoring.auroc_kernels import twice_rank_sums

NOT_LABELLED = -1
# The largest bits, sign left out, that are a number and not NaN.
FLOAT32_INFINITY, FLOAT16_INFINITY = 0x7F800000, 0x7C00
# Columns converted at once, where the values are not float32 in C order already.
CONVERTED_COLUMNS = 512


@dataclass(frozen=True)
class _Group:
    """Concepts that are labelled on the same rows, so that one ranking serves them all."""

    concepts: NDArray[np.int64]  # [G] which of the C concepts
    rows_K: NDArray[np.int64]  # labelled rows; those positive for some concept first
    num_ranked: int  # how many rows that is
    is_positive_GK: NDArray[np.bool_]


def auroc(values: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Exact AUROC of every column, ties at mid-rank.

    Parameters
    ----------
    values : [N, M], any real dtype
        One column per neuron. Compared in their own dtype: 64-bit integers are not rounded, −0 equals +0,
        infinities are ordinary values.
    labels : [N] or [N, C], bool or integers 0 and 1
        One column per concept.

    Returns
    -------
    float64 [M], or [C, M] for labels [N, C]
        NaN in a column that holds NaN.

    Raises
    ------
    InputError
        Values or labels of another shape or dtype, a label other than 0 and 1, or a concept with one class.

    Warns
    -----
    RuntimeWarning
        Once, with the number of columns that hold NaN and of their NaN values.
    """
    values_NM = _checked_values(values)
    labels_array = _as_array(labels, "labels")
    labels_CN = _checked_labels(labels_array, values_NM.shape[0])
    _check_both_classes(labels_CN)
    auroc_CM, num_nan_CM = score_checked(values_NM, labels_CN)
    if num_nan_CM.any():
        num_nan_M = num_nan_CM[0]
        warnings.warn(
            f"{np.count_nonzero(num_nan_M)} of {num_nan_M.size} columns hold NaN ({num_nan_M.sum()} values); "
            "their AUROC is NaN",
            RuntimeWarning,
            stacklevel=2,
        )
    return auroc_CM[0] if labels_array.ndim == 1 else auroc_CM


def auroc_by_concept(values_NM: NDArray[Any], labels_CN: NDArray[np.int8]) -> NDArray[np.float64]:
    """Exact AUROC of every column for every concept, each concept on the rows labelled for it.

    Parameters
    ----------
    values_NM : [N, M], any real dtype
    labels_CN : int8 [C, N]
        1, 0, or −1 for a row that is not labelled and left out for that concept.

    Returns
    -------
    float64 [C, M]
        NaN, without a warning, where a row that is labelled for the concept holds NaN.

    Raises
    ------
    InputError
        Values or labels of another shape or dtype, a label other than 1, 0 and −1, or a concept with one
        class.
    """
    return score_checked(*check_by_concept(values_NM, labels_CN))[0]


def check_by_concept(values_NM: NDArray[Any], labels_CN: NDArray[np.int8]) -> tuple[NDArray[Any], NDArray[np.int8]]:
    """Values [N, M] and labels int8 [C, N] (1, 0, −1) as given; InputError as of `auroc_by_concept`."""
    values_NM, labels_CN = _checked_values(values_NM), np.asarray(labels_CN)
    if labels_CN.ndim != 2 or labels_CN.shape[1] != values_NM.shape[0]:
        raise InputError(
            f"labels must be [C, N] with N = {values_NM.shape[0]} as in values, got shape {labels_CN.shape}"
        )
    labels_CN = _checked_classes(labels_CN, lowest=NOT_LABELLED)
    _check_both_classes(labels_CN)
    return values_NM, labels_CN


def _check_both_classes(labels_CN: NDArray[np.int8]) -> None:
    num_positive_C, num_negative_C = (labels_CN == 1).sum(axis=1), (labels_CN == 0).sum(axis=1)
    for c in np.flatnonzero((num_positive_C == 0) | (num_negative_C == 0)):
        raise InputError(
            f"concept {c} has {num_positive_C[c]} positive and {num_negative_C[c]} negative rows; AUROC "
            "needs one of each or more: label more rows, or leave the concept out"
        )


def score_checked(
    values_NM: NDArray[Any], labels_CN: NDArray[np.int8]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """AUROC, float64 [C, M], and the NaN among the rows labelled for a concept, int64 [C, M]."""
    num_positive_C, num_negative_C = (labels_CN == 1).sum(axis=1), (labels_CN == 0).sum(axis=1)
    # The fast way takes dtypes whose values all are float32 numbers, bfloat16 among them.
    twice_u = twice_u_fast if np.can_cast(values_NM.dtype, np.float32) else twice_u_plain
    shape = (labels_CN.shape[0], values_NM.shape[1])
    auroc_CM, num_nan_CM = np.empty(shape, np.float64), np.zeros(shape, np.int64)
    for group in _groups(labels_CN):
        twice_u_GM, num_nan_M = twice_u(values_NM, group)
        num_pairs_G = num_positive_C[group.concepts] * num_negative_C[group.concepts]
        auroc_CM[group.concepts] = twice_u_GM / (2 * num_pairs_G[:, None])
        num_nan_CM[group.concepts] = num_nan_M
    auroc_CM[num_nan_CM > 0] = np.nan
    return auroc_CM, num_nan_CM


def _groups(labels_CN: NDArray[np.int8]) -> Iterator[_Group]:
    concepts_by_mask: dict[bytes, list[int]] = {}
    for c, is_labelled_N in enumerate(labels_CN != NOT_LABELLED):
        concepts_by_mask.setdefault(is_labelled_N.tobytes(), []).append(c)
    for concepts in concepts_by_mask.values():
        is_labelled_N = labels_CN[concepts[0]] != NOT_LABELLED
        is_ranked_N = (labels_CN[concepts] == 1).any(axis=0)
        ranked, others = np.flatnonzero(is_ranked_N), np.flatnonzero(is_labelled_N & ~is_ranked_N)
        rows_K = np.concatenate([ranked, others])
        yield _Group(np.array(concepts), rows_K, ranked.size, labels_CN[concepts][:, rows_K] == 1)


def twice_u_plain(values_NM: NDArray[Any], group: _Group) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """2U, int64 [G, M], and NaN per column, int64 [M], in NumPy and in the dtype of the values.

    The reference for `twice_u_fast`, and the way for dtypes that float32 cannot hold.
    """
    num_columns = values_NM.shape[1]
    twice_u_GM = np.zeros((len(group.concepts), num_columns), np.int64)
    num_nan_M = np.zeros(num_columns, np.int64)
    for m in range(num_columns):
        column_K = values_NM[group.rows_K, m]
        num_nan_M[m] = np.count_nonzero(column_K != column_K)
        for g, is_positive_K in enumerate(group.is_positive_GK):
            positives, negatives = column_K[is_positive_K], np.sort(column_K[~is_positive_K])
            # The sum of both counts a tie once and any other negative below a positive twice.
            below = np.searchsorted(negatives, positives, side="left").sum()
            not_above = np.searchsorted(negatives, positives, side="right").sum()
            twice_u_GM[g, m] = below + not_above
    return twice_u_GM, num_nan_M


def twice_u_fast(values_NM: NDArray[Any], group: _Group) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """2U, int64 [G, M], and NaN per column, int64 [M], by the compiled kernel; values that fit in float32."""
    num_positive_G = np.count_nonzero(group.is_positive_GK, axis=1).astype(np.int64)
    positives = np.nonzero(group.is_positive_GK)[1]
    starts = np.concatenate([[0], np.cumsum(num_positive_G)])
    twice_u_GM = np.empty((num_positive_G.size, values_NM.shape[1]), np.int64)
    num_nan_M = np.empty(values_NM.shape[1], np.int64)
    in_place = values_NM.dtype == np.float32 and values_NM.dtype.isnative and values_NM.flags.c_contiguous
    step = max(1, values_NM.shape[1]) if in_place else CONVERTED_COLUMNS
    for first in range(0, values_NM.shape[1], step):
        block = slice(first, first + step)
        bits_NM, nan_above, _ = float_bits(values_NM[:, block])
        sums_GM, num_nan_M[block] = twice_rank_sums(
            bits_NM, nan_above, group.rows_K, group.num_ranked, positives, starts
        )
        twice_u_GM[:, block] = sums_GM - (num_positive_G * (num_positive_G + 1))[:, None]
    return twice_u_GM, num_nan_M


def float_bits(values_NM: NDArray[Any]) -> tuple[NDArray[np.uint32], int, bool]:
    """Bits, uint32 [N, M], that order as float32 and as the values do; those above which they are NaN; if float16."""
    is_half = values_NM.dtype == np.float16 and values_NM.dtype.isnative
    if is_half:
        # In the upper half of a word they are 16-bit keys, which are counted instead of sorted.
        bits_NM = np.left_shift(values_NM.view(np.uint16), 16, dtype=np.uint32, order="C")
        infinity = FLOAT16_INFINITY << 16
    else:
        bits_NM = np.require(values_NM, np.float32, ["C", "ALIGNED"]).view(np.uint32)
        infinity = FLOAT32_INFINITY
    bits_NM.flags.writeable = False  # a writable array is another type to the compiler: compiled once more
    return bits_NM, infinity, bool(is_half)


def _as_array(given: ArrayLike, name: str) -> NDArray[Any]:
    try:
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors that NumPy cannot hold or share
        hint = "a torch tensor as tensor.detach().float().cpu()"
        raise InputError(f"{name} must be an array of numbers, such as {hint}: {brief(error)}") from error


def _checked_values(values: ArrayLike) -> NDArray[Any]:
    values_NM = _as_array(values, "values")
    if values_NM.ndim != 2:
        raise InputError(f"values must be [N, M], got shape {values_NM.shape}; one column is values[:, None]")
    # ml_dtypes' numbers (bfloat16) are of kind V but cast to float32; records do not.
    if values_NM.dtype.kind not in "biuf" and not np.can_cast(values_NM.dtype, np.float32):
        raise InputError(f"values must be real numbers, got dtype {values_NM.dtype}")
    return values_NM


def _checked_labels(labels: NDArray[Any], num_rows: int) -> NDArray[np.int8]:
    """Labels [N] or [N, C] as int8 [C, N] of 0 and 1."""
    if labels.ndim not in (1, 2) or labels.shape[0] != num_rows:
        expected = f"[N] or [N, C] with N = {num_rows} as in values"
        raise InputError(f"labels must be {expected}, got shape {labels.shape}")
    return _checked_classes(labels[None, :] if labels.ndim == 1 else labels.T, lowest=0)


def _checked_classes(labels_CN: NDArray[Any], lowest: int) -> NDArray[np.int8]:
    """Labels as int8, all of them between `lowest` and 1."""
    expected = "bool or integers 0 and 1" if lowest == 0 else "integers 1, 0 and −1 (not labelled)"
    if labels_CN.dtype.kind not in "biu":
        first = "".join(f", first value {value!r}" for value in labels_CN.ravel()[:1].tolist())
        raise InputError(f"labels must be {expected}, got dtype {labels_CN.dtype}{first}")
    wrong_CN = (labels_CN < lowest) | (labels_CN > 1)
    if wrong_CN.any():
        c, n = np.argwhere(wrong_CN)[0]
        raise InputError(f"labels must be {expected}, got {labels_CN[c, n]} in row {n} of concept {c}")
    return labels_CN.astype(np.int8)
