"""The page: read the run directories, sum up and draw, and fill the template to one HTML file that needs no other."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from aura_dist import __version__
from aura_dist.errors import MissingPackageError
from aura_dist.report import figures, tables
from aura_dist.report.comparison import Comparison, comparisons, headline
from aura_dist.report.continuations import side_by_side
from aura_dist.report.evaluations import labelled, plain_first
from aura_dist.report.pictures import Picture, inline
from aura_dist.report.rundir import STORE, RunDirectory
from aura_dist.report.scores import Bar, Scores, median_of, read_scores_of, read_store, total_histogram
from aura_dist.scoring.tables import CONFOUNDED_MEDIAN

TEMPLATE = "page.html.jinja"
# limits of what a reader can take in; the page says what is left out
MAX_SCORES = 6
MAX_COLUMNS = 6
# names that the template reads → what it shows
Section = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """What counts as an expert; rows of the table of best neurons, and of the table of continuations."""

    bar: Bar
    num_neurons: int
    num_prompts: int


def check_extra() -> None:
    """MissingPackageError before any work, if what draws and fills the page is not installed."""
    for package in ("jinja2", "matplotlib"):
        try:
            import_module(package)
        except ImportError as error:
            raise MissingPackageError("report", package, "report") from error


def make_page(runs: Sequence[RunDirectory], shown: Shown, made: datetime) -> tuple[str, list[Picture]]:
    """The page as HTML, which says that it was made at the time `made`, and its drawings.

    AuraError if a part of a run is damaged.
    """
    fitted = [(run.name, one) for run in runs for one in run.interventions()]
    evaluations = labelled([e for run in runs for e in plain_first(run.evaluations())])
    side = side_by_side(evaluations, shown.num_prompts, MAX_COLUMNS)
    stores, scores, left_out = _stores(runs, shown)
    named = [(section["runs"][0], section["store"]) for section in stores]
    compared = [_comparison(c, f"toxicity-perplexity-{i}") for i, c in enumerate(comparisons(evaluations), 1)]
    pictures = [p for s in scores for p in (s["histogram"], *filter(None, [s["kinds"]]), *s["layers"], s["experts"])]
    pictures += [section["picture"] for section in compared if section["picture"] is not None]
    page = {
        "runs": [run.name for run in runs],
        "shown": shown,
        "stores": stores,
        "scores": scores,
        "num_scores_left_out": left_out,
        "interventions": tables.intervention_table(fitted),
        "comparisons": compared,
        "zero_shot": tables.zero_shot_table(evaluations),
        "continuations": side,
        "stage_times": tables.stage_times(named),
        "evaluation_times": tables.evaluation_times(evaluations),
    }
    return _render(page, made), pictures


def _stores(runs: Sequence[RunDirectory], shown: Shown) -> tuple[list[Section], list[Section], int]:
    """Each store once, however many runs share it, and the scores of the first `MAX_SCORES` concepts and poolings."""
    users: dict[str, list[str]] = {}
    for run in runs:
        for store in run.stores:
            users.setdefault(store, []).append(run.name if len(run.stores) == 1 else _name_within(run, store))
    stores: list[Section] = []
    sections: list[Section] = []
    left_out = 0
    for path, names in users.items():
        group, summary = read_store(path)
        stores.append({"runs": names, "store": summary, "facts": tables.facts_of(summary)})
        for pooling in summary.spec.poolings:
            room = MAX_SCORES - len(sections)
            found = read_scores_of(group, summary.spec, pooling, shown.bar, shown.num_neurons) if room > 0 else []
            left_out += max(len(summary.spec.concepts) - max(room, 0), 0) if summary.basis else 0
            sections += [_score_section(names[0], s, shown, len(sections) + i) for i, s in enumerate(found[:room], 1)]
    return stores, sections, left_out


def _name_within(run: RunDirectory, store: str) -> str:
    """A run's name and which of its stores: `collections/gemma/store.zarr` → `gemma`."""
    path = Path(store)
    return f"{run.name}/{path.parent.name if path.name == STORE else path.stem}"


def _score_section(run: str, scores: Scores, shown: Shown, number: int) -> Section:
    """One concept of one store under one pooling."""
    median = median_of(total_histogram(scores.sites))
    return {
        "run": run,
        "scores": scores,
        "median": median,
        "confounded": abs(median - 0.5) > CONFOUNDED_MEDIAN,
        "histogram": figures.histogram(scores, shown.bar, f"auroc-{number}"),
        "kinds": figures.kinds(scores, shown.bar, f"kinds-{number}"),
        "layers": figures.layers(scores, shown.bar, f"layers-{number}"),
        "experts": figures.experts(scores, f"experts-{number}"),
        "neurons": tables.neuron_table(scores.best),
    }


def _comparison(compared: Comparison, name: str) -> Section:
    return {
        "title": compared.title,
        "measured": compared.measured,
        "headline": headline(compared.evaluations),
        "picture": figures.tradeoff(compared, name),
        "caption": figures.caption(compared),
        "table": tables.results_table(compared.evaluations),
        "effects": tables.effects_table(compared.evaluations),
        "split": tables.split_table(compared.evaluations),
    }


def _render(page: Section, made: datetime) -> str:
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # our own drawings are safe, because matplotlib escaped every text in them
    environment.filters["inline"] = lambda picture: markupsafe.Markup(inline(picture))
    source = (files("aura_dist.report") / TEMPLATE).read_text(encoding="utf-8")
    time = made.strftime("%Y-%m-%d %H:%M %Z")
    return environment.from_string(source).render(page=page, made=time, version=__version__)
