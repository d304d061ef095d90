"""Toxicity against perplexity: evaluations that may be compared, and their drawing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aura_dist.evaluation.report.drawing import new_figure, style, to_picture
from aura_dist.evaluation.report.evaluations import Estimate, Evaluation
from aura_dist.evaluation.report.svg import INK, SERIES, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LABELS = 16
LOG_FROM = 4.0
OUTSIDE = 4.0
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


@dataclass(frozen=True)
class Point:
    """One evaluation: `x` its perplexity, `y` its share of toxic continuations in [0, 1]."""

    label: str
    method: str
    strength: float | None
    prompted: bool
    x: Estimate
    y: Estimate


@dataclass(frozen=True)
class Comparison:
    """Evaluations of one model on the same prompts and texts.

    Attributes
    ----------
    title
        The model.
    evaluations
        Those without intervention first.
    points
        Those drawn: with both figures.
    outside
        Those of a perplexity so high that the others would fall together: told, not drawn.
    """

    title: str
    evaluations: tuple[Evaluation, ...]
    points: tuple[Point, ...]
    outside: tuple[Point, ...]


def comparisons(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> list[Comparison]:
    """Evaluations by model, prompts, scorer and texts: only within one set are their numbers comparable."""
    sets: dict[Any, list[tuple[Evaluation, str]]] = {}
    for one, label in zip(evaluations, labels, strict=True):
        sets.setdefault(_measured_on(one), []).append((one, label))
    found = []
    for group in sets.values():
        ordered = sorted(group, key=lambda pair: (pair[0].method != "none", pair[0].preprompt is not None))
        points = [p for p in (_point(one, label) for one, label in ordered) if p is not None]
        far = OUTSIDE * min((p.x.value for p in points), default=0.0)
        near = [p for p in points if p.x.value <= far]
        drawn = near if len(near) > len(points) / 2 else points
        outside = tuple(p for p in points if p not in drawn)
        evaluated = tuple(one for one, _ in ordered)
        found.append(Comparison(short_name(ordered[0][0].model), evaluated, tuple(drawn), outside))
    return found


def short_name(model: str) -> str:
    """A hub name as it is; of a directory the last part."""
    path = Path(model)
    return path.name if path.is_absolute() or len(path.parts) > 2 or model.startswith(".") else model


def _measured_on(one: Evaluation) -> tuple[Any, ...]:
    document, toxicity = one.document, one.toxicity
    model = document.get("model")
    fingerprint = model.get("fingerprint") if isinstance(model, dict) else document.get("model_fingerprint")
    perplexity = document.get("perplexity")
    texts = perplexity.get("sha256") if isinstance(perplexity, dict) else None
    what = [toxicity.get(k) for k in ("prompts_sha256", "scorer", "num_samples")]
    return (str(fingerprint), *map(str, what), str(texts or document.get("texts_sha256")))


def _point(one: Evaluation, label: str) -> Point | None:
    x, y = one.perplexity, one.toxic("overall", "probability")
    if x is None or y is None:
        return None
    return Point(label, one.method, one.strength, one.preprompt is not None, x, y)


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
