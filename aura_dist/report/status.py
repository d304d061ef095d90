"""How far runs are: which stages are done, half done, damaged or not begun. Reads neither responses nor scores."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr

from aura_dist.errors import AuraError
from aura_dist.interventions.artifact import META_FILE, WEIGHTS_FILE, method_of
from aura_dist.report.evaluations import read_evaluation
from aura_dist.report.rundir import INTERVENTIONS, JOBS, JOBS_FILE, RESULTS, RunDirectory, is_run_directory, open_run
from aura_dist.scoring.scores import count_columns, score_attributes, score_path, scored_statistics
from aura_dist.store.access import is_vacant, local_path, open_group, read_array
from aura_dist.store.schema import DONE, StoreSpec, response_paths, tasks_of

FINISHED, HALF_DONE, NOTHING, DAMAGED = "done", "half done", "nothing", "damaged"
FRESH_SECONDS = 120.0


@dataclass(frozen=True)
class Part:
    """A stage's part of a run: `state` is done, half done, nothing or damaged; `count` says how much there is."""

    name: str
    state: str
    count: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Job:
    """A sweep's job: `state` is queued, running, done or failed; `seconds` of its last attempt; why it failed."""

    name: str
    state: str
    seconds: float
    reason: str


@dataclass(frozen=True)
class RunStatus:
    """How far a run is: its parts in the order of the pipeline, `collect` and `score` for each store; a sweep's jobs.

    `changed` is when a file of the run last changed, in seconds since the epoch.
    """

    name: str
    parts: tuple[Part, ...]
    jobs: tuple[Job, ...]
    changed: float | None

    @property
    def is_finished(self) -> bool:
        return all(part.state == FINISHED for part in self.parts) and all(job.state == "done" for job in self.jobs)

    def seems_running(self, now: float) -> bool:
        """Whether something is half done and a file has just changed; files cannot say more."""
        half = any(part.state == HALF_DONE for part in self.parts) or any(job.state == "running" for job in self.jobs)
        return half and self.changed is not None and now - self.changed < FRESH_SECONDS


def find_runs(path: str) -> list[RunDirectory]:
    """The run at `path`, or the runs up to two directories below it; StoreError if there is none."""
    place = Path(path)
    if not place.is_dir() or is_run_directory(place):
        return [open_run(path)]
    children = [p for p in sorted(place.iterdir()) if p.is_dir() and p.suffix != ".zarr"]
    below = [q for p in children for q in (sorted(p.iterdir()) if not is_run_directory(p) else [p]) if q.is_dir()]
    found = [open_run(str(p)) for p in below if p.suffix != ".zarr" and is_run_directory(p)]
    return found or [open_run(path)]


def run_status(run: RunDirectory) -> RunStatus:
    """How far a run is; damage is the state of a part, never an error."""
    stores = [part for store in run.stores for part in _store_parts(store)]
    parts = [*(stores or [Part("collect", NOTHING), Part("score", NOTHING)]), _interventions(run), _results(run)]
    changed = max(_changes(run), default=None)
    return RunStatus(run.name, tuple(parts), tuple(_jobs(run)), changed)


