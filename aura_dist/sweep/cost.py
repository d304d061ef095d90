"""`sweep --dry-run`: what is left of a sweep, and what it costs.

Planning needs torch, so processes of their own plan the jobs, and this one never imports it.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from signal import SIGINT
from tempfile import TemporaryDirectory
from typing import Any

from aura_dist.errors import ConfigError, brief
from aura_dist.ranks.process import available_cores
from aura_dist.sweep.graph import Graph
from aura_dist.sweep.grid import Cell
from aura_dist.sweep.jobs import reason_of
from aura_dist.sweep.stage_specs import STAGE_SPECS, Settings
from aura_dist.sweep.table import render_plan

# settings that change no figure
_IRRELEVANT = frozenset({"store", "seed", "strength", "intervention", "out"})
# Starting a planner takes seconds and planning a job about one, so each process plans at least four jobs.
_JOBS_A_PROCESS = 4


@dataclass(frozen=True)
class Cost:
    """Hours of all ranks together on GPUs and on CPUs, or why they are not known."""

    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    store_bytes: int = 0
    store_files: int = 0
    num_unknown: int = 0
    reason: str = ""
    left_out: str = ""

    @property
    def words(self) -> str:
        if self.reason:
            return f"not known: {self.reason}"
        hours = [f"{self.gpu_hours:.3g} GPU-hours"] if self.gpu_hours or not self.cpu_hours else []
        hours += [f"{self.cpu_hours:.3g} hours of CPU ranks"] if self.cpu_hours else []
        more = [f"{self.store_bytes / 1e9:.3g} GB on disk"] if self.store_bytes else []
        more += [f"{self.store_files:,} files"] if self.store_files else []
        more += [f"and {self.num_unknown} not known"] if self.num_unknown else []
        more += [f"without {self.left_out}"] if self.left_out else []
        return ", ".join([" + ".join(hours), *more])

    @staticmethod
    def total(costs: "Collection[Cost]") -> "Cost":
        known = [cost for cost in costs if not cost.reason]
        gpu_hours, cpu_hours = sum(c.gpu_hours for c in known), sum(c.cpu_hours for c in known)
        left_out = ", ".join(dict.fromkeys(c.left_out for c in known if c.left_out))
        size, files = (sum(getattr(c, what) for c in known) for what in ("store_bytes", "store_files"))
        return Cost(gpu_hours, cpu_hours, size, files, len(costs) - len(known), left_out=left_out)


def dry_run(
    cells: Sequence[Cell], graph: Graph, left: Mapping[str, Settings], plan: Settings, launch: Callable[[str], Settings]
) -> str:
    """Cells, jobs, and what the jobs that are left would take.

    `left` maps ids of jobs to their settings with paths, `plan` holds the file's settings of `plan`, and `launch` tells
    how a stage's job would be started, as flags of `plan`.
    """
    planned = {name: value for name, value in plan.items() if name not in ("data", "store")}
    wanted = {}
    for job, settings in left.items():
        stage = graph.jobs[job].stage
        if question := STAGE_SPECS[stage].cost_question:
            wanted[job] = stage, {**question(settings, planned), **launch(stage)}
    costs = plan_costs(wanted)
    text = render_plan(cells, graph, [graph.jobs[job] for job in left], {job: c.words for job, c in costs.items()})
    total = Cost.total(costs.values()).words if costs else "0 GPU-hours"
    note = "scoring, fits, sampling and scorers are not in it" if left else "nothing is left"
    return f"{text}\n\n{total} in all, if ranks are busy all the time; {note}"


def plan_costs(jobs: Mapping[str, tuple[str, Settings]]) -> dict[str, Cost]:
    """What each job costs, by its stage and the settings to plan with; equal questions are asked once."""
    keys = {
        name: json.dumps([stage, {k: v for k, v in settings.items() if k not in _IRRELEVANT}], sort_keys=True)
        for name, (stage, settings) in jobs.items()
    }
    distinct = list(dict.fromkeys(keys.values()))
    num_processes = max(1, min(available_cores(), ceil(len(distinct) / _JOBS_A_PROCESS)))
    shares = [distinct[first::num_processes] for first in range(num_processes)]
    found: dict[str, Cost] = {}
    stop = threading.Event()
    with ThreadPoolExecutor(num_processes) as pool:
        try:
            for share, costs in zip(shares, pool.map(partial(_ask, stop), shares), strict=True):
                found |= zip(share, costs, strict=True)
        except OSError as error:
            raise ConfigError(f"jobs cannot be planned: {brief(error)}; correct that, or set TMPDIR") from error
        except BaseException:  # a person wants the command to end
            stop.set()
            raise
    return {name: found[key] for name, key in keys.items()}


def _ask(stop: threading.Event, questions: Sequence[str]) -> list[Cost]:
    """Costs of the questions, in their order, from one process at a time.

    If a process ends early, the question that it was planning ended it: that cost is not known, and another process
    plans the questions after it, unless `stop` is set.
    """
    costs: list[Cost] = []
    while len(costs) < len(questions) and not stop.is_set():
        answers, ended = _answers(questions[len(costs) :])
        costs += map(_cost, answers)
        if len(costs) < len(questions):
            costs.append(Cost(reason=reason_of(ended.returncode, ended.stderr)))
        if ended.returncode == -SIGINT:
            stop.set()
    return [*costs, *[Cost(reason="interrupted")] * (len(questions) - len(costs))]


def _answers(questions: Sequence[str]) -> "tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]":
    """The answers of a process that are whole lines, and how the process ended."""
    with TemporaryDirectory() as directory:
        asked, answers = Path(directory, "jobs.json"), Path(directory, "answers.jsonl")
        asked.write_text(f"[{','.join(questions)}]", encoding="utf-8")
        command = [sys.executable, "-m", "aura_dist.stages.plan", str(asked), str(answers)]
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="backslashreplace", check=False
        )  # no terminal, so that a library cannot wait for a person's answer
        written = answers.read_text(encoding="utf-8") if answers.exists() else ""
    return [json.loads(line) for line in written.splitlines(keepends=True) if line.endswith("\n")], ended


def _cost(answer: Mapping[str, Any]) -> Cost:
    """The cost in an answer of `aura_dist.stages.plan`."""
    hours = {"gpu_hours" if answer.get("gpu") else "cpu_hours": answer.get("seconds", 0.0) / 3600}
    sizes = {name: answer.get(name, 0) for name in ("store_bytes", "store_files")}
    return Cost(**hours, **sizes, reason=answer.get("refused", ""), left_out=answer.get("left_out", ""))
