"""Drawings of scores: AUROC over all neurons, by layer, and where the experts are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from aura_dist.report.distributions import (
    EDGES,
    NUM_BINS,
    Bar,
    SiteSummary,
    by_module,
    expert_map,
    total_histogram,
)
from aura_dist.report.drawing import new_figure, style, to_picture
from aura_dist.report.scored import Scores
from aura_dist.report.svg import INK, SERIES, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_NUMBERED_LAYERS = 40


def histogram(scores: Scores, bar: Bar, name: str) -> Picture:
    """Share of the neurons of each kind of module by AUROC; logarithmic, as the experts are few."""
    kinds = colours_of(scores.sites)
    with style(name):
        figure, ax = new_figure(400, 280)
        least = 100.0
        for kind, colour in kinds.items():
            counts = total_histogram([s for s in scores.sites if s.site.kind == kind])
            share = 100 * counts / max(int(counts.sum()), 1)
            least = min([least, *share[share > 0]])
            ax.stairs(share, EDGES, label=kind, linewidth=1.5, color=colour, baseline=None)
        _mark(ax, bar, horizontal=False)
        filled = np.flatnonzero(total_histogram(scores.sites))
        if len(filled):
            ax.set_yscale("log", nonpositive="clip")
            ax.set_ylim(bottom=0.5 * least)
            ax.yaxis.set_major_formatter("{x:g}")
            ax.set_xlim(max(EDGES[filled[0]] - 0.02, 0), min(EDGES[filled[-1] + 1] + 0.02, 1))
        ax.set_xlabel(f"AUROC of a neuron for “{scores.concept}”")
        ax.set_ylabel(f"neurons in a bin of {1 / NUM_BINS:g} (%)")
        figure.legend(loc="outside lower center", ncols=len(kinds))
        return to_picture(figure, name, f"Histograms of AUROC for {scores.concept}, one for each kind of module")


def colours_of(sites: Sequence[SiteSummary]) -> dict[str, str]:
    """Kind of module → its colour, on all drawings of a store."""
    kinds = dict.fromkeys(s.site.kind for s in sites)
    return {kind: SERIES[i % len(SERIES)] for i, kind in enumerate(kinds)}


def layers(scores: Scores, bar: Bar, name: str) -> list[Picture]:
    """For each module the spread of AUROC by layer: median, quartiles, 5 to 95 %, best. All on one scale."""
    low = np.nanmin([s.quantiles[0] for s in scores.sites], initial=0.45)
    high = np.nanmax([s.best for s in scores.sites], initial=bar.auroc)
    limits = max(float(low) - 0.02, 0.0), min(float(high) + 0.02, 1.0)
    groups, colours = by_module(scores.sites), colours_of(scores.sites)
    return [
        _layers_of(module, group, bar, limits, f"{name}-{i}", colours[group[0].site.kind])
        for i, (module, group) in enumerate(groups.items())
    ]


def _layers_of(
    module: str, group: Sequence[SiteSummary], bar: Bar, limits: tuple[float, float], name: str, colour: str
) -> Picture:
    from matplotlib.ticker import MaxNLocator

    layer = [s.site.layer for s in group]
    q05, q25, median, q75, q95 = np.array([s.quantiles for s in group]).T
    with style(name):
        figure, ax = new_figure(330, 220)
        ax.fill_between(layer, q05, q95, color=colour, alpha=0.18, linewidth=0)
        ax.fill_between(layer, q25, q75, color=colour, alpha=0.35, linewidth=0)
        ax.plot(layer, median, color=colour, linewidth=1.8, marker="o" if len(layer) == 1 else None)
        ax.plot(layer, [s.best for s in group], color=INK, linestyle="none", marker="o", markersize=3)
        _mark(ax, bar, horizontal=True)
        ax.set_ylim(*limits)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(module)
        ax.set_xlabel("layer")
        ax.set_ylabel("AUROC")
        return to_picture(figure, name, f"AUROC by layer of {module}: median, quartiles, 5 to 95 percent, best")


def _mark(ax: "Axes", bar: Bar, *, horizontal: bool) -> None:
    """Lines at chance, and where experts begin."""
    draw = ax.axhline if horizontal else ax.axvline
    draw(0.5, color=INK, linewidth=0.8)
    draw(bar.auroc, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))


def experts(scores: Scores, name: str) -> Picture:
    """Module × layer: how many neurons clear the bar."""
    from matplotlib.ticker import MaxNLocator

    groups = by_module(scores.sites)
    numbers, counts_ML = expert_map(groups)
    numbered = len(numbers) <= MAX_NUMBERED_LAYERS
    longest = max(map(len, groups))
    width = max(360, 7 * longest + 60 + (26 if numbered else 11) * len(numbers))
    with style(name):
        figure, ax = new_figure(width, (50 if numbered else 110) + 26 * len(groups))
        top = max(float(np.nanmax(counts_ML, initial=0)), 1.0)
        mesh = ax.pcolormesh(counts_ML, cmap="cividis", vmin=0, vmax=top, edgecolors="none")
        if numbered:
            _numbers(ax, counts_ML, top)
        step = 1 if len(numbers) <= 20 else 5 if len(numbers) <= 60 else 10
        ax.set_xticks(np.arange(0, len(numbers), step) + 0.5, [str(n) for n in numbers[::step]])
        ax.set_yticks(np.arange(len(groups)) + 0.5, list(groups))
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.invert_yaxis()
        ax.set_xlabel("layer")
        if not numbered:
            shrink = min(1.0, 320 / width)
            whole = MaxNLocator(6, integer=True)
            scale = figure.colorbar(
                mesh, ax=ax, location="bottom", shrink=shrink, aspect=40, label="experts", ticks=whole
            )
            scale.outline.set_visible(False)
            assert scale.solids is not None
            scale.solids.set(rasterized=False, edgecolor="face")  # else a picture within the picture, or stripes
        return to_picture(figure, name, f"Number of experts for {scores.concept} by module and layer")


def _numbers(ax: "Axes", counts_ML: np.ndarray, top: float) -> None:
    for (m, layer), count in np.ndenumerate(counts_ML):
        if not np.isnan(count):
            # cividis is dark below its middle
            colour = "#ffffff" if count < 0.5 * top else "#000000"
            size = 9 if count < 1000 else 7
            ax.text(layer + 0.5, m + 0.5, f"{int(count)}", ha="center", va="center", fontsize=size, color=colour)
