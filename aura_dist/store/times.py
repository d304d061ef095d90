"""How long a store took and how fast it went: sums over the launches of a stage, for people; never compared.

```
progress    attribute `times` of collect: launches, seconds, load_seconds, rows, tokens; ranks, device
scores      attribute `times` of score: launches, seconds, neurons; workers
```
Sums are over launches that ended in an orderly way; what is not a number is the last launch's.
"""

import logging
from collections.abc import Mapping
from typing import Any

import zarr

from aura_dist.errors import StoreError, brief

logger = logging.getLogger(__name__)

TIMES = "times"
COLLECTED, SCORED = "progress", "scores"


def add_times(group: zarr.Group, part: str, amounts: Mapping[str, float], about: Mapping[str, Any]) -> None:
    """Add a launch's `amounts` to the sums of `part`, and put `about` beside them; for one process of a launch.

    The work is done by then: a failure to write is a warning.
    """
    try:
        before = read_times(group, part)
        sums = {name: round(before.get(name, 0) + amount, 3) for name, amount in amounts.items()}
        times = {"launches": before.get("launches", 0) + 1, **sums, **about}
        group[part].attrs[TIMES] = times
    except (OSError, StoreError) as error:
        logger.warning("%s: the time it took could not be noted: %s", group.store_path, brief(error))


def read_times(group: zarr.Group, part: str) -> dict[str, Any]:
    """What `add_times` noted of `part`; empty where it did not."""
    times: Any = group[part].attrs.get(TIMES, {}) if part in group else {}
    return dict(times)