def _jobs(run: RunDirectory) -> Iterator[Job]:
    """The jobs of a sweep's present grid; skips files that are no state file, or that are just being written."""
    try:
        present = set(json.loads((run.path / JOBS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        present = set()
    for path in (p for p in run.entries(JOBS) if p.suffix == ".json"):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if present and found["job"] not in present:
                continue
            yield Job(found["job"], found["state"], float(found.get("seconds") or 0), str(found.get("reason") or ""))
        except (OSError, ValueError, KeyError, TypeError):
            continue


def _store_parts(store: str) -> list[Part]:
    try:
        group = open_group(store)
        spec = StoreSpec.of(group)
        return [_collection(group, spec), _scores(group, spec)]
    except AuraError as error:
        state = NOTHING if _is_missing(store) else DAMAGED
        return [Part("collect", state, "", str(error)), Part("score", NOTHING)]


def _is_missing(store: str) -> bool:
    """Whether nothing is at a path or a URL, as far as that can be asked."""
    try:
        return is_vacant(store)
    except (AuraError, OSError):
        return False


def _collection(group: zarr.Group, spec: StoreSpec) -> Part:
    done, tokens = read_array(group, DONE), read_array(group, "samples/num_tokens")
    rows = sum(t.stop - t.start for t in tasks_of(tokens, spec.tokens_per_batch) if done[t.index])
    neurons = sum(site.width for site in spec.sites)
    detail = f"{rows:,} of {len(tokens):,} rows, {len(spec.sites):,} modules, {neurons:,} neurons"
    finished = int(np.count_nonzero(done))
    return Part("collect", _state(finished, len(done)), f"{finished:,} of {len(done):,} tasks", detail)


def _scores(group: zarr.Group, spec: StoreSpec) -> Part:
    if not spec.concepts:
        return Part("score", NOTHING, "", "texts without labels")
    if not spec.poolings:
        return Part("score", NOTHING, "", "tokens alone; `score --pooling` makes poolings of them")
    scored, total = count_columns(group, spec)
    statistics = scored_statistics(group, spec.sites[-1].name, spec.poolings[-1])
    basis = score_attributes(group)
    notes = [f"{len(statistics)} statistics"] if scored == total else []
    if basis.get("partial"):
        notes.append(f"of {basis['num_rows']:,} of {basis['total_rows']:,} rows")
    return Part("score", _state(scored, total), f"{scored:,} of {total:,} chunk columns", ", ".join(notes))


def _state(done: int, total: int) -> str:
    return FINISHED if done == total else HALF_DONE if done else NOTHING


def _interventions(run: RunDirectory) -> Part:
    whole, broken = [], []
    for path in run.intervention_paths:
        try:  # the description alone, because maps take long to read
            meta = json.loads((path / META_FILE).read_text(encoding="utf-8"))
            (path / WEIGHTS_FILE).stat()
            whole.append(f"{path.name} ({method_of(meta)})")
        except (OSError, ValueError, AttributeError):  # missing, no JSON, or not a mapping
            broken.append(path.name)
    return _listed("fit", whole, [], broken)


def _results(run: RunDirectory) -> Part:
    whole, broken = [], []
    taken: set[str] = set()
    for path in run.result_paths:
        try:
            one = read_evaluation(run.name, path)
            whole.append(one.name)
            taken.add(str(one.toxicity.get("continuations")))
        except AuraError:
            broken.append(path.name)
    begun = [p for p in run.entries(RESULTS) if p.suffix == ".jsonl" and p.is_file() and p.name not in taken]
    half = [f"{p.name} ({_count_lines(p):,} lines)" for p in begun]
    return _listed("evaluate", whole, half, broken)


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _listed(name: str, whole: list[str], half: list[str], broken: list[str]) -> Part:
    texts = [", ".join(whole)] if whole else []
    texts += [f"half done: {', '.join(half)}"] if half else []
    texts += [f"damaged: {', '.join(broken)}"] if broken else []
    state = DAMAGED if broken else HALF_DONE if half else FINISHED if whole else NOTHING
    return Part(name, state, f"{len(whole):,}" if texts else "", "; ".join(texts))


def _changes(run: RunDirectory) -> Iterator[float]:
    """When the files changed that stages write; of a store, only the few that change with its progress."""
    places = [*run.entries(RESULTS), *run.intervention_paths]
    places += [run.path / part for part in (RESULTS, INTERVENTIONS, JOBS)]
    for path in run.stores:
        store = local_path(path)
        places += [] if store is None else _store_places(store)
    for place in places:
        try:
            yield place.stat().st_mtime
        except OSError:  # missing, or just removed
            continue


def _store_places(store: Path) -> list[Path]:
    try:
        spec = StoreSpec.from_attributes(json.loads((store / "zarr.json").read_text(encoding="utf-8"))["attributes"])
    except (OSError, ValueError, KeyError, TypeError, AuraError):
        return [store]
    names = [(site.name, pooling) for site in spec.sites for pooling in spec.poolings]
    chunks = [store / name / "c" for name in (DONE, response_paths(spec)[0])]
    spans = [store / score_path(*name) / "c" / "0" / "0" for name in names]  # the directory of their files
    return [store, *chunks, *spans]
