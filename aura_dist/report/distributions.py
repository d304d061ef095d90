"""What the figures and tables of scores show, as numbers: histograms, quantiles, counts of experts, best neurons.

A site is read, summed up and forgotten: no more than one site's scores are held, whatever the model's size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from aura_dist.sites.site import Site

NUM_BINS = 100
EDGES = np.linspace(0.0, 1.0, NUM_BINS + 1)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Bar:
    """From when on a neuron counts as an expert: AUROC above `auroc` and, where q-values stand, q at most `max_q`."""

    auroc: float
    max_q: float


@dataclass(frozen=True)
class SiteSummary:
    """One site's scores of one concept.

    Attributes
    ----------
    site
        The site.
    histogram
        [NUM_BINS] neurons by AUROC, over `EDGES`.
    quantiles
        AUROC at `QUANTILES`; NaN without a scored neuron.
    best
        Largest AUROC.
    num_scored, num_experts
        Neurons with a score, and those that clear the bar.
    """

    site: Site
    histogram: NDArray[np.int64]
    quantiles: NDArray[np.float64]
    best: float
    num_scored: int
    num_experts: int

    @property
    def expert_share(self) -> float:
        return self.num_experts / self.num_scored if self.num_scored else np.nan


def summarise(site: Site, auroc: NDArray[np.float64], q: NDArray[np.float64] | None, bar: Bar) -> SiteSummary:
    """Sum up one site.

    Parameters
    ----------
    site
        The site.
    auroc
        [D]; NaN for neurons without a score.
    q
        [D] q-values, or None where they do not stand.
    bar
        What counts as an expert.
    """
    expert = auroc > bar.auroc
    if q is not None:
        expert &= q <= bar.max_q
    scored = auroc[~np.isnan(auroc)]
    some = bool(len(scored))
    return SiteSummary(
        site,
        np.histogram(scored, EDGES)[0].astype(np.int64),
        np.quantile(scored, QUANTILES) if some else np.full(len(QUANTILES), np.nan),
        float(scored.max()) if some else np.nan,
        len(scored),
        int(np.count_nonzero(expert)),
    )


@dataclass
class BestNeurons:
    """The `k` neurons of highest AUROC of all sites seen so far: (AUROC, site's number, unit), equal ones in order."""

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
    """A site's name within its layer: `model.layers.3.mlp.up_proj` → `mlp.up_proj`."""
    parts = site.name.split(".")
    numbered = [i for i, part in enumerate(parts) if part == str(site.layer)]
    return ".".join(parts[numbered[0] + 1 :]) if numbered and numbered[0] + 1 < len(parts) else site.name


def by_module(summaries: Iterable[SiteSummary]) -> dict[str, list[SiteSummary]]:
    """Module within its layer → its summaries in layer order, in the order of first mention."""
    groups: dict[str, list[SiteSummary]] = {}
    for summary in summaries:
        groups.setdefault(module_of(summary.site), []).append(summary)
    return {name: sorted(group, key=lambda s: s.site.layer) for name, group in groups.items()}


def total_histogram(summaries: Sequence[SiteSummary]) -> NDArray[np.int64]:
    """[NUM_BINS] neurons of all of them by AUROC."""
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
