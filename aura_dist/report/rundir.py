"""A run directory: `config.yaml`, `store.zarr`, `interventions/<name>/`, `results/<name>.json`; any may be missing.

The directory of a sweep has several stores, which its runs share, and a state file for each job.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from aura_dist.errors import StoreError
from aura_dist.interventions.artifact import Intervention
from aura_dist.report.evaluations import Evaluation, read_evaluation

CONFIG, STORE, INTERVENTIONS, RESULTS, JOBS = "config.yaml", "store.zarr", "interventions", "results", "jobs"
SWEEP = "sweep.yaml"
# names of the present grid's jobs; jobs/ also keeps the state files of earlier grids' jobs
JOBS_FILE = "jobs.json"
# the stores of a sweep
_STORES = ("collections/*/*.zarr", "stores/*.zarr")


@dataclass(frozen=True)
class Fitted:
    """An intervention of a run, without its maps: its description, and how many neurons it changes."""

    name: str
    meta: Mapping[str, Any]
    num_changed: int
    num_neurons: int


@dataclass(frozen=True)
class RunDirectory:
    """Where the parts of a run are; no other run of the page has its name.

    `stores` are the paths of the stores within it; without any, the path or URL of the store that `config.yaml` names.
    """

    path: Path
    name: str
    stores: tuple[str, ...]

    def entries(self, part: str) -> list[Path]:
        """What a directory of the run holds, sorted; without hidden files, because they are being written."""
        place = self.path / part
        return sorted(p for p in place.iterdir() if not p.name.startswith(".")) if place.is_dir() else []

    @property
    def intervention_paths(self) -> list[Path]:
        return [p for p in self.entries(INTERVENTIONS) if p.is_dir()]

    @property
    def result_paths(self) -> list[Path]:
        return [p for p in self.entries(RESULTS) if p.suffix == ".json"]

    def interventions(self) -> list[Fitted]:
        """StoreError if one is damaged."""
        found = []
        for path in self.intervention_paths:
            loaded = Intervention.load(path)
            found.append(Fitted(path.name, loaded.meta, loaded.num_changed, loaded.num_neurons))
        return found

    def evaluations(self) -> list[Evaluation]:
        """InputError if one is damaged."""
        return [read_evaluation(self.name, path) for path in self.result_paths]


def is_run_directory(path: Path) -> bool:
    """Whether the directory has some part of a run."""
    return any((path / part).exists() for part in (STORE, INTERVENTIONS, RESULTS, SWEEP)) or bool(_stores(path))


def _stores(path: Path) -> tuple[str, ...]:
    own = [path / STORE] if (path / STORE).exists() else []
    shared = [found for pattern in _STORES for found in sorted(path.glob(pattern))]
    named = _config_store(path)
    return tuple(str(store) for store in [*own, *shared]) or (() if named is None else (named,))


def open_run(path: str) -> RunDirectory:
    """The run directory at `path`; StoreError if there is no directory, or nothing of a run in it."""
    place = Path(path)
    if not place.is_dir():
        found = "a file" if place.exists() else "nothing"
        raise StoreError(f"RUN_DIR {path!r}: expected a run directory, found {found}; name the directory of a run")
    if place.suffix == ".zarr" or (place / "zarr.json").is_file():
        raise StoreError(f"RUN_DIR {path!r}: expected a run directory, got a store; name the directory above it")
    if not is_run_directory(place):
        raise StoreError(
            f"RUN_DIR {path!r}: expected {STORE}, {INTERVENTIONS}/, {RESULTS}/ or a {CONFIG} that names a store, "
            "found none of them; name the directory that --store and --out were given in"
        )
    return RunDirectory(place, place.resolve().name, _stores(place))


def named_apart(runs: Sequence[RunDirectory]) -> list[RunDirectory]:
    """The runs, each directory once; if two have one name, all names get directories above them until they differ."""
    by_path = {run.path.resolve(): run for run in runs}
    depth, names = 1, [path.name for path in by_path]
    while len(set(names)) < len(by_path):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in by_path]
    return [replace(run, name=name) for run, name in zip(by_path.values(), names, strict=True)]


def _config_store(path: Path) -> str | None:
    """The store that the run's `config.yaml` names, at the top or in the section `collect`."""
    try:
        document = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(document, dict):
        return None
    section = document.get("collect")
    store = document.get("store") or (section.get("store") if isinstance(section, dict) else None)
    return store if isinstance(store, str) else None
