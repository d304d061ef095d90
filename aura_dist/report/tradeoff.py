"""Toxicity against perplexity, drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aura_dist.report.compared import Comparison, Point
from aura_dist.report.drawing import new_figure, style, to_picture
from aura_dist.report.evaluations import Estimate
from aura_dist.report.naming import PLAIN as NO_INTERVENTION
from aura_dist.report.svg import FAINT, INK, SERIES, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LABEL_CHARACTERS = 200
LOG_FROM = 2.0
MANY = 6
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d")
_STROKES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


@dataclass(frozen=True)
class Line:
    """Evaluations that differ in their strength alone, or in their number of neurons alone; one point may be a line.

    Attributes
    ----------
    name
        Method, modules, further parameters, pre-prompt: what the legend says.
    points, marks
        In the order of what they differ in, and what each is called at its place.
    joined
        Whether they may be joined: no two are of the same strength.
    """

    name: str
    points: tuple[Point, ...]
    marks: tuple[str, ...]
    joined: bool


def lines(points: Sequence[Point]) -> list[Line]:
    """The points by what they were fitted with; where several strengths stand, by number of neurons too."""
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for p in points:
        groups.setdefault((p.method, p.modules, p.prompted, p.variant), []).append(p)
    found = []
    for (*alike_but_for_it, variant), group in groups.items():
        several = sum(key[:-1] == tuple(alike_but_for_it) for key in groups) > 1
        which = f", {variant}" if variant and several else ""
        if len({p.strength for p in group}) == 1:
            found.append(_line(group, [p.top_k for p in group], "k {:,}", which))
            continue
        sizes = list(dict.fromkeys(p.top_k for p in group))
        for k in sizes:
            alike = [p for p in group if p.top_k == k]
            size = f", top {k:,}" if k and sizes[1:] else ""
            found.append(_line(alike, [p.strength for p in alike], "{:g}", which + size))
    return found


def _line(group: Sequence[Point], by: Sequence[float | None], form: str, more: str) -> Line:
    first = group[0]
    name = NO_INTERVENTION if first.method == "none" else first.method
    name += f", {first.modules}" * bool(first.modules) + more + ", pre-prompt" * first.prompted
    order = sorted(range(len(group)), key=lambda i: (by[i] is None, by[i] or 0.0))
    joined = len(set(by)) == len(group) > 1
    shown = [form.format(by[i]) if joined and by[i] is not None else group[i].label for i in order]
    return Line(name, tuple(group[i] for i in order), tuple(shown), joined)


def draw(comparison: Comparison, name: str) -> Picture | None:
    """Colours tell methods, strokes modules, hollow signs pre-prompts; every line has a sign of its own."""
    points = comparison.points
    if not points:
        return None
    drawn = lines(points)
    front = any(line.joined for line in drawn)
    with style(name):
        figure, ax = new_figure(*((760, 540) if front or len(points) > MANY else (460, 370)))
        looks = _looks(drawn)
        signs = [_series(ax, line, look, front) for line, look in zip(drawn, looks, strict=True)]
        for p in (p for p in points if p.method == "none" and not p.prompted):
            ax.axvline(p.x.value, color=FAINT, linewidth=0.8, zorder=0.5)
            ax.axhline(100 * p.y.value, color=FAINT, linewidth=0.8, zorder=0.5)
        _set_axes(ax, [p.x.value for p in points])
        figure.legend(handles=signs, loc="outside lower center", ncols=3)
        figure.draw_without_rendering()
        labelled = [
            (p, _mark(line, mark, front), look[0])
            for line, look in zip(drawn, looks, strict=True)
            for p, mark in zip(line.points, line.marks, strict=True)
        ]
        if sum(len(text) for _, text, _ in labelled) <= MAX_LABEL_CHARACTERS:
            _label(ax, labelled, 9 if front else 10)
        return to_picture(figure, name, f"Toxic continuations against perplexity of {comparison.title}")


def caption(comparison: Comparison) -> str:
    """What the drawing's signs and lines mean, of those that it has."""
    drawn = lines(comparison.points)
    joined = [line for line in drawn if line.joined]
    by_strength = any(len({p.strength for p in line.points}) > 1 for line in joined)
    by_number = any(len({p.strength for p in line.points}) == 1 for line in joined)
    said = [
        "Towards the lower left is better.",
        "Lines join the strengths of one method over the same modules; the number at a sign is the strength."
        * by_strength,
        "Lines join numbers of neurons (k) of one method." * by_number,
        "A hollow sign stands for a pre-prompt." * any(p.prompted for p in comparison.points),
        "Grey lines mark the model without intervention."
        * any(p.method == "none" and not p.prompted for p in comparison.points),
    ]
    far = ", ".join(f"{p.label} (perplexity {p.x.value:,.0f}, {p.y.value:.1%} toxic)" for p in comparison.outside)
    return " ".join(filter(None, [*said, f"Outside the plot: {far}." if far else ""]))


