"""A store's scores as figures and tables show them: histograms, quantiles, counts of experts, best neurons.

One site is read at a time and summed up, so that memory does not grow with the model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.scoring.scores import read_statistic, score_attributes, scored_statistics
from aura_dist.scoring.tables import SHOWN
from aura_dist.sites.site import Site
from aura_dist.store.access import open_group, read_array
from aura_dist.store.record import COLLECTED, SCORED, nonfinite_responses, read_times, unfinished
from aura_dist.store.schema import DONE, StoreSpec

NUM_BINS = 100
EDGES = np.linspace(0.0, 1.0, NUM_BINS + 1)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Bar:
    """When a neuron counts as an expert: AUROC above `auroc` and, if the store has q-values, q at most `max_q`."""

    auroc: float
    max_q: float


@dataclass(frozen=True)
class SiteSummary:
    """One site's scores of one concept.

    `histogram` counts neurons by AUROC over `EDGES`; `quantiles` are the AUROC at `QUANTILES`, and `best` the largest,
    all NaN without a scored neuron.
    """

    site: Site
    histogram: NDArray[np.int64]
    quantiles: NDArray[np.float64]
    best: float
    num_scored: int
    num_experts: int


def summarise(site: Site, auroc: NDArray[np.float64], q: NDArray[np.float64] | None, bar: Bar) -> SiteSummary:
    """Sum up one site: its AUROC [D], NaN for neurons without a score, and its q-values [D] or None."""
    expert = auroc > bar.auroc
    if q is not None:
        expert &= q <= bar.max_q
    scored = auroc[~np.isnan(auroc)]
    histogram = np.histogram(scored, EDGES)[0].astype(np.int64)
    quantiles = np.quantile(scored, QUANTILES) if len(scored) else np.full(len(QUANTILES), np.nan)
    best = float(scored.max()) if len(scored) else np.nan
    return SiteSummary(site, histogram, quantiles, best, len(scored), int(np.count_nonzero(expert)))


@dataclass
class BestNeurons:
    """The `k` neurons of highest AUROC of all sites seen so far: (AUROC, site's number, unit); ties in model order."""

    k: int
    found: list[tuple[float, int, int]] = field(default_factory=list)

    def see(self, site: int, auroc: NDArray[np.float64]) -> None:
        """Take in the site of that number, [D]; sites come in model order."""
        floor = self.found[-1][0] if len(self.found) == self.k else -np.inf
        units = np.flatnonzero(auroc > floor)  # NaN is above nothing
        best = units[np.argsort(-auroc[units], kind="stable")][: self.k]
        joined = [*self.found, *((float(auroc[u]), site, int(u)) for u in best)]
        self.found = sorted(joined, key=lambda n: (-n[0], n[1], n[2]))[: self.k]


def module_of(site: Site) -> str:
    """A site's name within its layer: `model.layers.3.mlp.up_proj` → `mlp.up_proj`; of the layer itself, its kind."""
    parts = site.name.split(".")
    numbered = [i for i, part in enumerate(parts) if part == str(site.layer)]
    return ".".join(parts[numbered[0] + 1 :]) or site.kind if numbered else site.name


def by_module(summaries: Iterable[SiteSummary]) -> dict[str, list[SiteSummary]]:
    """Module within its layer → its summaries in layer order, in the order of first mention."""
    groups: dict[str, list[SiteSummary]] = {}
    for summary in summaries:
        groups.setdefault(module_of(summary.site), []).append(summary)
    return {name: sorted(group, key=lambda s: s.site.layer) for name, group in groups.items()}


def by_kind_and_layer(summaries: Iterable[SiteSummary]) -> dict[str, dict[int, list[SiteSummary]]]:
    """Kind → layer → its summaries, in the order of first mention."""
    groups: dict[str, dict[int, list[SiteSummary]]] = {}
    for summary in summaries:
        groups.setdefault(summary.site.kind, {}).setdefault(summary.site.layer, []).append(summary)
    return groups


def total_histogram(summaries: Sequence[SiteSummary]) -> NDArray[np.int64]:
    """[NUM_BINS] neurons of all sites by AUROC."""
    total = np.zeros(NUM_BINS, np.int64)
    for summary in summaries:
        total += summary.histogram
    return total


def median_of(histogram: NDArray[np.int64]) -> float:
    """The median of a histogram over `EDGES`, to half a bin; NaN if it is empty."""
    if not histogram.sum():
        return float("nan")
    middle = int(np.searchsorted(np.cumsum(histogram), histogram.sum() / 2))
    return float((EDGES[middle] + EDGES[middle + 1]) / 2)


def expert_map(groups: dict[str, list[SiteSummary]]) -> tuple[list[int], NDArray[np.float64]]:
    """Layers, and [module, layer] number of experts; NaN where a layer has no such module."""
    layers = sorted({s.site.layer for group in groups.values() for s in group})
    counts_ML = np.full((len(groups), len(layers)), np.nan)
    for m, group in enumerate(groups.values()):
        for s in group:
            before = np.nan_to_num(counts_ML[m, layers.index(s.site.layer)])
            counts_ML[m, layers.index(s.site.layer)] = before + s.num_experts
    return layers, counts_ML


@dataclass(frozen=True)
class Neuron:
    """A row of the table of best neurons; a statistic that was not computed is NaN."""

    site: str
    layer: int
    unit: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Scores:
    """One concept under one pooling: sites in model order, best neurons first; `has_q` if all neurons have q-values."""

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

    `classes` maps a concept to its (positive, negative) rows; `basis` says which rows the scores are made from, and is
    empty without scores; `collected` and `scored` are the times of both stages.
    """

    path: str
    spec: StoreSpec
    attributes: Mapping[str, Any]
    num_rows: int
    num_tasks: int
    num_missing_tasks: int
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
    """The store at `path`, opened, and its summary; StoreError if there is none."""
    group = open_group(path)
    spec = StoreSpec.of(group)
    labels_NC, tokens = read_array(group, "samples/label"), read_array(group, "samples/num_tokens")
    counts = [(int(np.count_nonzero(label_N == 1)), int(np.count_nonzero(label_N == 0))) for label_N in labels_NC.T]
    return group, StoreSummary(
        path=path,
        spec=spec,
        attributes=dict(group.attrs),
        num_rows=len(tokens),
        num_tasks=len(read_array(group, DONE)),
        num_missing_tasks=len(unfinished(group)),
        mean_tokens=float(tokens.mean()),
        classes=dict(zip(spec.concepts, counts, strict=True)),
        basis=score_attributes(group),
        collected=read_times(group, COLLECTED),
        scored=read_times(group, SCORED),
        num_nonfinite=sum(nonfinite_responses(group).values()),
    )


def read_scores_of(group: zarr.Group, spec: StoreSpec, pooling: str, bar: Bar, k: int) -> list[Scores]:
    """Every concept's scores under one pooling, with its `k` best neurons; empty unless all sites are scored."""
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
    places = [(i, unit) for _, i, unit in best.found]
    found: dict[tuple[int, int], dict[str, float]] = {place: {} for place in places}
    for i in dict.fromkeys(i for i, _ in places):
        for name in shown:  # once a site, because each is requests where the store is at a URL
            array_CD = read_statistic(group, spec.sites[i].name, pooling, name)
            for place in (p for p in places if p[0] == i):
                found[place][name] = float(array_CD[concept, place[1]])
    sites = spec.sites
    return tuple(Neuron(sites[i].name, sites[i].layer, unit, found[i, unit]) for i, unit in places)
