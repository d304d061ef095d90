"""The record of finished tasks, and the comparison that stands before going on with a store."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr

from aura_dist.errors import StoreError
from aura_dist.store.access import get_array, read_array
from aura_dist.store.schema import Samples, StoreSpec

DONE = "progress/done"

# names for people: a moved file or a renamed directory is still the same data and model
_NOT_COMPARED = {"name", "revision", "path"}


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
        for key in [k for k in {**here, **there} if k not in _NOT_COMPARED]:
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
    return [int(i) for i in np.flatnonzero(read_array(group, DONE) == 0)]


def commit(group: zarr.Group, task: int) -> None:
    """Mark `task` as finished; called only when all its chunks are written."""
    get_array(group, DONE)[task] = 1
