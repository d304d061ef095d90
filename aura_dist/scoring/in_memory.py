"""Statistics of responses in memory, for one concept, as `score` makes them of a store."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aura_dist.ranks.process import available_cores
from aura_dist.scoring.columns import statistics_by_concept
from aura_dist.scoring.statistics import STATISTICS

_COLUMNS = 1024  # of a thread's turn


def statistics_of(
    label_N: NDArray[np.int8], responses: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> dict[str, dict[str, NDArray[Any]]]:
    """Statistic → site → [D], from site → [N, D]; label_N [N] holds 1, 0, or −1 for a row that is not labelled.

    A statistic over the model, such as the q-value, is one over the units of all sites that are given.
    """
    over = {name: STATISTICS[name].over_model for name in names}
    made_of = [name if (whole := over[name]) is None else whole[0] for name in names]
    distinct = list(dict.fromkeys(made_of))
    parts = [
        (s, values[:, at : at + _COLUMNS])
        for s, values in responses.items()
        for at in range(0, values.shape[1], _COLUMNS)
    ]
    with ThreadPoolExecutor(available_cores()) as pool:
        done = list(pool.map(lambda part: statistics_by_concept(part[1], label_N[None], distinct), parts))
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for name, source in zip(names, made_of, strict=True):
        of_site: dict[str, list[NDArray[Any]]] = {site: [] for site in responses}
        for (site, _), made in zip(parts, done, strict=True):
            of_site[site].append(made[source][0])
        joined = {site: np.concatenate(pieces) for site, pieces in of_site.items()}
        if (whole := over[name]) is not None:
            adjusted = whole[1](np.concatenate(list(joined.values())))
            cuts = np.cumsum([len(values) for values in joined.values()])[:-1]
            joined = dict(zip(joined, np.split(adjusted, cuts), strict=True))
        found[name] = joined
    return found
