"""status: how far a run or a directory of runs is, from its files alone. Never imports torch."""

import time
from collections.abc import Sequence

from aura_dist.config import StatusConfig
from aura_dist.evaluation.report.rundir import named_apart
from aura_dist.evaluation.status import RunStatus, find_runs, run_status
from aura_dist.runtime.progress import clock


def run(config: StatusConfig) -> None:
    """Print what is done, half done, damaged and left."""
    found = [run_status(one) for one in named_apart(find_runs(config.run_dir))]
    print(_one(found[0]) if len(found) == 1 else _many(found))


def _one(status: RunStatus) -> str:
    """A line a part."""
    rows = [(p.name, p.state, p.count, p.detail) for p in status.parts]
    return "\n".join([f"{status.name}: last change {_ago(status)}", *_aligned(rows)])


def _many(found: Sequence[RunStatus]) -> str:
    """A line a run, and below what is damaged."""
    header = ("run", *(part.name for part in found[0].parts), "last change")
    rows = [(s.name, *(_cell(part.state, part.count) for part in s.parts), _ago(s)) for s in found]
    damaged = [f"{s.name}: {p.name}: {p.detail}" for s in found for p in s.parts if p.state == "damaged"]
    whole = sum(s.is_finished for s in found)
    summary = f"{whole} of {len(found)} runs have every part"
    return "\n".join([*_aligned([header, *rows]), summary, *damaged])


def _cell(state: str, count: str) -> str:
    return f"{state} {count}".strip() if state != "nothing" else "–"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _ago(status: RunStatus) -> str:
    now = time.time()
    running = ", seems to be running" if status.seems_running(now) else ""
    return "–" if status.changed is None else f"{clock(max(now - status.changed, 0))} ago{running}"
