"""status: how far a run or a directory of runs is, from its files alone. Never imports torch."""

import time
from collections import Counter
from collections.abc import Sequence

from aura_dist.config.verbs import StatusConfig
from aura_dist.ranks.progress import clock
from aura_dist.report.rundir import named_apart
from aura_dist.report.status import DAMAGED, NOTHING, Part, RunStatus, find_runs, run_status
from aura_dist.sweep.stage_specs import STAGE_SPECS


def run(config: StatusConfig) -> None:
    """Print what is done, half done, damaged and missing."""
    found = [run_status(one) for one in named_apart(find_runs(config.run_dir))]
    print(_one(found[0]) if len(found) == 1 else _many(found))


def _one(status: RunStatus) -> str:
    """A line a part, and a line a job of a sweep."""
    parts = [(p.name, p.state, p.count, p.detail) for p in status.parts]
    lines = [f"{status.name}: last change {_ago(status)}", *_aligned(parts)]
    if status.jobs:
        counts = Counter(job.state for job in status.jobs)
        lines += ["", "jobs: " + ", ".join(f"{n} {state}" for state, n in counts.items())]
        lines += _aligned([(j.name, j.state, clock(j.seconds) if j.seconds else "", j.reason) for j in status.jobs])
    return "\n".join(lines)


def _many(found: Sequence[RunStatus]) -> str:
    """A line a run; below, a line for each damaged part and failed job."""
    rows = [(s.name, *(_cell([p for p in s.parts if p.name == name]) for name in STAGE_SPECS), _ago(s)) for s in found]
    faults = [f"{s.name}: {p.name} damaged: {p.detail}" for s in found for p in s.parts if p.state == DAMAGED]
    faults += [f"{s.name}: {j.name} failed: {j.reason}" for s in found for j in s.jobs if j.state == "failed"]
    summary = f"{sum(s.is_finished for s in found)} of {len(found)} runs have every part"
    return "\n".join([*_aligned([("run", *STAGE_SPECS, "last change"), *rows]), summary, *faults])


def _cell(parts: Sequence[Part]) -> str:
    """One stage of one run; for several stores, how many have which state."""
    if len(parts) == 1:
        return f"{parts[0].state} {parts[0].count}".strip() if parts[0].state != NOTHING else "–"
    return ", ".join(f"{n} {state}" for state, n in Counter(part.state for part in parts).items())


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _ago(status: RunStatus) -> str:
    now = time.time()
    running = ", seems to be running" if status.seems_running(now) else ""
    return "–" if status.changed is None else f"{clock(max(now - status.changed, 0))} ago{running}"
