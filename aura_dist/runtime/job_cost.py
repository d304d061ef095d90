"""What collections and evaluations would take, each asked in a process of its own: planning needs torch."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aura_dist.runtime.cluster import available_cores
from aura_dist.runtime.job_state import reason_of

_SECONDS_AN_HOUR = 3600
# what moves no figure
_IRRELEVANT = frozenset({"store", "seed", "strength", "intervention", "out"})
# stage → the module that is asked, and its words before and after the file of settings
_ASKED = {
    "collect": (("aura_dist", "plan", "--config"), ("--json",)),
    "evaluate": (("aura_dist.stages.plan_evaluation",), ()),
}


@dataclass(frozen=True)
class Cost:
    """Hours of all ranks together on GPUs and on CPUs, or why they are not known."""

    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    store_bytes: int = 0
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
        more += [f"and {self.num_unknown} not known"] if self.num_unknown else []
        more += [f"without {self.left_out}"] if self.left_out else []
        return ", ".join([" + ".join(hours), *more])

    @staticmethod
    def total(costs: "Iterable[Cost]") -> "Cost":
        costs = list(costs)
        known = [cost for cost in costs if not cost.reason]
        return Cost(
            sum(c.gpu_hours for c in known),
            sum(c.cpu_hours for c in known),
            sum(c.store_bytes for c in known),
            len(costs) - len(known),
            left_out=", ".join(dict.fromkeys(c.left_out for c in known if c.left_out)),
        )


def plan_costs(jobs: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, Cost]:
    """Name → stage (`collect` or `evaluate`) and settings to plan with; equal ones are asked once."""
    keys = {
        name: json.dumps([stage, {k: v for k, v in settings.items() if k not in _IRRELEVANT}], sort_keys=True)
        for name, (stage, settings) in jobs.items()
    }
    distinct = list(dict.fromkeys(keys.values()))
    with ThreadPoolExecutor(available_cores()) as pool:
        found = dict(zip(distinct, pool.map(lambda key: _ask(*json.loads(key)), distinct), strict=True))
    return {name: found[key] for name, key in keys.items()}


def _ask(stage: str, settings: Mapping[str, Any]) -> Cost:
    before, after = _ASKED[stage]
    with TemporaryDirectory() as directory:
        file = Path(directory) / "settings.json"  # which is YAML too
        file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        command = [sys.executable, "-m", *before, str(file), *after]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)
        if stage == "evaluate":
            hours, size, gpu = found["seconds"] / _SECONDS_AN_HOUR, 0, found["gpu"]
        else:
            hours = settings["world_size"] * (found["compute_seconds"] + found["stream_seconds"]) / _SECONDS_AN_HOUR
            size, gpu = int(found["store"]["compressed_bytes"]), found["machine"]["gpu"]
    except (ValueError, KeyError):
        return Cost(reason=reason_of(done.returncode, done.stderr))
    refused = reason_of(done.returncode, done.stderr) if done.returncode else ""
    return Cost(hours if gpu else 0.0, 0.0 if gpu else hours, size, reason=refused, left_out=found.get("left_out", ""))
