"""Cells → jobs: each distinct collection, scoring, fit and evaluation once, after those it needs. Pure functions.

A job is named after what it computes: a digest of its settings that differ from their defaults. So another grid over
the same settings finds the same jobs, and a setting that a later version adds changes no name.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from aura_dist.sweep.stage_specs import EXECUTION, STAGE_SPECS

DIGEST_LENGTH = 10
LABEL_LENGTH = 60


@dataclass(frozen=True)
class Job:
    """One run of one stage. Its name is readable, and unique among the stage's jobs."""

    stage: str
    name: str
    # of the stage, without `paths`
    settings: Mapping[str, Any]
    # setting → path within the sweep's directory of what the stage reads or writes
    paths: Mapping[str, str]
    # ids of the jobs that must be done before
    needs: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.stage}-{self.name}"

    @property
    def product(self) -> str:
        """The path that exists once the job is done."""
        return self.paths["out" if "out" in self.paths else "store"]


def ends(chain: Sequence[Job]) -> list[Job]:
    """The jobs that no other of the chain waits for."""
    needed = {need for job in chain for need in job.needs}
    return [job for job in chain if job.id not in needed]


@dataclass(frozen=True)
class Graph:
    """The jobs of a sweep, each after those that it needs; and each cell's jobs in the same order."""

    jobs: Mapping[str, Job]
    chains: Sequence[Sequence[Job]]

    @property
    def ends(self) -> set[str]:
        """Ids of the jobs that cells end with."""
        return {job.id for chain in self.chains for job in ends(chain)}

    def descendants(self, job: str) -> list[Job]:
        """All jobs that wait for a job, directly or not."""
        found: dict[str, Job] = {}
        for other in self.jobs.values():  # each after those it needs
            if not found.keys().isdisjoint(other.needs) or job in other.needs:
                found[other.id] = other
        return list(found.values())

    def plain(self, job: str) -> str | None:
        """The job that does the same as `job` without the jobs that `job` needs: the plain model's evaluation."""
        one = self.jobs[job]
        same = (j.id for j in self.jobs.values() if j.stage == one.stage and not j.needs and _alone(j) == _alone(one))
        return next(same, None) if one.needs else None


def _alone(job: Job) -> dict[str, Any]:
    """The settings that have an effect on a result also in a job that needs no other."""
    without = EXECUTION | (STAGE_SPECS[job.stage].alone or frozenset())
    return {name: value for name, value in job.settings.items() if name not in without}


def make_graph(resolved: Sequence[Mapping[str, Mapping[str, Any]]]) -> Graph:
    """The jobs of all cells, from each cell's settings: stage → those that differ from their defaults, without paths.

    Settings that mean the same must be equal.
    """
    jobs: dict[str, Job] = {}
    chains = []
    for settings in resolved:
        chain: dict[str, Job] = {}
        for stage in STAGE_SPECS:
            if stage in settings:
                job = _job(stage, settings[stage], chain)
                chain[stage] = jobs.setdefault(job.id, job)
        chains.append(tuple(chain.values()))
    order = sorted(jobs.values(), key=lambda job: list(STAGE_SPECS).index(job.stage))
    return Graph({job.id: job for job in order}, chains)


def _job(stage: str, settings: Mapping[str, Any], chain: Mapping[str, Job]) -> Job:
    spec = STAGE_SPECS[stage]
    needed = [chain[name] for name in spec.needs if name in chain]
    computing = {name: value for name, value in settings.items() if name not in EXECUTION}
    origins = [_origin(job, chain) for job in needed]
    content = json.dumps([stage, computing, origins], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:DIGEST_LENGTH]
    if spec.label is None:
        name = "-".join([needed[0].name, *([digest] if computing else [])])
    else:
        words = spec.label(settings, [job.name.rpartition("-")[0] for job in needed])
        label = "-".join(re.sub(r"[^A-Za-z0-9.-]+", "_", word).strip("_.") for word in words)
        name = f"{label[:LABEL_LENGTH]}-{digest}"
    paths = {}
    for setting, path in spec.paths.items():
        with suppress(KeyError):  # of a job that this cell does without
            paths[setting] = path.format(name=name, **{job.stage: job.paths for job in needed})
    return Job(stage, name, settings, paths, tuple(job.id for job in needed))


def _origin(job: Job, chain: Mapping[str, Job]) -> str:
    """What the digest of a later job says of this one; of a stage without labels, nothing of its settings."""
    spec = STAGE_SPECS[job.stage]
    return job.id if spec.label else f"{job.stage}-{chain[spec.needs[0]].name}"
