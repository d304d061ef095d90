"""What collections would take, by `aura-dist plan`, each asked in a process of its own: planning needs torch."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from aura_dist.runtime.cluster import available_cores
from aura_dist.runtime.job_state import reason_of

_SECONDS_AN_HOUR = 3600
# what moves no figure of a plan
_IRRELEVANT = frozenset({"store", "seed"})


@dataclass(frozen=True)
class Cost:
    """Hours of all ranks together on GPUs and on CPUs, or why they are not known."""

    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    store_bytes: int = 0
    num_unknown: int = 0
    reason: str = ""

    @property
    def words(self) -> str:
        if self.reason:
            return f"not known: {self.reason}"
        hours = [f"{self.gpu_hours:.3g} GPU-hours"] if self.gpu_hours or not self.cpu_hours else []
        hours += [f"{self.cpu_hours:.3g} hours of CPU ranks"] if self.cpu_hours else []
        size = f", {self.store_bytes / 1e9:.3g} GB on disk"
        return " + ".join(hours) + size + (f", and {self.num_unknown} not known" if self.num_unknown else "")

    @staticmethod
    def total(costs: "Iterable[Cost]") -> "Cost":
        costs = list(costs)
        return Cost(
            sum(c.gpu_hours for c in costs),
            sum(c.cpu_hours for c in costs),
            sum(c.store_bytes for c in costs),
            sum(bool(c.reason) for c in costs),
        )


def plan_costs(collections: Mapping[str, Mapping[str, Any]]) -> dict[str, Cost]:
    """Name → settings of `plan`; equal ones are asked once."""
    keys = {
        name: json.dumps({k: v for k, v in settings.items() if k not in _IRRELEVANT}, sort_keys=True)
        for name, settings in collections.items()
    }
    distinct = list(dict.fromkeys(keys.values()))
    with ThreadPoolExecutor(available_cores()) as pool:
        found = dict(zip(distinct, pool.map(_ask, map(json.loads, distinct)), strict=True))
    return {name: found[key] for name, key in keys.items()}


def _ask(settings: Mapping[str, Any]) -> Cost:
    with TemporaryDirectory() as directory:
        config = Path(directory) / "plan.yaml"
        config.write_text(yaml.safe_dump(dict(settings)))
        command = [sys.executable, "-m", "aura_dist", "plan", "--config", str(config), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        plan = json.loads(done.stdout)
        hours = settings["world_size"] * (plan["compute_seconds"] + plan["stream_seconds"]) / _SECONDS_AN_HOUR
        size = int(plan["store"]["compressed_bytes"])
    except (ValueError, KeyError):
        return Cost(reason=reason_of(done.returncode, done.stderr))
    refused = reason_of(done.returncode, done.stderr) if done.returncode else ""
    gpu = bool(plan["machine"]["gpu"])
    return Cost(hours if gpu else 0.0, 0.0 if gpu else hours, size, reason=refused)
