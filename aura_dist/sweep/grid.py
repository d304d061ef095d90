"""A grid of values → cells, each with the settings of every stage that it needs. Pure functions of mappings.

A *cell* is one row of the sweep's table. By order of force a stage's settings are: top of the file < grid < the
stage's section < the stage's section within the grid. So `collect: {pooling: [max, mean]}` beside `grid: {pooling:
[max, mean]}` leaves the grid to `fit`: one collection serves both.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from aura_dist.errors import ConfigError

STAGES = ("collect", "score", "fit", "evaluate")
PLAIN = "none"
# what the sweep decides itself
_OURS = {
    "collect": {"store", "overwrite"},
    "score": {"store"},
    "fit": {"store", "out"},
    "evaluate": {"out", "intervention"},
}
# how a stage is run, not what it computes: no axis of a grid, and no part of a job's identity
EXECUTION = frozenset({
    "sharding", "offload", "max_memory", "offload_folder", "tensor_plan", "device", "dask", "num_workers",
    "memory_limit", "slurm", "overwrite", "max_attempts", "continuations_per_batch",
})  # fmt: skip
# shared fits: a strength is laid on where the model is evaluated, unless a section says otherwise
_STRENGTH_OF = "evaluate"


@dataclass(frozen=True)
class Cell:
    """One combination: the values of the grid that count for it, and the settings of its stages, unresolved."""

    values: Mapping[str, Any]
    settings: Mapping[str, Mapping[str, Any]]


def make_cells(document: Mapping[str, Any], known: Mapping[str, set[str]]) -> list[Cell]:
    """The distinct cells of a grid file, in the file's order.

    Parameters
    ----------
    document
        The file: settings, sections of stages, and `grid`: a mapping of names to lists of values, with mappings of
        the same form for single stages, or a list of such mappings (the union of their products).
    known
        Stage → names of its settings.

    Raises
    ------
    ConfigError
        The grid is malformed, or holds a name that no stage takes.
    """
    _check_sections(document)
    cells: list[Cell] = []
    used: set[str] = set()
    combinations = [c for part in _parts(document.get("grid")) for c in _product(part, known)]
    for combination in combinations:
        values, settings = _cell(combination, document, known)
        used |= {name for name, value in values.items() if value is not None}
        cell = Cell(values, settings)
        if cell not in cells:
            cells.append(cell)
    given = dict.fromkeys(name for c in combinations for name, value in c.items() if value is not None)
    unused = [name for name in given if name not in used]
    if unused:
        raise ConfigError(
            f"grid: expected settings that a stage takes from it, got {unused[0]!r}, which a section fixes or no stage "
            "of these cells reads; leave it out of one of the two"
        )
    names = list(dict.fromkeys(name for cell in cells for name in cell.values))
    return [Cell({name: cell.values.get(name) for name in names}, cell.settings) for cell in cells]


def _check_sections(document: Mapping[str, Any]) -> None:
    taken = [("", name) for name in ("store", "intervention", "overwrite") if name in document]
    taken += [
        (f"section {stage!r}: ", name) for stage in STAGES for name in _OURS[stage] & set(document.get(stage) or {})
    ]
    if "strength" in document and not _evaluates(document):
        raise ConfigError(
            "expected 'strength' in the section 'fit' of a sweep that evaluates nothing, got it on top, where it counts"
            " for evaluations alone"
        )
    for where, name in taken:
        raise ConfigError(f"{where}expected no {name!r} in a grid file: the sweep sets it; leave it out")


def _parts(grid: Any) -> list[Mapping[str, Any]]:
    parts = grid if isinstance(grid, list) else [grid]
    if not parts or not all(isinstance(part, dict) and part for part in parts):
        raise ConfigError(f"grid: expected names and lists of values, or a list of such grids, got {grid!r}")
    return parts


def _product(part: Mapping[str, Any], known: Mapping[str, set[str]]) -> Iterator[dict[str, Any]]:
    """`{"method": [a, b], "evaluate": {"seed": [0]}}` → {"method": a, "evaluate.seed": 0}, …"""
    axes: dict[str, Sequence[Any]] = {}
    for name, values in part.items():
        nested = values.items() if name in STAGES and isinstance(values, dict) else [("", values)]
        for own, listed in nested:
            axis = f"{name}.{own}" if own else str(name)
            if axis in axes:
                raise ConfigError(f"grid: expected one list of values for {axis!r}, got two")
            _check_axis(axis, listed, known)
            axes[axis] = listed
    for combination in product(*axes.values()):
        yield dict(zip(axes, combination, strict=True))


def _check_axis(axis: str, values: Any, known: Mapping[str, set[str]]) -> None:
    stage, dot, name = axis.rpartition(".")
    if name in EXECUTION or name in known["score"]:
        raise ConfigError(f"grid: expected settings that change a result, got {name!r}; set it outside the grid")
    allowed = known[stage] - _OURS[stage] if dot else set().union(*known.values()) - {"store", "out", "intervention"}
    if name not in allowed:
        raise ConfigError(f"grid: unknown name {axis!r}; known: {', '.join(sorted(allowed - EXECUTION))}")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"grid: {axis}: expected a list of values, got {values!r}")


def _cell(
    combination: Mapping[str, Any], document: Mapping[str, Any], known: Mapping[str, set[str]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The values that count, the others as None; and the settings of every stage that the cell needs."""
    chosen = {stage: _chosen(stage, combination, document, known[stage]) for stage in STAGES}
    settings = {stage: _settings(stage, document, known[stage]) for stage in STAGES}
    for stage, taken in chosen.items():
        settings[stage] |= {axis.rpartition(".")[2]: combination[axis] for axis in taken}
    needed = set(STAGES)
    if not _evaluates(document):
        needed.discard("evaluate")
    if settings["fit"].get("method") == PLAIN:
        needed &= {"evaluate"}
        settings["evaluate"].pop("strength", None)
        chosen["evaluate"] = {axis for axis in chosen["evaluate"] if not axis.endswith("strength")}
        counted = chosen["evaluate"] | {axis for axis in chosen["fit"] if axis.endswith("method")}
    else:
        _settle_fit(settings, chosen)
        counted = set().union(*(chosen[stage] for stage in needed))
    if not needed:
        raise ConfigError(f"grid: method {PLAIN}: expected a section 'evaluate' for it, got a sweep that ends with fit")
    return (
        {axis: value if axis in counted else None for axis, value in combination.items()},
        {stage: settings[stage] for stage in STAGES if stage in needed},
    )


