"""From a matplotlib figure to a `Picture`: one style for all, no display, no state left behind."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aura_dist.report.svg import FAINT, INK, Picture, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PIXELS_PER_INCH = 72
PNG_SCALE = 3
_STYLE: Any = {  # matplotlib types the keys as literals, of which a dictionary's are none
    "svg.fonttype": "none",  # letters stay letters
    "figure.dpi": PIXELS_PER_INCH,  # a point is a pixel
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.handlelength": 1.6,
}


@contextmanager
def style(name: str) -> Iterator[None]:
    """Context in which a figure is made and written; `name` makes its ids."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        yield


def new_figure(width: int, height: int) -> tuple["Figure", "Axes"]:
    """A figure of that many CSS pixels, with one set of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), layout="constrained")
    return figure, figure.add_subplot()


def to_picture(figure: "Figure", name: str, alt: str) -> Picture:
    """The figure as SVG without a ground, and as PNG on white."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(png, format="png", facecolor="white", dpi=PNG_SCALE * PIXELS_PER_INCH)
    width = round(figure.get_figwidth() * PIXELS_PER_INCH)
    return Picture(name, alt, tidy(svg.getvalue().decode()), png.getvalue(), width)
