"""The page's drawings: AUROC over all neurons and by layer, where the experts are, toxicity against perplexity."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from aura_dist.report.comparison import Comparison, Point
from aura_dist.report.evaluations import PLAIN, Estimate
from aura_dist.report.pictures import FAINT, INK, SERIES, Picture, new_figure, style, to_picture
from aura_dist.report.scores import (
    EDGES,
    NUM_BINS,
    Bar,
    Scores,
    SiteSummary,
    by_kind_and_layer,
    by_module,
    expert_map,
    median_of,
    total_histogram,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NUMBERED_LAYERS = 40
MAX_LABEL_CHARACTERS = 200
LOG_FROM = 2.0
MANY = 6
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d")
_STROKES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


def histogram(scores: Scores, bar: Bar, name: str) -> Picture:
    """Share of the neurons of each kind of module by AUROC; logarithmic, because experts are few."""
    kinds = _colours_of(scores.sites)
    with style(name):
        figure, ax = new_figure(400, 280)
        least = 100.0
        for kind, colour in kinds.items():
            counts = total_histogram([s for s in scores.sites if s.site.kind == kind])
            share = 100 * counts / max(int(counts.sum()), 1)
            least = min([least, *share[share > 0]])
            ax.stairs(share, EDGES, label=kind, linewidth=1.5, color=colour, baseline=None)
        _chance_and_bar(ax, bar, horizontal=False)
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


def _colours_of(sites: Sequence[SiteSummary]) -> dict[str, str]:
    """Kind of module → its colour, on all drawings of a store."""
    kinds = dict.fromkeys(s.site.kind for s in sites)
    return {kind: SERIES[i % len(SERIES)] for i, kind in enumerate(kinds)}


def kinds(scores: Scores, bar: Bar, name: str) -> Picture | None:
    """The kinds of sites side by side: best and median AUROC by layer; None for a store of one kind."""
    from matplotlib.ticker import MaxNLocator

    groups, colours = by_kind_and_layer(scores.sites), _colours_of(scores.sites)
    if len(groups) < 2:
        return None
    with style(name):
        figure, ax = new_figure(520, 320)
        for (kind, of_layer), marker in zip(groups.items(), cycle(_MARKERS)):
            numbers = sorted(of_layer)
            best = [np.fmax.reduce([s.best for s in of_layer[layer]]) for layer in numbers]
            median = [median_of(total_histogram(of_layer[layer])) for layer in numbers]
            ax.plot(numbers, best, color=colours[kind], linewidth=1.8, marker=marker, markersize=5, label=kind)
            ax.plot(
                numbers, median, color=colours[kind], linewidth=1, linestyle=_STROKES[2], marker=marker, markersize=3
            )
        _chance_and_bar(ax, bar, horizontal=True)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("layer")
        ax.set_ylabel(f"AUROC for “{scores.concept}”")
        figure.legend(loc="outside lower center", ncols=min(len(groups), 4))
        return to_picture(figure, name, f"AUROC for {scores.concept} by layer, for each kind of site: best and median")


def layers(scores: Scores, bar: Bar, name: str) -> list[Picture]:
    """For each module the spread of AUROC by layer: median, quartiles, 5 to 95 %, best. All on one scale."""
    low = np.nanmin([s.quantiles[0] for s in scores.sites], initial=0.45)
    high = np.nanmax([s.best for s in scores.sites], initial=bar.auroc)
    limits = max(float(low) - 0.02, 0.0), min(float(high) + 0.02, 1.0)
    groups, colours = by_module(scores.sites), _colours_of(scores.sites)
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
        _chance_and_bar(ax, bar, horizontal=True)
        ax.set_ylim(*limits)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(module)
        ax.set_xlabel("layer")
        ax.set_ylabel("AUROC")
        return to_picture(figure, name, f"AUROC by layer of {module}: median, quartiles, 5 to 95 percent, best")


def _chance_and_bar(ax: "Axes", bar: Bar, *, horizontal: bool) -> None:
    """Lines at chance and at the bar of an expert."""
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
            scale.solids.set(rasterized=False, edgecolor="face")  # vectors without gaps, not an image in the SVG
        return to_picture(figure, name, f"Number of experts for {scores.concept} by module and layer")


def _numbers(ax: "Axes", counts_ML: np.ndarray, top: float) -> None:
    for (m, layer), count in np.ndenumerate(counts_ML):
        if not np.isnan(count):
            # cividis is dark below its middle
            colour = "#ffffff" if count < 0.5 * top else "#000000"
            size = 9 if count < 1000 else 7
            ax.text(layer + 0.5, m + 0.5, f"{int(count)}", ha="center", va="center", fontsize=size, color=colour)


@dataclass(frozen=True)
class Line:
    """Evaluations that differ in their strength alone, or in their number of neurons alone; maybe a single one.

    `name` is for the legend; `marks` are the texts beside the points, which are in the order of strength or number.
    The points are `joined` if no two have the same strength or number.
    """

    name: str
    points: tuple[Point, ...]
    marks: tuple[str, ...]
    joined: bool


def lines(points: Sequence[Point]) -> list[Line]:
    """The points by what they were fitted with; if a group has several strengths, by number of neurons too."""
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for p in points:
        groups.setdefault((p.one.method, p.modules, p.one.preprompt is not None, p.one.variant), []).append(p)
    several = len({p.one.variant for p in points if p.one.is_fitted}) > 1
    found = []
    for (*_, variant), group in groups.items():
        which = f", {variant}" if variant and several else ""
        if len({p.one.strength for p in group}) == 1:
            found.append(_line(group, [p.one.top_k for p in group], "k {:,}", which))
            continue
        sizes = list(dict.fromkeys(p.one.top_k for p in group))
        for k in sizes:
            alike = [p for p in group if p.one.top_k == k]
            size = f", top {k:,}" if k and sizes[1:] else ""
            found.append(_line(alike, [p.one.strength for p in alike], "{:g}", which + size))
    return found


def _line(group: Sequence[Point], by: Sequence[float | None], form: str, more: str) -> Line:
    first = group[0]
    name = first.one.method if first.one.is_fitted else PLAIN
    name += f", {first.modules}" * bool(first.modules) + more + ", pre-prompt" * (first.one.preprompt is not None)
    order = sorted(range(len(group)), key=lambda i: (by[i] is None, by[i] or 0.0))
    joined = len(set(by)) == len(group) > 1
    shown = [form.format(by[i]) if joined and by[i] is not None else group[i].one.label for i in order]
    return Line(name, tuple(group[i] for i in order), tuple(shown), joined)


def tradeoff(comparison: Comparison, name: str) -> Picture | None:
    """Toxicity against perplexity: methods by colour, modules by stroke, pre-prompts hollow; a marker for each line.

    Rings as `Point.ringed` says.
    """
    points = comparison.points
    if not points:
        return None
    drawn = lines(points)
    front = any(line.joined for line in drawn)
    with style(name):
        figure, ax = new_figure(*((760, 540) if front or len(points) > MANY else (460, 370)))
        looked = list(zip(drawn, _looks(drawn), strict=True))
        handles = [_series(ax, line, look, front) for line, look in looked]
        for p in (p for p in points if p.one.is_plain):
            ax.axvline(p.x.value, color=FAINT, linewidth=0.8, zorder=0.5)
            ax.axhline(100 * p.y.value, color=FAINT, linewidth=0.8, zorder=0.5)
        rings = [p for p in points if p.ringed]
        ax.plot(
            [p.x.value for p in rings], [100 * p.y.value for p in rings],
            linestyle="none", marker="o", markersize=15, markerfacecolor="none", markeredgecolor=INK,
        )  # fmt: skip
        _set_axes(ax, [p.x.value for p in points])
        legend_below(figure, handles)
        labelled = [
            (p, _mark(line, mark, front), look[0])
            for line, look in looked
            for p, mark in zip(line.points, line.marks, strict=True)
        ]
        if sum(len(text) for _, text, _ in labelled) <= MAX_LABEL_CHARACTERS:
            _label(ax, labelled, 9 if front else 10)
        return to_picture(figure, name, f"Toxic continuations against perplexity of {comparison.title}")


def legend_below(figure: "Figure", handles: Sequence[Any]) -> None:
    """A legend of as many columns, three at most, as the figure is wide enough for; lays the figure out."""
    for columns in (3, 2, 1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns)
        figure.draw_without_rendering()
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def caption(comparison: Comparison) -> str:
    """What the markers and lines of the trade-off mean, as far as it has them."""
    joined = [line for line in lines(comparison.points) if line.joined]
    by_strength = any(len({p.one.strength for p in line.points}) > 1 for line in joined)
    by_number = any(len({p.one.strength for p in line.points}) == 1 for line in joined)
    said = [
        "Towards the lower left is better.",
        "Lines join the strengths of one method over the same modules; the number at a marker is the strength."
        * by_strength,
        "Lines join numbers of neurons (k) of one method." * by_number,
        "A hollow marker is an evaluation with a pre-prompt."
        * any(p.one.preprompt is not None for p in comparison.points),
        "A ring marks an intervention that was measured on other prompts or texts too."
        * any(p.ringed for p in comparison.points),
        "Grey lines mark the model without intervention." * any(p.one.is_plain for p in comparison.points),
    ]
    far = ", ".join(f"{p.one.label} (perplexity {p.x.value:,.0f}, {p.y.value:.1%} toxic)" for p in comparison.outside)
    return " ".join(filter(None, [*said, f"Outside the plot: {far}." if far else ""]))


def _mark(line: Line, mark: str, front: bool) -> str:
    """The text at a point. Beside joined lines a single point needs its strength alone: the legend names it."""
    one = line.points[0].one
    if not front or line.joined or (len(line.points) > 1 and one.is_fitted):
        return mark
    return "" if one.strength is None else f"{one.strength:g}"


def _looks(drawn: Sequence[Line]) -> list[tuple[str, str, Any]]:
    """Colour, marker and stroke of each line."""
    firsts = [line.points[0] for line in drawn]
    methods = list(dict.fromkeys(p.one.method for p in firsts if p.one.is_fitted))
    modules = list(dict.fromkeys(p.modules for p in firsts if p.one.is_fitted))
    looks: list[tuple[str, str, Any]] = []
    markers = cycle(_MARKERS)
    for p in firsts:
        if p.one.is_fitted:
            stroke = _STROKES[modules.index(p.modules) % len(_STROKES)]
            looks.append((SERIES[methods.index(p.one.method) % len(SERIES)], next(markers), stroke))
        else:
            looks.append((INK, "*", "-"))
    return looks


def _series(ax: "Axes", line: Line, look: tuple[str, str, Any], front: bool) -> Any:
    """Draw a line, with faint intervals if there are joined lines; returns its handle for the legend."""
    colour, marker, stroke = look
    x, y = [p.x.value for p in line.points], [100 * p.y.value for p in line.points]
    handle, caps, bars = ax.errorbar(
        x, y, xerr=_reach([p.x for p in line.points], 1), yerr=_reach([p.y for p in line.points], 100),
        color=colour, marker=marker, markersize=11 if marker == "*" else 6.5, markeredgewidth=1.4,
        markerfacecolor="none" if line.points[0].one.preprompt is not None else colour,
        linestyle=stroke if line.joined else "none", linewidth=1.5, elinewidth=1.0, capsize=0 if front else 2,
    )  # fmt: skip
    for part in (*caps, *bars):
        part.set_alpha(0.3 if front else 0.6)
    handle.set_label(line.name)
    return handle


def _set_axes(ax: "Axes", xs: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    if min(xs) > 0 and max(xs) / min(xs) > LOG_FROM:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        ax.xaxis.set_major_formatter("{x:,g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.minorticks_off()
    ax.margins(0.08)
    ax.set_ylim(bottom=max(0.0, ax.get_ylim()[0]))
    ax.set_xlabel("perplexity (lower is better)")
    ax.set_ylabel("toxic continuations (%, lower is better)")


def _reach(estimates: Sequence[Estimate], scale: float) -> Any:
    """[2, N] how far intervals reach below and above; 0 without an interval."""
    below = [scale * max(e.value - (e.value if e.low is None else e.low), 0.0) for e in estimates]
    above = [scale * max((e.value if e.high is None else e.high) - e.value, 0.0) for e in estimates]
    return np.array([below, above])


def _label(ax: "Axes", labelled: Sequence[tuple[Point, str, str]], size: int) -> None:
    """A name at each point, on the side where it covers the fewest points and names."""
    places = np.array([ax.transData.transform((p.x.value, 100 * p.y.value)) for p, _, _ in labelled])
    taken: list[tuple[float, float, float, float]] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    frame = ax.bbox
    right, left = [(8, 5, 0.0, 0.0), (8, -5, 0.0, 1.0)], [(-8, 5, 1.0, 0.0), (-8, -5, 1.0, 1.0)]
    options = [*right, *left, (0, 14, 0.5, 0.0), (0, -14, 0.5, 1.0)]
    for (x, y), (point, text, colour) in zip(places, labelled, strict=True):
        width, height = 0.62 * size * len(text), 1.1 * size
        boxes = [
            (x + dx - h * width, y + dy - v * height, x + dx + (1 - h) * width, y + dy + (1 - v) * height)
            for dx, dy, h, v in options
        ]
        costs = [sum(_overlap(b, t) for t in taken) + 50 * (b[0] < frame.x0 or b[2] > frame.x1) for b in boxes]
        best = int(np.argmin(costs))
        dx, dy, h, v = options[best]
        taken.append(boxes[best])
        ax.annotate(
            text, (point.x.value, 100 * point.y.value), (dx, dy), textcoords="offset points", fontsize=size,
            color=colour, ha=("left", "center", "right")[round(2 * h)], va="bottom" if v == 0 else "top",
        )  # fmt: skip


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area that two boxes share, in square pixels."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
