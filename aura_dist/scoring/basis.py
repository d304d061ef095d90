"""The rows that scores are made from: all of them, or those that are there."""

import hashlib
from dataclasses import dataclass

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.errors import StoreError
from aura_dist.store.access import read_array
from aura_dist.store.schema import DONE, StoreSpec, tasks_of


@dataclass(frozen=True)
class Basis:
    """The rows that scores are made from; written into the attributes of `scores`.

    Attributes
    ----------
    partial
        Whether rows are missing.
    num_rows, total_rows
        Rows that are there, and that the store is to hold.
    digest
        Of the tasks that were finished: scores made from others are made anew.
    runs
        The rows as runs [start, stop).
    """

    partial: bool
    num_rows: int
    total_rows: int
    digest: str
    runs: tuple[tuple[int, int], ...]


def basis_of(path: str, group: zarr.Group, spec: StoreSpec, *, partial: bool) -> Basis:
    """The rows to score.

    Raises
    ------
    StoreError
        Rows are missing and `partial` is not set; or a concept has only one class among those that are there.
    """
    tokens, done = read_array(group, "samples/num_tokens"), read_array(group, DONE)
    runs: list[tuple[int, int]] = []
    for task in tasks_of(tokens, spec.tokens_per_batch):
        if done[task.index]:
            joins = bool(runs) and runs[-1][1] == task.start
            runs[-1:] = [(runs[-1][0], task.stop)] if joins else [*runs[-1:], (task.start, task.stop)]
    num_rows = sum(stop - start for start, stop in runs)
    missing = len(tokens) - num_rows
    if missing and not partial:
        raise StoreError(
            f"--store {path!r}: {missing} of {len(tokens)} rows are missing; run the same `collect` to finish it, "
            "or score what is there with --partial"
        )
    _check_classes(path, spec, read_array(group, "samples/label"), runs)
    return Basis(missing > 0, num_rows, len(tokens), hashlib.sha256(done.tobytes()).hexdigest(), tuple(runs))


def _check_classes(path: str, spec: StoreSpec, labels_NC: NDArray[np.int8], runs: list[tuple[int, int]]) -> None:
    there = np.concatenate([np.arange(*run) for run in runs] or [np.empty(0, np.int64)])
    for c, concept in enumerate(spec.concepts):
        counts = [int((labels_NC[there, c] == value).sum()) for value in (1, 0)]
        if 0 in counts:
            raise StoreError(
                f"--store {path!r}: concept {concept!r} has {counts[0]} positive and {counts[1]} negative rows among "
                f"the {len(there)} that are there; expected one of each or more: collect more rows"
            )
