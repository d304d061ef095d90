"""Pictures as SVG text: what a drawing library writes, made fit to stand in a page that is light or dark.

Figures are drawn in `INK`, `FAINT` and `SERIES`. In a page each becomes a CSS property, so that the page's theme
decides; the files beside it keep the colours.
"""

import re
from dataclasses import dataclass
from html import escape

INK, FAINT = "#22262b", "#b9bfc7"
# Okabe and Ito's palette, which the colour-blind tell apart; its yellow and black are left out
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_PROPERTIES = {INK: "currentColor", FAINT: "var(--faint)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, 1)
}
_COLOUR = re.compile("|".join(_PROPERTIES))


@dataclass(frozen=True)
class Picture:
    """One drawing.

    Attributes
    ----------
    name
        Name of its files, and prefix of its ids.
    alt
        What it shows, in words.
    svg
        A document of its own.
    png
        The same in pixels.
    width
        Of the drawing, in CSS pixels, at which its letters have their size.
    """

    name: str
    alt: str
    svg: str
    png: bytes
    width: int


def tidy(svg: str) -> str:
    """A drawing library's SVG without what names the program, and with letters of whatever the reader's system has."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!DOCTYPE.*?>\s*|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    return re.sub(r'font-family: [^;"]*', "font-family: sans-serif", svg)


def inline(picture: Picture) -> str:
    """The drawing as an element of a page: the theme's colours and letters, its own ids, a name for screen readers."""
    svg = re.sub(r"^<\?xml.*?\?>\s*", "", picture.svg)
    svg = re.sub(r"<style.*?</style>|font-family: sans-serif;? ?", "", svg, flags=re.DOTALL)  # would style the page
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{picture.name}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{picture.name}-", svg)
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg)
    svg = _COLOUR.sub(lambda found: _PROPERTIES[found.group()], svg)
    size = f"max-width: {round(1.45 * picture.width)}px; min-width: {round(0.82 * picture.width)}px"
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(picture.alt)}" style="{size}" ', 1)
