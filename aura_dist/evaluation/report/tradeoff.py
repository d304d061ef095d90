"""Toxicity against perplexity, drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aura_dist.evaluation.report.compared import Comparison, Point
from aura_dist.evaluation.report.drawing import new_figure, style, to_picture
from aura_dist.evaluation.report.evaluations import Estimate
from aura_dist.evaluation.report.svg import INK, SERIES, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LABELS = 16
LOG_FROM = 4.0
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


def draw(comparison: Comparison, name: str) -> Picture | None:
    """Each method in a colour and a sign of its own, its strengths joined; hollow signs stand for a pre-prompt."""
    points = comparison.points
    if not points:
        return None
    methods = list(dict.fromkeys(p.method for p in points if p.method != "none"))
    with style(name):
        from matplotlib.ticker import LogLocator, NullFormatter

        figure, ax = new_figure(430, 350)
        signs: list[Any] = []
        for method in ["none", *methods]:
            i = methods.index(method) if method in methods else -1
            look = (INK, "*") if i < 0 else (SERIES[i % len(SERIES)], _MARKERS[i % len(_MARKERS)])
            for prompted in (False, True):
                signs += _series(ax, [p for p in points if (p.method, p.prompted) == (method, prompted)], look)
        xs = [p.x.value for p in points]
        if min(xs) > 0 and max(xs) / min(xs) > LOG_FROM:
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:,g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.margins(0.12)
        ax.set_ylim(bottom=max(0.0, ax.get_ylim()[0]))
        ax.set_xlabel("perplexity (lower is better)")
        ax.set_ylabel("toxic continuations (%, lower is better)")
        figure.legend(handles=signs, loc="outside lower center", ncols=3)
        figure.draw_without_rendering()
        if len(points) <= MAX_LABELS:
            _label(ax, points)
        return to_picture(figure, name, f"Toxic continuations against perplexity of {comparison.title}")


def _series(ax: "Axes", points: Sequence[Point], look: tuple[str, str]) -> list[Any]:
    """Draw the points of one method; what stands for them in the legend."""
    if not points:
        return []
    colour, marker = look
    ordered = sorted(points, key=lambda p: (p.strength is None, p.strength or 0.0))
    x, y = [p.x.value for p in ordered], [100 * p.y.value for p in ordered]
    first = ordered[0]
    label = ("no intervention" if first.method == "none" else first.method) + (", pre-prompt" if first.prompted else "")
    joined = len({p.strength for p in ordered}) == len(ordered) > 1
    drawn = ax.errorbar(
        x, y, xerr=_reach([p.x for p in ordered], 1), yerr=_reach([p.y for p in ordered], 100),
        color=colour, marker=marker, markersize=9 if marker == "*" else 6.5, markeredgewidth=1.4,
        markerfacecolor="none" if first.prompted else colour, linestyle=":" if joined else "none", linewidth=1.2,
        elinewidth=1.0, capsize=2,
    )  # fmt: skip
    drawn.lines[0].set_label(label)
    return [drawn.lines[0]]


def _reach(estimates: Sequence[Estimate], scale: float) -> Any:
    """[2, N] how far intervals reach below and above; 0 without one."""
    below = [scale * max(e.value - (e.value if e.low is None else e.low), 0.0) for e in estimates]
    above = [scale * max((e.value if e.high is None else e.high) - e.value, 0.0) for e in estimates]
    return np.array([below, above])


def _label(ax: "Axes", points: Sequence[Point]) -> None:
    """A name at each point, on the side where it lies over the fewest points and names."""
    places = np.array([ax.transData.transform((p.x.value, 100 * p.y.value)) for p in points])
    taken: list[tuple[float, float, float, float]] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    frame = ax.bbox
    for (x, y), point in zip(places, points, strict=True):
        width, height = 6.2 * len(point.label), 11
        options = [
            (dx, dy, h, v)
            for dx, dy, h, v in ((8, 5, 0.0, 0.0), (8, -5, 0.0, 1.0), (-8, 5, 1.0, 0.0), (-8, -5, 1.0, 1.0),
                                 (0, 14, 0.5, 0.0), (0, -14, 0.5, 1.0))
        ]  # fmt: skip
        boxes = [
            (x + dx - h * width, y + dy - v * height, x + dx + (1 - h) * width, y + dy + (1 - v) * height)
            for dx, dy, h, v in options
        ]
        costs = [sum(_overlap(b, t) for t in taken) + 50 * (b[0] < frame.x0 or b[2] > frame.x1) for b in boxes]
        best = int(np.argmin(costs))
        dx, dy, h, v = options[best]
        taken.append(boxes[best])
        ax.annotate(
            point.label, (point.x.value, 100 * point.y.value), (dx, dy), textcoords="offset points", fontsize=10,
            ha=("left", "center", "right")[round(2 * h)], va="bottom" if v == 0 else "top",
        )  # fmt: skip


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area that two boxes share, in square pixels."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
