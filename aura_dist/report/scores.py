"""A store as the report shows it: what was collected, and each concept's scores, read a site at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.report.distributions import Bar, BestNeurons, SiteSummary, summarise
from aura_dist.scoring.scores import read_statistic, score_attributes, scored_statistics
from aura_dist.scoring.view import SHOWN
from aura_dist.store.access import open_group, read_array
from aura_dist.store.record import nonfinite_responses, unfinished
from aura_dist.store.schema import DONE, StoreSpec
from aura_dist.store.times import COLLECTED, SCORED, read_times


@dataclass(frozen=True)
class Neuron:
    """A row of the table of best neurons; a statistic that was not computed is NaN."""

    site: str
    layer: int
    unit: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Scores:
    """One concept under one pooling.

    Attributes
    ----------
    sites
        In model order.
    best
        Highest AUROC first.
    has_q
        Whether q-values stand for every neuron.
    """

    concept: str
    pooling: str
    sites: tuple[SiteSummary, ...]
    best: tuple[Neuron, ...]
    has_q: bool

    @property
    def num_scored(self) -> int:
        return sum(s.num_scored for s in self.sites)

    @property
    def num_experts(self) -> int:
        return sum(s.num_experts for s in self.sites)


@dataclass(frozen=True)
class StoreSummary:
    """A store without its responses.

    Attributes
    ----------
    path
        Path or URL.
    spec
        What fixes its numbers.
    attributes
        All attributes, with the configuration and the versions.
    num_rows, num_done_rows
        Rows that it is to hold, and that are there.
    classes
        Concept → (positive, negative) rows.
    basis
        What the scores are of; empty without scores.
    collected, scored
        The times of both stages.
    num_nonfinite
        NaN and infinite responses.
    """

    path: str
    spec: StoreSpec
    attributes: Mapping[str, Any]
    num_rows: int
    num_done_tasks: int
    num_tasks: int
    mean_tokens: float
    classes: Mapping[str, tuple[int, int]]
    basis: Mapping[str, Any]
    collected: Mapping[str, Any]
    scored: Mapping[str, Any]
    num_nonfinite: int

    @property
    def num_neurons(self) -> int:
        return sum(site.width for site in self.spec.sites)


def read_store(path: str) -> tuple[zarr.Group, StoreSummary]:
    """The store at `path`, opened, and what it is; StoreError if it is none."""
    group = open_group(path)
    spec = StoreSpec.from_attributes(group.attrs)
    labels_NC, tokens = read_array(group, "samples/label"), read_array(group, "samples/num_tokens")
    num_tasks = len(read_array(group, DONE))
    return group, StoreSummary(
        path=path,
        spec=spec,
        attributes=dict(group.attrs),
        num_rows=len(tokens),
        num_done_tasks=num_tasks - len(unfinished(group)),
        num_tasks=num_tasks,
        mean_tokens=float(tokens.mean()),
        classes={c: (_count(labels_NC[:, i], 1), _count(labels_NC[:, i], 0)) for i, c in enumerate(spec.concepts)},
        basis=score_attributes(group),
        collected=read_times(group, COLLECTED),
        scored=read_times(group, SCORED),
        num_nonfinite=sum(nonfinite_responses(group).values()),
    )


def _count(labels_N: NDArray[np.int8], value: int) -> int:
    return int(np.count_nonzero(labels_N == value))


def read_scores_of(group: zarr.Group, spec: StoreSpec, pooling: str, bar: Bar, k: int) -> list[Scores]:
    """Every concept's scores under one pooling, or none where a site has not been scored wholly.

    Parameters
    ----------
    group, spec
        The store.
    pooling
        One of the store's.
    bar
        What counts as an expert.
    k
        Number of best neurons.
    """
    there = [scored_statistics(group, site.name, pooling) for site in spec.sites]
    if not all("auroc" in names for names in there):
        return []
    has_q = all("q_value" in names for names in there)
    best = [BestNeurons(k) for _ in spec.concepts]
    sites: list[list[SiteSummary]] = [[] for _ in spec.concepts]
    for i, site in enumerate(spec.sites):
        auroc_CD = read_statistic(group, site.name, pooling, "auroc")
        q_CD = read_statistic(group, site.name, pooling, "q_value") if has_q else None
        for c in range(len(spec.concepts)):
            best[c].see(i, auroc_CD[c])
            sites[c].append(summarise(site, auroc_CD[c], None if q_CD is None else q_CD[c], bar))
    shown = [name for name in SHOWN if all(name in names for names in there)]
    return [
        Scores(concept, pooling, tuple(sites[c]), _neurons(group, spec, pooling, c, best[c], shown), has_q)
        for c, concept in enumerate(spec.concepts)
    ]


def _neurons(
    group: zarr.Group, spec: StoreSpec, pooling: str, concept: int, best: BestNeurons, shown: list[str]
) -> tuple[Neuron, ...]:
    rows = []
    for _, i, unit in best.found:
        site = spec.sites[i]
        arrays = {name: read_statistic(group, site.name, pooling, name) for name in shown}
        values = {name: float(array[concept, unit]) for name, array in arrays.items()}
        rows.append(Neuron(site.name, site.layer, unit, values))
    return tuple(rows)
