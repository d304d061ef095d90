"""The record of finished tasks, and the comparison that stands before going on with a store."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from aura_dist.errors import AuraError, StoreError, brief
from aura_dist.store.access import get_array, read_array
from aura_dist.store.schema import ATTEMPTS, DONE, NONFINITE, Samples, StoreSpec, activation_path

# words for people: a moved file or a renamed directory is still the same data and model, and an intervention's digest
# tells what it does
_NOT_COMPARED = {
    "model name", "model revision", "tokenizer name", "data path", "intervention method", "intervention parameters",
}  # fmt: skip


def check_same(path: str, group: zarr.Group, spec: StoreSpec, samples: Samples) -> None:
    """StoreError that names what differs, if the store at `path` was begun under other settings."""
    stored = dict(group.attrs)
    for field, wanted in spec.to_attributes().items():
        difference = _first_difference(field, stored.get(field), wanted)
        if difference:
            name, there, here = difference
            raise StoreError(
                f"--store {path!r} was collected under another {name}: expected {_short(there)}, got {_short(here)}; "
                "collect into another store, or replace this one with --overwrite"
            )
    if not np.array_equal(read_array(group, "samples/row"), samples.row):
        raise StoreError(f"--store {path!r} holds other rows of the data; collect into another store, or --overwrite")


def _first_difference(name: str, there: Any, here: Any) -> tuple[str, Any, Any] | None:
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        for key in [k for k in {**here, **there} if f"{name} {k}" not in _NOT_COMPARED]:
            difference = _first_difference(f"{name} {key}", there.get(key), here.get(key))
            if difference:
                return difference
        return None
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        pairs = (_first_difference(name, t, h) for t, h in zip(there, here, strict=True))
        return next((p for p in pairs if p), None)
    return None if there == here else (name, there, here)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unfinished(group: zarr.Group) -> list[int]:
    """Indices of the tasks that are not committed."""
    return [int(i) for i in np.flatnonzero(_marks(group, DONE) == 0)]


def commit(group: zarr.Group, task: int, nonfinite: Mapping[str, int]) -> None:
    """Mark `task` as finished; called only when all its chunks are written, by all who write some of them.

    Parameters
    ----------
    group
        The store.
    task
        Index of the task.
    nonfinite
        Path of a responses' array → how many of the task's are NaN or infinite, where there are any.
    """
    if nonfinite:
        counts = np.array([nonfinite.get(name, 0) for name in response_names(group)], dtype=np.int64)
        get_array(group, NONFINITE)[task] = counts
    get_array(group, ATTEMPTS)[task] = 0  # first: what dies between the two is run again, and leaves no count behind
    get_array(group, DONE)[task] = 1


def most_attempted(group: zarr.Group) -> tuple[int, int]:
    """Of the unfinished tasks the one that most launches died in, and how many; (0, 0) where none is left."""
    left = unfinished(group)
    if not left:
        return 0, 0
    attempts = _marks(group, ATTEMPTS)
    task = max(left, key=lambda t: int(attempts[t]))
    return task, int(attempts[task])


@contextmanager
def counted_attempts(group: zarr.Group) -> Iterator[Callable[[int], None]]:
    """Context in which a rank runs tasks; gives what to call when it begins one.

    The count of a task is raised when it is begun and set back when it is committed, or when the run ends in an
    orderly way: by a signal, by an error that says what to change, by another rank's failure. What is left is the
    count of launches that died in it.
    """
    begun: list[int] = []

    def begin(task: int) -> None:
        if ATTEMPTS in group:
            _add_attempt(group, task, 1)
            begun.append(task)

    try:
        yield begin
    except (AuraError, KeyboardInterrupt):
        with suppress(OSError, StoreError):  # the error that ends the run is the one to be told
            for task in set(begun) & set(unfinished(group)):
                _add_attempt(group, task, -1)
        raise


def _add_attempt(group: zarr.Group, task: int, amount: int) -> None:
    array = get_array(group, ATTEMPTS)
    try:
        array[task] = max(0, min(255, _mark(array, task) + amount))
    except StoreError:  # the store could not be reached
        raise
    except Exception as error:  # the codec pipeline raises its own kinds
        raise StoreError(
            f"--store {group.store_path}: writing failed: {brief(error)}; "
            "mend that and run the same command again: finished tasks are kept"
        ) from error


def _marks(group: zarr.Group, name: str) -> NDArray[Any]:
    """One number a task. A local mark that a killed process left half-written counts as 0, as one never written."""
    try:
        return read_array(group, name)
    except StoreError:
        array = get_array(group, name)
        if not isinstance(array.store, LocalStore):
            raise
    return np.array([_mark(array, task) for task in range(array.shape[0])])


def _mark(array: "zarr.Array[Any]", task: int) -> int:
    try:
        return int(np.asarray(array[task]))
    except StoreError:
        raise
    except Exception:  # the codec pipeline raises its own kinds
        return 0


def nonfinite_responses(group: zarr.Group) -> dict[str, int]:
    """Path of a responses' array → its NaN and infinite responses in finished tasks, where there are any."""
    done = read_array(group, DONE) == 1
    totals = read_array(group, NONFINITE)[done].sum(axis=0)
    return {name: int(n) for name, n in zip(response_names(group), totals, strict=True) if n}


def response_names(group: zarr.Group) -> list[str]:
    """Paths of the responses' arrays, in model order, then in that of the poolings."""
    spec = StoreSpec.from_attributes(group.attrs)
    return [activation_path(site.name, pooling) for site in spec.sites for pooling in spec.poolings]
