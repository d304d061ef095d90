"""Checks of labelled text: texts that a tokenizer can take, and labels 1, 0 or −1 (not labelled), as int8.

Errors name the row of a value that is none of these.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aura_dist.errors import InputError, brief
from aura_dist.text.table import Table

NOT_LABELLED = -1
_BINARY = {
    **dict.fromkeys(("1", "1.0", "true"), 1),
    **dict.fromkeys(("0", "0.0", "false"), 0),
    **dict.fromkeys(("-1", "-1.0", ""), NOT_LABELLED),
}


def check_texts(table: Table, column: str) -> list[str]:
    """The texts of `column`; InputError with the row number if one is empty or no text."""
    texts = table.columns[column]
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"data {table.source!r}: row {row}: expected a text in {column!r}, got {text!r}")
        if not text.strip():
            raise InputError(f"data {table.source!r}: row {row}: expected a text in {column!r}, got an empty one")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"data {table.source!r}: row {row}: expected valid Unicode in {column!r}, got {text[error.start]!a}"
            ) from error
    return texts


def parse_labels(table: Table, columns: list[str], threshold: float | None = None) -> NDArray[np.int8]:
    """[N, C] int8 labels (1, 0 or −1) of N rows and C columns of 0/1 or true/false, or of numbers with `threshold`.

    Numbers from `threshold` on are positive. It is rounded to the column's dtype, so that 0.7 in a float32 column is
    positive from 0.7 on. An empty value, null, and −1 in a binary column, mean *not labelled*.

    InputError if a value is not binary, or with a threshold is no number.
    """
    labels = np.empty((len(table), len(columns)), dtype=np.int8)
    for c, column in enumerate(columns):
        for row, value in enumerate(table.columns[column]):
            label = _binary(value) if threshold is None else _score(value, threshold)
            if label is None:
                wanted = "0, 1, true or false" if threshold is None else "a number"
                hint = "; for scores give --threshold" if threshold is None else ""
                raise InputError(
                    f"data {table.source!r}: row {row}: expected {wanted} in {column!r}, got {_shown(value)}{hint}"
                )
            labels[row, c] = label
    return labels


def _binary(value: Any) -> int | None:
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return NOT_LABELLED
    return _BINARY.get(str(value).strip().lower())


def _score(value: Any, threshold: float) -> int | None:
    if value is None or str(value).strip() == "":
        return NOT_LABELLED
    if isinstance(value, int):  # of any size, and compared exactly
        return int(value >= threshold)
    if isinstance(value, np.floating):
        with np.errstate(over="ignore"):  # a threshold beyond the dtype is infinite in it
            return NOT_LABELLED if np.isnan(value) else int(value >= value.dtype.type(threshold))
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return NOT_LABELLED if np.isnan(score) else int(score >= threshold)


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, np.generic) else brief(repr(value))


def check_classes(labels: NDArray[np.int8], concepts: list[str], source: str) -> None:
    """InputError unless every concept has both classes; `labels` [N, C]."""
    for c, concept in enumerate(concepts):
        positives, negatives = (int((labels[:, c] == value).sum()) for value in (1, 0))
        if not positives or not negatives:
            raise InputError(
                f"data {source!r}: concept {concept!r}: expected rows of both classes, "
                f"got {positives} positive and {negatives} negative"
            )