def _evaluates(document: Mapping[str, Any]) -> bool:
    return "evaluate" in document or any("evaluate" in part for part in _parts(document.get("grid")))


def _settle_fit(settings: Mapping[str, dict[str, Any]], chosen: Mapping[str, set[str]]) -> None:
    """What other settings decide: the concept, and α, which `damp` alone looks at."""
    fit, concepts = settings["fit"], settings["collect"].get("concepts")
    if "concept" not in fit and concepts:
        fit["concept"] = concepts[0] if isinstance(concepts, list) else concepts
    varied = {axis.rpartition(".")[2] for axis in chosen["fit"]}
    if fit.get("method", "aura") != "damp" and varied & {"alpha", "method"}:
        fit.pop("alpha", None)
        chosen["fit"].difference_update({"alpha", "fit.alpha"})


def _settings(stage: str, document: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """What the file fixes for a stage: top < section."""
    top = {k: v for k, v in document.items() if k in known and k not in STAGES and _reaches(stage, k)}
    return {**top, **(document.get(stage) or {})}


def _chosen(stage: str, combination: Mapping[str, Any], document: Mapping[str, Any], known: set[str]) -> set[str]:
    """The axes whose value a stage takes: its own, and those that neither its section nor its own axes decide."""
    section = set(document.get(stage) or {})
    own = {axis for axis in combination if axis.startswith(f"{stage}.")}
    fixed = section | {axis.rpartition(".")[2] for axis in own}
    shared = {a for a in combination if "." not in a and a in known and a not in fixed and _reaches(stage, a)}
    return shared | own


def _reaches(stage: str, name: str) -> bool:
    """Whether a setting that stands for all stages counts for this one."""
    return name not in _OURS[stage] and (name != "strength" or stage == _STRENGTH_OF)
