"""A grid of values → cells, each with the settings of every stage that it needs. Pure functions of mappings.

A *cell* is one row of the sweep's table. A stage takes a setting from the last of these places that has it: the top
of the file, the grid, the stage's section, the stage's section within the grid. So `collect: {pooling: [max, mean]}`
beside `grid: {pooling: [max, mean]}` leaves the grid's values to `fit`, and one collection serves both.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from aura_dist.errors import ConfigError
from aura_dist.sweep.stage_specs import EXECUTION, PLAIN, STAGE_SPECS


@dataclass(frozen=True)
class Cell:
    """One combination: the values of the grid that have an effect on it, and its stages' settings, unresolved."""

    values: Mapping[str, Any]
    settings: Mapping[str, Mapping[str, Any]]


def make_cells(document: Mapping[str, Any], known: Mapping[str, set[str]]) -> list[Cell]:
    """The distinct cells of a grid file, in the file's order; `known` maps each stage to the names of its settings.

    The file has settings, sections of stages, and `grid`. A grid maps names to lists of values, and stages to grids of
    their own. A list of grids has the combinations of each. ConfigError if the grid is malformed, or has a name that no
    stage takes.
    """
    _check_sections(document, known)
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
    _check_read(document, cells, known)
    names = list(dict.fromkeys(name for cell in cells for name in cell.values))
    return [Cell({name: cell.values.get(name) for name in names}, cell.settings) for cell in cells]


def _check_sections(document: Mapping[str, Any], known: Mapping[str, set[str]]) -> None:
    # `out` on top is the sweep's own directory
    reserved = [("", name) for name in sorted(_set_by_sweep() - {"out"}) if name in document]
    for stage, spec in STAGE_SPECS.items():
        reserved += [(f"section {stage!r}: ", name) for name in spec.set_by_sweep & set(document.get(stage) or {})]
    takers = [stage for stage in STAGE_SPECS if "strength" in known[stage] and _is_shared("strength", stage)]
    if "strength" in document and not any(_is_wanted(stage, document) for stage in takers):
        raise ConfigError(
            "expected 'strength' in the section 'fit' of a sweep that evaluates nothing, got it on top, where it counts"
            " for evaluations alone"
        )
    for where, name in reserved:
        raise ConfigError(f"{where}expected no {name!r} in a grid file: the sweep sets it; leave it out")


def _check_read(document: Mapping[str, Any], cells: Sequence[Cell], known: Mapping[str, set[str]]) -> None:
    """ConfigError for a setting outside the grid that no cell reads, unless plain models need no such stage."""
    read = {(stage, name) for cell in cells for stage, settings in cell.settings.items() for name in settings}
    there = {stage for stage, _ in read}
    skipped = {stage for stage in STAGE_SPECS if stage not in there and _is_wanted(stage, document)}
    given = [(name, {s for s in STAGE_SPECS if name in known[s] and _is_shared(name, s)}) for name in document]
    given += [(name, {stage}) for stage in sorted(there) for name in document.get(stage) or {}]
    for name, stages in given:
        if stages and stages.isdisjoint(skipped) and read.isdisjoint((stage, name) for stage in stages):
            raise ConfigError(
                f"expected settings that some cell of the grid reads, got {name!r}; leave it out, or add a method or "
                f"the section of a stage ({', '.join(sorted(stages))}) that reads it"
            )


def _set_by_sweep() -> set[str]:
    return set().union(*(spec.set_by_sweep for spec in STAGE_SPECS.values()))


def _parts(grid: Any) -> list[Mapping[str, Any]]:
    parts = grid if isinstance(grid, list) else [grid]
    if not parts or not all(isinstance(part, dict) and part for part in parts):
        raise ConfigError(f"grid: expected names and lists of values, or a list of such grids, got {grid!r}")
    return parts


def _product(part: Mapping[str, Any], known: Mapping[str, set[str]]) -> Iterator[dict[str, Any]]:
    """`{"method": [a, b], "evaluate": {"seed": [0]}}` → {"method": a, "evaluate.seed": 0}, …"""
    axes: dict[str, Sequence[Any]] = {}
    for name, values in part.items():
        nested = values.items() if name in STAGE_SPECS and isinstance(values, dict) else [("", values)]
        for own, listed in nested:
            axis = f"{name}.{own}" if own else str(name)
            if axis in axes:
                raise ConfigError(f"grid: expected one list of values for {axis!r}, got two")
            _check_axis(axis, listed, known)
            axes[axis] = listed
    for combination in product(*axes.values()):
        yield dict(zip(axes, combination, strict=True))


