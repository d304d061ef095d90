"""Drawings: from a matplotlib figure to a `Picture`, and from that to an element of a page that is light or dark.

Figures are drawn in `INK`, `FAINT` and `SERIES`. In a page each becomes a CSS property, so that the page's theme
decides; the files beside the page keep the colours.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#22262b", "#b9bfc7"
# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow and black
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_PROPERTIES = {INK: "currentColor", FAINT: "var(--faint)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, 1)
}
_COLOUR = re.compile("|".join(_PROPERTIES))
PIXELS_PER_INCH = 72
PNG_SCALE = 3
_STYLE: Any = {  # matplotlib types each key as a literal, which the keys of a dictionary are not
    "svg.fonttype": "none", "figure.dpi": PIXELS_PER_INCH,  # letters stay letters, and a point is a pixel
    "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "axes.linewidth": 0.8, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": FAINT, "grid.linewidth": 0.5, "grid.alpha": 0.6,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "legend.frameon": False, "legend.fontsize": 10, "legend.handlelength": 1.6,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One drawing: the name of its files, what it shows in words, an SVG document, and the same as PNG.

    `width` is the number of CSS pixels at which its letters have their nominal size.
    """

    name: str
    alt: str
    svg: str
    png: bytes
    width: int


@contextmanager
def style(name: str) -> Iterator[None]:
    """Context in which a figure is made and written; its ids depend on `name` alone."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        yield


def new_figure(width: int, height: int) -> tuple["Figure", "Axes"]:
    """A figure of that many CSS pixels, with one set of axes; it needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), layout="constrained")
    return figure, figure.add_subplot()


def to_picture(figure: "Figure", name: str, alt: str) -> Picture:
    """The figure as SVG without a background, and as PNG on white."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(png, format="png", facecolor="white", dpi=PNG_SCALE * PIXELS_PER_INCH)
    width = round(figure.get_figwidth() * PIXELS_PER_INCH)
    return Picture(name, alt, tidy(svg.getvalue().decode()), png.getvalue(), width)


def tidy(svg: str) -> str:
    """The SVG without the name of the program that drew it, in a font of the reader's system."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!DOCTYPE.*?>\s*|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    return re.sub(r'font-family: [^;"]*', "font-family: sans-serif", svg)


def inline(picture: Picture) -> str:
    """The drawing as an element of a page: the theme's colours and letters, unique ids, a name for screen readers."""
    svg = re.sub(r"^<\?xml.*?\?>\s*", "", picture.svg)
    svg = re.sub(r"<style.*?</style>|font-family: sans-serif;? ?", "", svg, flags=re.DOTALL)  # would style the page
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{picture.name}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{picture.name}-", svg)
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg)
    svg = _COLOUR.sub(lambda found: _PROPERTIES[found.group()], svg)
    size = f"max-width: {round(1.45 * picture.width)}px; min-width: {round(0.82 * picture.width)}px"
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(picture.alt)}" style="{size}" ', 1)
