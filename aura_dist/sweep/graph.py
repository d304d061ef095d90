"""Cells → jobs: each distinct collection, scoring, fit and evaluation once, with what it waits for. Pure functions.

A job is named by what it computes: a digest of its settings, without those that equal a default, so that another grid
over the same settings finds the same jobs, and a later version's new settings change nothing.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aura_dist.sweep.grid import EXECUTION, STAGES, Cell

DIGEST_LENGTH = 10


@dataclass(frozen=True)
class Job:
    """One run of one stage.

    Attributes
    ----------
    stage
        `collect`, `score`, `fit` or `evaluate`.
    name
        Readable, and unique among the stage's jobs.
    settings
        Of the stage, without the paths of `paths`.
    paths
        Setting → path within the sweep's directory; a directory, store or file that a stage writes or reads.
    needs
        Ids of the jobs that must be done before.
    """

    stage: str
    name: str
    settings: Mapping[str, Any]
    paths: Mapping[str, str]
    needs: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.stage}-{self.name}"

    @property
    def product(self) -> str:
        """The path whose presence the finished job leaves."""
        return self.paths["out" if "out" in self.paths else "store"]


@dataclass(frozen=True)
class Graph:
    """The jobs of a sweep, each after those it needs; and of each cell the last one."""

    jobs: Mapping[str, Job]
    last: Sequence[str]

    def ancestry(self, job: str) -> list[Job]:
        """A job and all that it waits for, first to last."""
        found: dict[str, Job] = {}
        for needed in self.jobs[job].needs:
            found |= {j.id: j for j in self.ancestry(needed)}
        return [*found.values(), self.jobs[job]]

    def descendants(self, job: str) -> list[Job]:
        """All jobs that wait for a job, directly or not."""
        found: dict[str, Job] = {}
        for other in self.jobs.values():  # each after those it needs
            if not found.keys().isdisjoint(other.needs) or job in other.needs:
                found[other.id] = other
        return list(found.values())

    def plain(self, job: str) -> str | None:
        """The evaluation of the plain model by the very settings of the evaluation `job`, if there is one."""
        measured = _measuring(self.jobs[job])
        if self.jobs[job].stage != "evaluate" or not self.jobs[job].needs:
            return None
        same = (j.id for j in self.jobs.values() if j.stage == "evaluate" and not j.needs and _measuring(j) == measured)
        return next(same, None)


def _measuring(job: Job) -> dict[str, Any]:
    """The settings of an evaluation that say what is measured, whatever the model's intervention and how it is run."""
    return {name: value for name, value in job.settings.items() if name not in EXECUTION and name != "strength"}


def make_graph(cells: Sequence[Cell], resolved: Sequence[Mapping[str, Mapping[str, Any]]]) -> Graph:
    """The jobs of all cells.

    Parameters
    ----------
    cells
        For their order.
    resolved
        Of each cell: stage → settings that differ from their defaults, of one form each, without paths of the sweep.
    """
    jobs: dict[str, Job] = {}
    last = []
    for settings in resolved:
        before: dict[str, Job] = {}
        for stage in STAGES:
            if stage in settings:
                before[stage] = _job(stage, settings[stage], before)
        jobs |= {job.id: job for job in before.values() if job.id not in jobs}
        last.append(list(before.values())[-1].id)
    assert len(last) == len(cells)
    order = sorted(jobs.values(), key=lambda job: STAGES.index(job.stage))
    return Graph({job.id: job for job in order}, tuple(last))


def _job(stage: str, settings: Mapping[str, Any], before: Mapping[str, Job]) -> Job:
    needs = {"score": ["collect"], "fit": ["score"], "evaluate": ["fit"]}.get(stage, [])
    parents = [before[name] for name in needs if name in before]
    fixing = {k: v for k, v in settings.items() if k not in EXECUTION}
    # which statistics are asked for changes none of them: fits stay what they are
    origin = [f"score-{before['collect'].name}"] if stage == "fit" else [p.id for p in parents]
    digest = _digest([stage, fixing, origin])
    name = f"{_label(stage, settings, parents)}-{digest}"
    if stage == "collect":
        paths = {"store": f"collections/{name}/store.zarr"}
    elif stage == "score":  # one scoring a store, of its name; of other statistics than all, one more
        name, paths = "-".join([parents[0].name, *([digest] if fixing else [])]), dict(parents[0].paths)
    elif stage == "fit":
        paths = {"store": parents[0].paths["store"], "out": f"interventions/{name}"}
    else:
        paths = {"out": f"results/{name}.json"}
        if parents:
            paths["intervention"] = parents[0].paths["out"]
    return Job(stage, name, settings, paths, tuple(p.id for p in parents))


def _label(stage: str, settings: Mapping[str, Any], parents: Sequence[Job]) -> str:
    """What a person looks for first; a function of the settings alone."""
    model = str(settings.get("model", "")).rstrip("/").rpartition("/")[2]
    if stage == "collect":
        words = [model, *settings.get("modules", ["mlp"]), *settings.get("pooling", ["max"])]
    elif stage == "fit":
        words = [str(settings.get("method", "aura"))]
        words += [f"top{settings['top_k']}"] if "top_k" in settings else []
    else:
        words = [model, parents[0].name.rpartition("-")[0] if parents else "plain"]
        words += [f"s{settings['strength']:g}"] if "strength" in settings else []
    return "-".join(re.sub(r"[^A-Za-z0-9.-]+", "_", word).strip("_.") for word in words)[:60]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGEST_LENGTH]
