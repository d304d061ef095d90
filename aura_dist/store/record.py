"""The record of a store: whether it is the same as asked for, which tasks are finished, and how long they took.

`progress` and `scores` have an attribute `times` for people, which is never compared:

```
progress    of collect: launches, seconds, load_seconds, rows, tokens; ranks, device
scores      of score: launches, seconds, neurons; workers
```
Numbers are sums over the launches that ended in an orderly way; the rest is of the last launch.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from aura_dist.errors import AuraError, StoreError, brief
from aura_dist.sites.site import Site
from aura_dist.store.access import FIX, get_array, read_array, read_region
from aura_dist.store.schema import (
    ADDED,
    ATTEMPTS,
    DONE,
    NONFINITE,
    Samples,
    StoreSpec,
    activation_path,
    response_paths,
)
from aura_dist.store.tokens import StoredTokens

logger = logging.getLogger(__name__)

TIMES = "times"
_TOKENS_AT_ONCE = 4096
COLLECTED, SCORED = "progress", "scores"
# Names for people: a moved file or a renamed directory is still the same data and model. An intervention has a digest.
_NOT_COMPARED = {
    "model name", "model revision", "model adapter name", "tokenizer name", "data path", "intervention method",
    "intervention parameters",
}  # fmt: skip


def check_same(path: str, group: zarr.Group, spec: StoreSpec, samples: Samples) -> None:
    """StoreError that names the difference, if the store at `path` was begun under other settings."""
    stored, wanted = dict(group.attrs), spec.to_attributes()
    there: Any = stored.get("tokenizer") or {}
    if there.get("rule") != spec.tokenizer.get("rule"):
        logger.warning(
            "%s: an earlier version recorded its tokenizer: the token ids of all texts are compared, not the digest",
            path,
        )
        stored["tokenizer"] = spec.tokenizer
    for field, about in StoreSpec.__dataclass_fields__.items():
        if field == "repooled":  # what `score` adds to a finished store
            continue
        absent = about.default if field in ADDED else None
        difference = _first_difference(field, stored.get(field, absent), wanted.get(field, absent))
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
    """Mark `task` as finished; call it only when all ranks have written all its chunks.

    `nonfinite`: path of a responses' array → how many of the task's are NaN or infinite, where there are any.
    """
    if nonfinite:
        counts = np.array([nonfinite.get(name, 0) for name in response_names(group)], dtype=np.int64)
        get_array(group, NONFINITE)[task] = counts
    get_array(group, ATTEMPTS)[task] = 0  # first: a task whose rank dies between the two runs again, with no count left
    get_array(group, DONE)[task] = 1


def most_attempted(group: zarr.Group) -> tuple[int, int]:
    """The unfinished task that most launches died in, and how many did; (0, 0) where no task is left."""
    left = unfinished(group)
    if not left:
        return 0, 0
    attempts = _marks(group, ATTEMPTS)
    task = max(left, key=lambda t: int(attempts[t]))
    return task, int(attempts[task])


class Attempts:
    """Counts how often tasks of a store are begun, so that the record says how many launches died in each.

    `begin` adds 1 to a task's count. The count goes down by 1 when the task is left, and to 0 when it is committed.
    """

    def __init__(self, group: zarr.Group) -> None:
        self._group = group
        self._begun: set[int] = set()

    def begin(self, task: int) -> None:
        """Note that this rank begins a task."""
        if ATTEMPTS in self._group:
            _add_attempt(self._group, task, 1)
            self._begun.add(task)

    def leave(self, task: int) -> None:
        """Note that this rank turns to other tasks before this one is finished: its death says nothing of this one."""
        if task in self._begun:
            self._begun.remove(task)
            _add_attempt(self._group, task, -1)

    def leave_unfinished(self) -> None:
        """Leave all tasks that are not committed."""
        for task in self._begun & set(unfinished(self._group)):
            self.leave(task)


@contextmanager
def counted_attempts(group: zarr.Group) -> Iterator[Attempts]:
    """Context in which a rank runs tasks.

    Tasks that are under way do not count when the run ends in an orderly way: by a signal, by an error of the user's,
    by another rank's failure.
    """
    attempts = Attempts(group)
    try:
        yield attempts
    except (AuraError, KeyboardInterrupt):
        with suppress(OSError, StoreError):  # the user must see the error that ends the run
            attempts.leave_unfinished()
        raise


def _add_attempt(group: zarr.Group, task: int, amount: int) -> None:
    array = get_array(group, ATTEMPTS)
    try:
        array[task] = max(0, min(255, _mark(array, task) + amount))
    except StoreError:  # the store could not be reached
        raise
    except Exception as error:  # the codec pipeline raises its own kinds
        raise writing_failed(group, error) from error


def writing_failed(group: zarr.Group, error: BaseException) -> StoreError:
    """The error of a run of `collect` that cannot write."""
    return StoreError(f"--store {group.store_path}: writing failed: {brief(error)}; {FIX}: finished tasks are kept")


def _marks(group: zarr.Group, name: str) -> NDArray[Any]:
    """One number a task; 0 where a killed process left a local file half-written."""
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


def units_without_numbers(group: zarr.Group) -> dict[str, int]:
    """Site → how many of its units are never finite under one of the poolings, or at no token, where there are any.

    Reads the responses only where so many are NaN or infinite that a unit may have no others.
    """
    num_tokens = read_array(group, "samples/num_tokens")
    counts, found = nonfinite_responses(group), {}
    spec = StoreSpec.of(group)
    for site in spec.sites:
        bad_D = np.zeros(site.width, np.bool_)
        for name in (activation_path(site.name, pooling) for pooling in spec.collected):
            if counts.get(name, 0) >= len(num_tokens):
                bad_D |= counts[name] == len(num_tokens) * site.width or _never_finite(group, name, site.width)
        if (count := counts.get(activation_path(site.name), 0)) >= num_tokens.sum():
            bad_D |= count == num_tokens.sum() * site.width or _finite_at_no_token(group, site)
        if bad_D.any():
            found[site.name] = int(np.count_nonzero(bad_D))
    return found


def count_without_numbers(without: Mapping[str, int], sites: Sequence[Site]) -> tuple[str, bool]:
    """In words, how many modules and units of `sites` are never finite; and whether they are more than half of either.

    `without` is site → how many of its units.
    """
    num_modules, num_units = sum(without.get(s.name) == s.width for s in sites), sum(without.values())
    total = sum(site.width for site in sites)
    text = f"{num_modules} of {len(sites)} modules and {num_units} of {total} units have no finite value in any text"
    return text, 2 * num_units > total or 2 * num_modules > len(sites)


def _never_finite(group: zarr.Group, name: str, width: int) -> NDArray[np.bool_]:
    """[D] whether a unit's responses are all NaN or infinite; reads a chunk column at a time."""
    array = get_array(group, name)
    num_rows, step = array.shape[0], array.chunks[1]
    regions = ((slice(0, num_rows), slice(i, min(i + step, width))) for i in range(0, width, step))
    return np.concatenate([~np.isfinite(read_region(group, array, region)).any(axis=0) for region in regions])