def _mark(line: Line, mark: str, front: bool) -> str:
    """What stands at a point: beside lines, a single point is told by the legend, and needs its strength alone."""
    one = line.points[0]
    if not front or line.joined or (len(line.points) > 1 and one.method != "none"):
        return mark
    return "" if one.strength is None else f"{one.strength:g}"


def _looks(drawn: Sequence[Line]) -> list[tuple[str, str, Any]]:
    """Colour, sign and stroke of each line."""
    fitted = [line.points[0] for line in drawn if line.points[0].method != "none"]
    methods = list(dict.fromkeys(p.method for p in fitted))
    modules = list(dict.fromkeys(p.modules for p in fitted))
    looks: list[tuple[str, str, Any]] = []
    number = 0
    for p in (line.points[0] for line in drawn):
        if p.method == "none":
            looks.append((INK, "*", "-"))
            continue
        stroke = _STROKES[modules.index(p.modules) % len(_STROKES)]
        looks.append((SERIES[methods.index(p.method) % len(SERIES)], _MARKERS[number % len(_MARKERS)], stroke))
        number += 1
    return looks


def _series(ax: "Axes", line: Line, look: tuple[str, str, Any], front: bool) -> Any:
    """Draw a line, its intervals faint where there are many; what stands for it in the legend."""
    colour, marker, stroke = look
    x, y = [p.x.value for p in line.points], [100 * p.y.value for p in line.points]
    handle, caps, bars = ax.errorbar(
        x, y, xerr=_reach([p.x for p in line.points], 1), yerr=_reach([p.y for p in line.points], 100),
        color=colour, marker=marker, markersize=11 if marker == "*" else 6.5, markeredgewidth=1.4,
        markerfacecolor="none" if line.points[0].prompted else colour, linestyle=stroke if line.joined else "none",
        linewidth=1.5, elinewidth=1.0, capsize=0 if front else 2,
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
    """[2, N] how far intervals reach below and above; 0 without one."""
    below = [scale * max(e.value - (e.value if e.low is None else e.low), 0.0) for e in estimates]
    above = [scale * max((e.value if e.high is None else e.high) - e.value, 0.0) for e in estimates]
    return np.array([below, above])


def _label(ax: "Axes", labelled: Sequence[tuple[Point, str, str]], size: int) -> None:
    """A name at each point, on the side where it lies over the fewest points and names."""
    places = np.array([ax.transData.transform((p.x.value, 100 * p.y.value)) for p, _, _ in labelled])
    taken: list[tuple[float, float, float, float]] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    frame = ax.bbox
    for (x, y), (point, text, colour) in zip(places, labelled, strict=True):
        width, height = 0.62 * size * len(text), 1.1 * size
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
            text, (point.x.value, 100 * point.y.value), (dx, dy), textcoords="offset points", fontsize=size,
            color=colour, ha=("left", "center", "right")[round(2 * h)], va="bottom" if v == 0 else "top",
        )  # fmt: skip


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area that two boxes share, in square pixels."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