def _check_axis(axis: str, values: Any, known: Mapping[str, set[str]]) -> None:
    stage, _, name = axis.rpartition(".")
    unlabelled = [
        s for s, spec in STAGE_SPECS.items() if spec.label is None and (s == stage or name not in spec.unshared)
    ]
    if name in EXECUTION or any(name in known[s] for s in unlabelled):
        raise ConfigError(f"grid: expected settings that change a result, got {name!r}; set it outside the grid")
    shared = set().union(*known.values()) - _set_by_sweep()
    allowed = known[stage] - STAGE_SPECS[stage].set_by_sweep if stage in STAGE_SPECS else shared
    if name not in allowed:
        raise ConfigError(f"grid: unknown name {axis!r}; known: {', '.join(sorted(allowed - EXECUTION))}")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"grid: {axis}: expected a list of values, got {values!r}")


def _cell(
    combination: Mapping[str, Any], document: Mapping[str, Any], known: Mapping[str, set[str]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The grid's values, None for those without an effect; and the settings of every stage that the cell needs."""
    settings = {stage: _fixed(stage, document, known[stage]) for stage in STAGE_SPECS}
    chosen = {stage: _chosen(stage, combination, document, known[stage]) for stage in STAGE_SPECS}
    for stage, axes in chosen.items():
        settings[stage] |= {_setting(axis): combination[axis] for axis in axes}
    skipped = [s for s, spec in STAGE_SPECS.items() if spec.skipped_by and settings[s].get(spec.skipped_by) == PLAIN]
    needed = [s for s in STAGE_SPECS if _is_wanted(s, document) and not (skipped and STAGE_SPECS[s].alone is None)]
    if not needed:
        raise ConfigError(f"grid: method {PLAIN}: expected a section 'evaluate' for it, got a sweep that ends with fit")
    for stage in needed:
        spec, varied = STAGE_SPECS[stage], {_setting(axis) for axis in chosen[stage]}
        unread = spec.alone if skipped and spec.alone else spec.settle(settings, varied)
        settings[stage] = {name: value for name, value in settings[stage].items() if name not in unread}
        chosen[stage] = {axis for axis in chosen[stage] if _setting(axis) not in unread}
    counted = set().union(*(chosen[stage] for stage in needed))
    counted |= {axis for stage in skipped for axis in chosen[stage] if _setting(axis) == STAGE_SPECS[stage].skipped_by}
    return (
        {axis: value if axis in counted else None for axis, value in combination.items()},
        {stage: settings[stage] for stage in needed},
    )


def _is_wanted(stage: str, document: Mapping[str, Any]) -> bool:
    """Whether the sweep has this stage: an optional one only where the file names it."""
    named = stage in document or any(stage in part for part in _parts(document.get("grid")))
    return named or not STAGE_SPECS[stage].optional


def _fixed(stage: str, document: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """What the file sets for a stage outside the grid: top < section."""
    top = {k: v for k, v in document.items() if k in known and k not in STAGE_SPECS and _is_shared(k, stage)}
    return {**top, **(document.get(stage) or {})}


def _chosen(stage: str, combination: Mapping[str, Any], document: Mapping[str, Any], known: set[str]) -> set[str]:
    """The axes that a stage takes a value from: its own, and shared ones that neither its section nor its own set."""
    own = {axis for axis in combination if axis.startswith(f"{stage}.")}
    fixed = {*(document.get(stage) or {}), *map(_setting, own)}
    return own | {a for a in combination if "." not in a and a in known and a not in fixed and _is_shared(a, stage)}


def _setting(axis: str) -> str:
    """`evaluate.seed` → `seed`."""
    return axis.rpartition(".")[2]


def _is_shared(name: str, stage: str) -> bool:
    """Whether this stage takes the setting from a place that serves all stages."""
    return name not in STAGE_SPECS[stage].set_by_sweep | STAGE_SPECS[stage].unshared
