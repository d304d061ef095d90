"""How often each unit's pooled value is its value at a text's first token: `collect` counts it, `score` warns of it.

The first token is often the same in all texts, and some units always respond to it most. Such a unit's value says
nothing of the text, so its scores are noise.

```
progress/first_token             [task, rank, unit] uint32: texts of the task; units of poolings that have `of_token`
progress/first_token_<pooling>   [unit] uint32: all texts; of a pooling that `score` made from tokens
```
A tensor-parallel rank writes the units whose responses it writes; the others are 0. Where a task ran twice, its counts
may be there from two layouts of ranks. They are equal, so the largest is taken. A chunk of zeros may be missing.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.sites.ownership import Interval
from aura_dist.store.access import damaged, get_array, is_there, missing_chunks, read_array
from aura_dist.store.schema import (
    DONE,
    FIRST_TOKEN,
    StoreSpec,
    first_token_columns,
    first_token_path,
    tasks_of,
)

# a unit whose value comes from the first token in so many texts has scores that say little
NEARLY_ALL = 0.95


class FirstTokenCounts:
    """The counts of one rank, which writes the columns `owned` (by site): added up by row chunk, written by task."""

    def __init__(self, group: zarr.Group, spec: StoreSpec, owned: Mapping[str, Sequence[Interval]], rank: int) -> None:
        self._array, self._rank = get_array(group, FIRST_TOKEN), rank
        self._counts: dict[int, NDArray[np.uint32]] = {}  # by task
        self._places = {
            key: np.concatenate([np.arange(columns.start + a, columns.start + b) for a, b in owned[key[0]]])
            for key, columns in first_token_columns(spec).items()
            if owned[key[0]]
        }

    def add(self, task: int, key: tuple[str, str], counts_D: NDArray[np.generic]) -> None:
        """Add the counts of a row chunk of a task, for a site and pooling; those of other poolings are dropped."""
        if key in self._places:
            counts = self._counts.setdefault(task, np.zeros(self._array.shape[2], np.uint32))
            counts[self._places[key]] += counts_D.astype(np.uint32)

    def write(self, task: int) -> None:
        """Write what was added for a task."""
        counts = self._counts.pop(task, None)
        self._array[task, self._rank] = np.zeros(self._array.shape[2], np.uint32) if counts is None else counts


def first_token_warnings(group: zarr.Group, spec: StoreSpec, poolings: Sequence[str] | None = None) -> Iterator[str]:
    """A sentence for each pooling under which units have their value at the first token in nearly all texts.

    `poolings`: by default all.
    """
    tasks = tasks_of(read_array(group, "samples/num_tokens"), spec.tokens_per_batch)
    done = [tasks[t] for t in np.flatnonzero(read_array(group, DONE))]
    least = NEARLY_ALL * max(1, sum(task.stop - task.start for task in done))
    num_units = sum(site.width for site in spec.sites)
    counts = _counts(group, spec, [task.index for task in done])
    for pooling in spec.poolings if poolings is None else poolings:
        found: Counter[str] = Counter()
        for site in spec.sites:
            found[site.kind] += int(np.count_nonzero(counts.get((site.name, pooling), np.zeros(1)) >= least))
        if found.total():
            by_kind = ", ".join(f"{kind} {n:,}" for kind, n in found.items() if n)
            yield (
                f"{found.total():,} of {num_units:,} units ({by_kind}) have their {pooling} at the first token in at "
                f"least {NEARLY_ALL:.0%} of the texts: their scores say little; collect with --skip-first-tokens 1"
            )


def _counts(group: zarr.Group, spec: StoreSpec, tasks: Sequence[int]) -> dict[tuple[str, str], NDArray[Any]]:
    """(site, pooling) → [D] texts of `tasks` whose pooled value is the first token's, where they were counted."""
    found: dict[tuple[str, str], NDArray[Any]] = {}
    if is_there(group, FIRST_TOKEN):
        totals = _totals(group, tasks)
        found |= {key: totals[columns] for key, columns in first_token_columns(spec).items()}
    ends = np.cumsum([site.width for site in spec.sites])[:-1]
    for pooling in spec.repooled:
        if is_there(group, first_token_path(pooling)):
            parts = np.split(read_array(group, first_token_path(pooling)), ends)
            found |= {(site.name, pooling): part for site, part in zip(spec.sites, parts, strict=True)}
    return found


def _totals(group: zarr.Group, tasks: Sequence[int]) -> NDArray[np.int64]:
    """[unit] texts of `tasks` whose pooled value is the first token's."""
    array = get_array(group, FIRST_TOKEN)
    wanted = [(task, rank, 0) for task in tasks for rank in range(array.shape[1])]
    missing, totals = set(missing_chunks(array, wanted)), np.zeros(array.shape[2], np.int64)
    there = [(task, rank) for task, rank, _ in wanted if (task, rank, 0) not in missing]
    try:
        for _, places in groupby(there, key=itemgetter(0)):
            totals += np.maximum.reduce([np.asarray(array[place]) for place in places])
    except Exception as error:  # the codec pipeline raises its own kinds
        raise damaged(group, FIRST_TOKEN, error) from error
    return totals