def _finite_at_no_token(group: zarr.Group, site: Site) -> NDArray[np.bool_]:
    """[D] whether a unit's values are NaN or infinite at every token; reads some tokens at a time."""
    values, finite_D = StoredTokens.of(group).values(site.name), np.zeros(site.width, np.bool_)
    for start in range(0, values.shape[0], _TOKENS_AT_ONCE):
        some = values.read(slice(start, min(start + _TOKENS_AT_ONCE, values.shape[0])))
        finite_D |= np.isfinite(some).any(axis=0)
    return ~finite_D


def response_names(group: zarr.Group) -> list[str]:
    """Paths of the arrays that `collect` fills, as `response_paths`."""
    return response_paths(StoreSpec.of(group))


def add_times(group: zarr.Group, part: str, amounts: Mapping[str, float], about: Mapping[str, Any]) -> None:
    """Add a launch's `amounts` to the sums of `part`, with `about` beside them; for one process of a launch.

    A failure to write is a warning, because the work is done by then.
    """
    try:
        before = read_times(group, part)
        sums = {name: round(before.get(name, 0) + amount, 3) for name, amount in amounts.items()}
        times = {"launches": before.get("launches", 0) + 1, **sums, **about}
        group[part].attrs[TIMES] = times
    except (OSError, StoreError) as error:
        logger.warning("%s: the time it took could not be noted: %s", group.store_path, brief(error))


def read_times(group: zarr.Group, part: str) -> dict[str, Any]:
    """The times that `add_times` wrote for `part`; empty where it did not."""
    times: Any = group[part].attrs.get(TIMES, {}) if part in group else {}
    return dict(times)
