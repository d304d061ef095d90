"""Sweeps through submitit on a real Slurm: shared collections, failing and killed cells, stop, start and requeue."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.slurm.conftest import REPOSITORY, tail

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def write_grid(directory: Path, model: Path, data: str, grid, **more) -> Path:
    """A grid file over a tiny model."""
    document = {
        "model": str(model),
        "out": str(directory / "sweep"),
        "retries": 0,
        "resources": {"slurm_partition": "main", "timeout_min": 10, "cpus_per_task": 1, "slurm_mem": "1500MB"},
        "collect": {"data": data, "concepts": ["toxic"], "num_positive": 20, "num_negative": 20},
        "grid": grid,
        **more,
    }
    path = directory / "grid.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def start(slurm, grid: Path) -> "subprocess.Popen[str]":
    """The sweep's command, as a user starts it on a login node."""
    command = [sys.executable, "-m", "aura_dist", "sweep", "--config", str(grid), "--launcher", "slurm"]
    return subprocess.Popen(command, env=slurm.env, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


def states(sweep: Path) -> dict[str, dict[str, object]]:
    return {p.stem: json.loads(p.read_text()) for p in sorted((sweep / "jobs").glob("*.json"))}


def wait_for(found: Callable[[], object], seconds: float = 200) -> object:
    """What `found` gives once it gives something."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def running(sweep: Path, stage: str) -> str | None:
    """Slurm's number of a job of that stage that is under way."""
    for name, state in states(sweep).items():
        number = sweep / "jobs" / f"{name}.slurm"
        if state["stage"] == stage and state["state"] == "running" and number.exists():
            return number.read_text().strip()
    return None


@dataclass(frozen=True)
class Run:
    """How a sweep's command ended, what it said, and then the table and the states of the jobs."""

    code: int
    said: str
    table: pd.DataFrame
    states: dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def swept(slurm, tiny_dir, sentences_csv, tmp_path_factory):
    """24 cells over two collections, and one that cannot be fitted as long as a directory is missing.

    The first command is interrupted, the second sees a fit killed, and a hand mends what is missing before the third.
    """
    directory = tmp_path_factory.mktemp("swept")
    grid = [
        {"seed": [0, 1], "method": ["aura", "damp", "det0"], "top_k": [2, 4, 6, 8]},
        {"seed": [0], "method": ["aura"], "fit": {"onto": [str(directory / "missing")]}},
    ]
    path, sweep = write_grid(directory, tiny_dir("gemma3"), sentences_csv, grid), directory / "sweep"
    runs = []

    def finish(command, timeout):
        said = command.communicate(timeout=timeout)[1]
        table = sweep / "table.parquet"
        runs.append(Run(command.returncode, said, pd.read_parquet(table) if table.exists() else None, states(sweep)))

    first = start(slurm, path)
    wait_for(lambda: running(sweep, "collect"))
    first.send_signal(signal.SIGINT)
    finish(first, 30)
    second = start(slurm, path)
    killed = wait_for(lambda: running(sweep, "fit"))
    assert slurm.run("scancel", "--signal=KILL", killed).returncode == 0
    finish(second, 200)
    shutil.copytree(next((sweep / "interventions").iterdir()), directory / "missing")
    finish(start(slurm, path), 120)
    return sweep, runs


def test_failed_and_killed_cells_leave_the_others_alone_and_a_rerun_does_what_is_left(swept):
    sweep, (interrupted, second, third) = swept
    assert interrupted.code == 130, interrupted.said
    assert "29 jobs stay in Slurm's queue" in interrupted.said

    logs = tail(sorted((sweep / "slurm").glob("*.err"))[-2:])
    assert second.code == 2, f"{second.said}\n{logs}"
    assert "error: 2 of 25 cells failed" in second.said, f"{second.said}\n{logs}"
    assert Counter(second.table["state"]) == {"done": 23, "failed": 2}
    reasons = " / ".join(second.table["reason"].dropna())
    assert "missing" in reasons
    assert re.search("killed by SIGTERM|killed by SIGKILL|the Slurm job has gone", reasons)
    assert Counter(s["stage"] for s in second.states.values()) == {"collect": 2, "score": 2, "fit": 25}

    assert third.code == 0, third.said
    assert set(pd.read_csv(sweep / "table.csv")["state"]) == {"done"}
    before, after = second.states, third.states
    again = {name for name in after if after[name] != before[name]}
    assert again == {name for name, state in before.items() if state["state"] == "failed"}
    assert {after[name]["starts"] for name in again} == {2}
    assert {after[name]["starts"] for name in set(after) - again} == {1}
    for name in (n for n in after if n.startswith("collect")):
        assert (sweep / after[name]["log"]).read_text().count("wrote") == 1, "collected once"


def test_jobs_go_on_without_the_driver_and_those_that_wait_for_one_that_failed_wait_again(
    slurm, swept, tiny_dir, sentences_csv, tmp_path
):
    """The collection is there from another grid; its scoring is killed, and then the driver."""
    sweep = Path(shutil.copytree(swept[0], tmp_path / "sweep"))
    for scores in sweep.glob("collections/*/store.zarr/scores"):
        shutil.rmtree(scores)
    earlier = set(states(sweep))
    values = {"method": ["aura", "det0"], "top_k": [3, 5]}
    more = {"retries": 1, "score": {"statistics": ["auroc"]}}
    path = write_grid(tmp_path, tiny_dir("gemma3"), sentences_csv, values, **more)

    def left():
        return {name: state for name, state in states(sweep).items() if name not in earlier}

    driver = start(slurm, path)
    killed = wait_for(lambda: any(s["state"] == "running" for s in left().values()) and running(sweep, "score"))
    wait_for(lambda: len(slurm.queue()) == 5)
    assert Counter(slurm.queue().values()) == {"RUNNING": 1, "PENDING": 4}, "Slurm holds them back"
    first = {state["submission"] for state in left().values()}
    assert slurm.run("scancel", "--signal=KILL", killed).returncode == 0
    wait_for(lambda: len({s["submission"] for s in left().values()} - first - {""}) == 5)
    wait_for(lambda: all((sweep / "jobs" / f"{name}.slurm").exists() for name in left()))
    driver.kill()
    driver.communicate(timeout=30)

    wait_for(lambda: all(s["state"] in ("done", "failed") for s in left().values()))
    found = left()
    assert {s["state"] for s in found.values()} == {"done"}, f"{found}\n{tail(list((sweep / 'logs').iterdir()))}"
    assert sorted((s["stage"], s["starts"]) for s in found.values()) == [*[("fit", 1)] * 4, ("score", 2)]
    said = start(slurm, path).communicate(timeout=60)[1]
    assert "6 jobs, 0 to run" in said
    assert set(pd.read_csv(sweep / "table.csv")["state"]) == {"done"}


@pytest.mark.slow
def test_warned_collection_of_a_sweep_goes_on_where_it_was(slurm, tiny_dir, sentences_csv, tmp_path):
    """Over two nodes, one rank each; submitit queues the job again at Slurm's warning."""
    grid = write_grid(tmp_path, tiny_dir("gemma3"), sentences_csv, {"method": ["aura"]}, sharding="fsdp")
    document = yaml.safe_load(grid.read_text())
    document["collect"] |= {"num_positive": 200, "num_negative": 200, "tokens_per_batch": 48, "modules": ["all"]}
    document["resources"]["collect"] = {"nodes": 2, "tasks_per_node": 1}
    grid.write_text(yaml.safe_dump(document))
    sweep = tmp_path / "sweep"
    slurm.env["MASTER_ADDR"] = "127.0.0.1"  # no host of this machine is named n1
    driver = start(slurm, grid)
    number = str(wait_for(lambda: running(sweep, "collect")))
    wait_for(lambda: any(f.read_bytes() != b"" for f in sweep.glob("collections/*/store.zarr/activations/*/max/c/*/0")))
    assert slurm.run("scancel", "--signal=USR1", number).returncode == 0
    wait_for(lambda: slurm.queue().get(number) == "PENDING")
    (state,) = (s for s in states(sweep).values() if s["stage"] == "collect")
    assert (state["state"], state["attempts"]) == ("queued", 0), "a warning is no failure"
    slurm.run("scontrol", "update", f"JobId={number}", "StartTime=now+4")
    said = driver.communicate(timeout=200)[1]
    assert driver.returncode == 0, f"{said}\n{tail(list((sweep / 'logs').iterdir()))}"
    (state,) = (s for s in states(sweep).values() if s["stage"] == "collect")
    assert (state["state"], state["starts"]) == ("done", 2)
    assert "stopped: SIGUSR1 received; finished tasks are kept" in (sweep / state["log"]).read_text()
