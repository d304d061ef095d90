"""The page from its content: one HTML file that needs nothing else."""

from datetime import datetime
from importlib import import_module
from importlib.resources import files

from aura_dist import __version__
from aura_dist.errors import MissingPackageError
from aura_dist.report.content import Content
from aura_dist.report.svg import inline

TEMPLATE = "page.html.jinja"


def check_extra() -> None:
    """MissingPackageError before any work, if what draws and fills the page is not installed."""
    for package in ("jinja2", "matplotlib"):
        try:
            import_module(package)
        except ImportError as error:
            raise MissingPackageError("report", package, "report") from error


def render(content: Content, made: datetime) -> str:
    """The page.

    Parameters
    ----------
    content
        What it shows.
    made
        The time that it says it was made at.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["inline"] = lambda picture: _markup(inline(picture))
    source = (files("aura_dist.report") / TEMPLATE).read_text(encoding="utf-8")
    time = made.strftime("%Y-%m-%d %H:%M %Z")
    return environment.from_string(source).render(page=content, made=time, version=__version__)


def _markup(svg: str) -> object:
    """Marks our own drawing as safe; every text in it was escaped by who drew it."""
    import markupsafe

    return markupsafe.Markup(svg)
