"""Statistics of many columns at once: `auroc` of any array, and every statistic of `scoring/statistics.py`.

The area under the ROC curve is the Mann–Whitney U statistic of the positives, divided by the number of
pairs (Mann & Whitney 1947; Hanley & McNeil 1982):

    AUROC = (2 · #(positive > negative) + #(positive == negative)) / (2 · P · Q)

for P positives and Q negatives. The numerator, 2U, is an integer and is computed as one; the division
is the only rounding. With r the mid-rank among all rows (the mean rank of a run of equal values),
2U = Σ over positives of 2r − P (P + 1): one ranking of the rows serves every concept.

Names by shape: N samples, M neurons (columns), C concepts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aura_dist.errors import InputError, brief
from aura_dist.scoring.column_sums import MAX_ROWS, NOT_LABELLED, ColumnSums, sums_of_columns
from aura_dist.scoring.statistics import STATISTICS, Statistic


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
    labels_array = as_array(labels, "labels")
    labels_CN = _checked_labels(labels_array, values_NM.shape[0])
    _check_both_classes(labels_CN)
    sums = sums_of_columns(values_NM, labels_CN, ranks_only=True)
    if sums.num_nan.any():
        num_nan_M = sums.num_nan[0]
        warnings.warn(
            f"{np.count_nonzero(num_nan_M)} of {num_nan_M.size} columns hold NaN ({num_nan_M.sum()} values); "
            "their AUROC is NaN",
            RuntimeWarning,
            stacklevel=2,
        )
    auroc_CM = _finished(STATISTICS["auroc"], sums)
    return auroc_CM[0] if labels_array.ndim == 1 else auroc_CM


def statistics_by_concept(
    values_NM: NDArray[Any], labels_CN: NDArray[np.int8], names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Statistics of every column for every concept, each concept on the rows labelled for it.

    Parameters
    ----------
    values_NM : [N, M], any real dtype
        Compared in their own dtype: 64-bit numbers are not rounded.
    labels_CN : int8 [C, N]
        1, 0, or −1 for a row that is not labelled and left out for that concept.
    names
        Names in `STATISTICS` of statistics that are made from columns.

    Returns name → [C, M] of the statistic's dtype: NaN or 0, without a warning, where a row that is labelled for the
    concept holds NaN. InputError as in `auroc`, or for too many rows.
    """
    values_NM, labels_CN = _checked_values(values_NM), np.asarray(labels_CN)
    if labels_CN.ndim != 2 or labels_CN.shape[1] != values_NM.shape[0]:
        raise InputError(
            f"labels must be [C, N] with N = {values_NM.shape[0]} as in values, got shape {labels_CN.shape}"
        )
    labels_CN = _checked_classes(labels_CN, lowest=NOT_LABELLED)
    _check_both_classes(labels_CN)
    ranks_only = all(STATISTICS[name].ranks_only for name in names)
    if labels_CN.shape[1] >= MAX_ROWS and not ranks_only:
        raise InputError(f"expected fewer than {MAX_ROWS:,} rows, got {labels_CN.shape[1]:,}; take auroc alone")
    sums = sums_of_columns(values_NM, labels_CN, ranks_only=ranks_only)
    return {name: _finished(STATISTICS[name], sums) for name in names}


def _finished(statistic: Statistic, sums: ColumnSums) -> NDArray[Any]:
    assert statistic.of is not None, statistic.name
    made = np.array(statistic.of(sums), statistic.dtype)
    made[sums.num_nan > 0] = np.nan if made.dtype.kind == "f" else 0
    return made


def _check_both_classes(labels_CN: NDArray[np.int8]) -> None:
    num_positive_C, num_negative_C = (labels_CN == 1).sum(axis=1), (labels_CN == 0).sum(axis=1)
    for c in np.flatnonzero((num_positive_C == 0) | (num_negative_C == 0)):
        raise InputError(
            f"concept {c} has {num_positive_C[c]} positive and {num_negative_C[c]} negative rows; AUROC "
            "needs one of each or more: label more rows, or leave the concept out"
        )


def as_array(given: ArrayLike, name: str) -> NDArray[Any]:
    """What the caller gave, as an array; InputError that names it if NumPy cannot read it."""
    try:
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors that NumPy cannot hold or share
        hint = "a torch tensor as tensor.detach().float().cpu()"
        raise InputError(f"{name} must be an array of numbers, such as {hint}: {brief(error)}") from error


def _checked_values(values: ArrayLike) -> NDArray[Any]:
    values_NM = as_array(values, "values")
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
