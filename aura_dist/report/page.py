"""The page: read the run directories, sum up and draw, and fill the template to one HTML file that needs no other."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from importlib.resources import files
from pathlib import Path

from aura_dist import __version__
from aura_dist.errors import MissingPackageError
from aura_dist.report import figures, tables
from aura_dist.report.comparison import Comparison, comparisons, headline
from aura_dist.report.continuations import SideBySide, side_by_side
from aura_dist.report.evaluations import labels_of, plain_first
from aura_dist.report.pictures import Picture, inline
from aura_dist.report.rundir import STORE, RunDirectory
from aura_dist.report.scores import Bar, Scores, StoreSummary, median_of, read_scores_of, read_store, total_histogram
from aura_dist.report.tables import Table
from aura_dist.scoring.tables import CONFOUNDED_MEDIAN

TEMPLATE = "page.html.jinja"
# limits of what a reader can take in; the page says what is left out
MAX_SCORES = 6
MAX_COLUMNS = 6


@dataclass(frozen=True)
class Shown:
    """What counts as an expert; rows of the table of best neurons, and of the table of continuations."""

    bar: Bar
    num_neurons: int
    num_prompts: int


@dataclass(frozen=True)
class StoreSection:
    """A store, and the runs that use it."""

    runs: tuple[str, ...]
    store: StoreSummary
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class ScoreSection:
    """One concept of one store under one pooling; `confounded` if the median AUROC of all neurons is far from ½."""

    run: str
    scores: Scores
    median: float
    confounded: bool
    histogram: Picture
    layers: list[Picture]
    experts: Picture
    neurons: Table

    @property
    def pictures(self) -> list[Picture]:
        return [self.histogram, *self.layers, self.experts]


@dataclass(frozen=True)
class ComparisonSection:
    """Evaluations that measured the same in the same way."""

    title: str
    measured: str
    headline: str | None
    picture: Picture | None
    caption: str
    table: Table
    split: Table


@dataclass(frozen=True)
class Content:
    """The page, part by part; parts without content are empty."""

    runs: list[str]
    shown: Shown
    stores: list[StoreSection]
    scores: list[ScoreSection]
    num_scores_left_out: int
    interventions: Table
    comparisons: list[ComparisonSection]
    zero_shot: Table
    continuations: list[tuple[SideBySide, list[str]]]
    stage_times: Table
    evaluation_times: Table

    @property
    def pictures(self) -> list[Picture]:
        drawn = [c.picture for c in self.comparisons if c.picture is not None]
        return [p for section in self.scores for p in section.pictures] + drawn


def check_extra() -> None:
    """MissingPackageError before any work, if what draws and fills the page is not installed."""
    for package in ("jinja2", "matplotlib"):
        try:
            import_module(package)
        except ImportError as error:
            raise MissingPackageError("report", package, "report") from error


def make_content(runs: Sequence[RunDirectory], shown: Shown) -> Content:
    """Read, then draw; AuraError if a part of a run is damaged."""
    fitted = [(run.name, one) for run in runs for one in run.interventions()]
    evaluations = [e for run in runs for e in plain_first(run.evaluations())]
    labels = labels_of(evaluations)
    label_of = dict(zip(map(id, evaluations), labels, strict=True))
    side = side_by_side(evaluations, shown.num_prompts, MAX_COLUMNS)
    stores, scores, left_out = _stores(runs, shown)
    named = [(section.runs[0], section.store) for section in stores]
    return Content(
        runs=[run.name for run in runs],
        shown=shown,
        stores=stores,
        scores=scores,
        num_scores_left_out=left_out,
        interventions=tables.intervention_table(fitted),
        comparisons=[
            _comparison(c, [label_of[id(e)] for e in c.evaluations], f"toxicity-perplexity-{i}")
            for i, c in enumerate(comparisons(evaluations, labels), 1)
        ],
        zero_shot=tables.zero_shot_table(evaluations, labels),
        continuations=[(table, [label_of[id(e)] for e in table.evaluations]) for table in side],
        stage_times=tables.stage_times(named),
        evaluation_times=tables.evaluation_times(evaluations, labels),
    )


def _stores(runs: Sequence[RunDirectory], shown: Shown) -> tuple[list[StoreSection], list[ScoreSection], int]:
    """Each store once, however many runs share it, and the scores of the first `MAX_SCORES` concepts and poolings."""
    users: dict[str, list[str]] = {}
    for run in runs:
        for store in run.stores:
            users.setdefault(store, []).append(run.name if len(run.stores) == 1 else _name_within(run, store))
    stores: list[StoreSection] = []
    sections: list[ScoreSection] = []
    left_out = 0
    for path, names in users.items():
        group, summary = read_store(path)
        stores.append(StoreSection(tuple(names), summary, tables.facts_of(summary)))
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


def _score_section(run: str, scores: Scores, shown: Shown, number: int) -> ScoreSection:
    median = median_of(total_histogram(scores.sites))
    return ScoreSection(
        run,
        scores,
        median,
        abs(median - 0.5) > CONFOUNDED_MEDIAN,
        figures.histogram(scores, shown.bar, f"auroc-{number}"),
        figures.layers(scores, shown.bar, f"layers-{number}"),
        figures.experts(scores, f"experts-{number}"),
        tables.neuron_table(scores.best),
    )


def _comparison(compared: Comparison, labels: list[str], name: str) -> ComparisonSection:
    return ComparisonSection(
        compared.title,
        compared.measured,
        headline(compared.evaluations, labels),
        figures.tradeoff(compared, name),
        figures.caption(compared),
        tables.results_table(compared.evaluations, labels),
        tables.split_table(compared.evaluations, labels),
    )


def render(content: Content, made: datetime) -> str:
    """The page as HTML, which says that it was made at the time `made`."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # our own drawings are safe, because matplotlib escaped every text in them
    environment.filters["inline"] = lambda picture: markupsafe.Markup(inline(picture))
    source = (files("aura_dist.report") / TEMPLATE).read_text(encoding="utf-8")
    time = made.strftime("%Y-%m-%d %H:%M %Z")
    return environment.from_string(source).render(page=content, made=time, version=__version__)
