"""The statistics of `scoring/statistics.py`, made of many columns for every concept.

Names by shape: N samples, M neurons (columns), C concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aura_dist.errors import InputError
from aura_dist.scoring.auroc import NOT_LABELLED, check_by_concept, score_checked
from aura_dist.scoring.column_sums import MAX_ROWS, ColumnSums, sums_fast, sums_plain
from aura_dist.scoring.statistics import STATISTICS, Statistic


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
        Of `STATISTICS`, those that are made from columns.

    Returns
    -------
    name → [C, M] of the statistic's dtype

    Raises
    ------
    InputError
        Values or labels of another shape or dtype, a label other than 1, 0 and −1, a concept with one class, or
        too many rows.
    """
    values_NM, labels_CN = check_by_concept(values_NM, labels_CN)
    one_ranking = bool(((labels_CN == NOT_LABELLED).any(axis=0) == (labels_CN == NOT_LABELLED).all(axis=0)).all())
    if set(names) == {"auroc"} and one_ranking:
        return {"auroc": score_checked(values_NM, labels_CN)[0]}
    if labels_CN.shape[1] >= MAX_ROWS:
        raise InputError(f"expected fewer than {MAX_ROWS:,} rows, got {labels_CN.shape[1]:,}; take auroc alone")
    fits = np.can_cast(values_NM.dtype, np.float32)
    sums = (sums_fast if fits else sums_plain)(values_NM, labels_CN)
    return {name: _finished(STATISTICS[name], sums) for name in names}


def _finished(statistic: Statistic, sums: ColumnSums) -> NDArray[Any]:
    assert statistic.of is not None, statistic.name
    made = np.array(statistic.of(sums), statistic.dtype)
    made[sums.num_nan > 0] = np.nan if made.dtype.kind == "f" else 0
    return made
