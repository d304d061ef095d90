"""Sweeps on this machine: one table, every job once, failures with their reason, stop, start and growth."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from aura_dist.cli import main
from aura_dist.config.file import merge, read_config_file
from aura_dist.config.settings import resolve
from aura_dist.config.verbs import SweepConfig
from aura_dist.errors import ConfigError, StoreError
from aura_dist.evaluation.figures import ByPrompt, ratios
from aura_dist.evaluation.results import SCHEMA
from aura_dist.files import locked
from aura_dist.ranks.signals import StopFlag
from aura_dist.store.access import open_group
from aura_dist.store.record import commit, unfinished
from aura_dist.sweep.cost import Cost, plan_costs
from aura_dist.sweep.driver import Sweep, read_grid
from aura_dist.sweep.jobs import JobCommand
from aura_dist.sweep.launchers import LAUNCHERS
from aura_dist.sweep.stage_specs import kept
from tests.distributed.launch import REPOSITORY
from tests.stores import make_store

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def write(tiny_dir, sentences_csv):
    """`write(directory, grid, …)`: a grid file over a tiny model, without evaluation unless a section says so."""

    def file(directory, grid, **more) -> str:
        document = {
            "model": str(tiny_dir("gemma3")),
            "out": str(directory / "sweep"),
            "retries": 1,
            "jobs": 2,
            "collect": {"data": sentences_csv, "concepts": ["toxic"], "num_positive": 20, "num_negative": 20},
            "grid": grid,
            **more,
        }
        path = directory / "grid.yaml"
        path.write_text(yaml.safe_dump(document))
        return str(path)

    return file


@pytest.fixture
def sweep(write, tmp_path):
    return partial(write, tmp_path)


def states(tmp_path) -> dict[str, dict]:
    return {p.stem: json.loads(p.read_text()) for p in sorted((tmp_path / "sweep" / "jobs").glob("*.json"))}


@dataclass(frozen=True)
class Stopped:
    """A sweep that was interrupted as its collections had begun, and a second one that was started meanwhile."""

    config: str
    code: int
    said: str
    second: "subprocess.CompletedProcess[str]"
    states: dict[str, str]


@pytest.fixture(scope="module")
def stopped(write, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stopped")
    config = write(directory, {"seed": [0, 1], "method": ["aura"]})
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "aura_dist", "sweep", "--config", config]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        while not any(s["state"] == "running" for s in states(directory).values()):
            assert process.poll() is None
            time.sleep(0.05)
        second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    found = {name: state["state"] for name, state in states(directory).items()}
    with locked(directory / "sweep"):
        pass  # no process of the sweep is left: it would hold the lock
    return Stopped(config, process.returncode, said, second, found)


@pytest.fixture(scope="module")
def finished(stopped):
    """The directory of the interrupted sweep, once the same command was run again: two stores, scored and fitted."""
    assert main(["sweep", "--config", stopped.config]) == 0
    return Path(stopped.config).parent / "sweep"


@pytest.fixture
def grown(finished, tmp_path):
    """A copy of it, from which other grids can grow; the states of its jobs."""
    shutil.copytree(finished, tmp_path / "sweep")
    return states(tmp_path)


def test_interrupted_sweep_leaves_no_process_and_goes_on(stopped, finished):
    assert stopped.second.returncode == 2
    assert "expected no other sweep in it, got one that runs" in stopped.second.stderr
    assert stopped.code == 130
    assert "stopped: SIGINT received; finished tasks are kept: run the same command to go on" in stopped.said
    assert set(stopped.states.values()) == {"queued"}
    assert {s["state"] for s in states(finished.parent).values()} == {"done"}


def test_table_holds_what_single_commands_give_and_growth_runs_the_new_cells_only(grown, sweep, tmp_path):
    texts = tmp_path / "texts.csv"
    texts.write_text("text\nThe library opens at nine.\nIt rained all day.\n")
    config = sweep({"method": ["none", "aura"], "strength": [0.5]}, evaluate={"perplexity_texts": str(texts)})
    assert main(["sweep", "--config", config]) == 0
    after = states(tmp_path)
    assert {name: after[name] for name in grown} == grown, "what was done is not done again"
    assert Counter(s["stage"] for s in grown.values()) == {"collect": 2, "score": 2, "fit": 2}
    assert [s["stage"] for name, s in after.items() if name not in grown] == ["evaluate"] * 2
    table = pd.read_parquet(tmp_path / "sweep" / "table.parquet")
    assert table["method"].tolist() == ["none", "aura"]
    assert table["strength"][1] == 0.5
    written = pd.read_csv(tmp_path / "sweep" / "table.csv")
    pd.testing.assert_frame_equal(table, written.astype(table.dtypes))

    job = after[next(name for name in after if name.startswith("evaluate-") and "s0.5" in name)]
    settings = yaml.safe_load((tmp_path / "sweep" / "jobs" / f"{job['job']}.yaml").read_text())
    by_hand = ["evaluate", "--model", settings["model"], "--perplexity-texts", str(texts), "--strength", "0.5"]
    more = ["--intervention", settings["intervention"], "--out", str(tmp_path / "by-hand.json")]
    assert main([*by_hand, *more]) == 0
    expected = json.loads((tmp_path / "by-hand.json").read_text())["perplexity"]["token_weighted"]
    plain, ours = table["perplexity.token_weighted"]
    assert ours == pytest.approx(expected, rel=1e-6)
    assert ours != plain, "every cell has its own figure"
    increase = table["against_plain.perplexity_increase"]
    assert pd.isna(increase[0]), "the plain model itself"
    assert increase[1] == ours - plain

    config = sweep({"method": ["aura"], "strength": [0.5, 1.0]}, evaluate={"perplexity_texts": str(texts)})
    assert main(["sweep", "--config", config]) == 0
    now = states(tmp_path)
    assert {name: now[name] for name in after} == after, "an evaluation that was done neither"
    assert [s["stage"] for name, s in now.items() if name not in after] == ["evaluate"]
    halved, whole = pd.read_parquet(tmp_path / "sweep" / "table.parquet")["perplexity.token_weighted"]
    assert halved == ours
    assert whole not in (ours, plain)


def test_failed_cell_is_retried_then_listed_and_takes_no_other_with_it(grown, sweep, tmp_path, capsys):
    config = sweep({"method": ["aura", "mean-act", "det0"]})
    assert main(["sweep", "--config", config]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 1 of 3 cells failed, the first by fit-mean-act-")
    assert "collect with `--pooling max mean`" in error
    table = pd.read_csv(tmp_path / "sweep" / "table.csv").set_index("method")
    assert table["state"].to_dict() == {"aura": "done", "mean-act": "failed", "det0": "done"}
    assert "--pooling" in table["reason"]["mean-act"]
    after = states(tmp_path)
    assert {name: after[name] for name in grown} == grown, "what was done is not done again"
    starts = {s["job"].split("-")[1]: s["starts"] for name, s in after.items() if name not in grown}
    assert starts == {"det0": 1, "mean": 2}


@pytest.mark.parametrize("code", [1, 138])
def test_failure_takes_back_what_waits_for_it_and_starts_all_of_it_again(sweep, tmp_path, code):
    """A launcher that chains stands for Slurm's; the collection fails once, or is to be submitted again as Slurm has
    dropped it, and a fit that waits is reported too.
    """
    document = read_config_file(sweep({"method": ["aura", "det0"]}))
    cells, graph = read_grid(document)
    running = Sweep(resolve(SweepConfig, merge("sweep", document, {})), cells, graph)
    (tmp_path / "sweep").mkdir()
    running.prepare(document)
    asked = []

    class Launcher:
        chains, room, poll_seconds = True, 100, 0.0

        def adopt(self, commands):
            return []

        def start(self, commands):
            asked.append(("start", [c.stage for c in commands]))
            self.commands = commands
            return [c.job for c in commands]

        def withdraw(self, commands):
            asked.append(("withdraw", [c.stage for c in commands]))

        def ended(self):
            first = len([what for what, _ in asked if what == "start"]) == 1
            for command in self.commands[: 1 if first else None]:
                command.begin()
                command.log.touch()
                command.end(code if first else 0)
            ended = [self.commands[0], self.commands[-1]] if first else self.commands
            return [command.job for command in ended]

    with StopFlag() as stop:
        running.work(Launcher(), stop)
    everything = ["collect", "score", "fit", "fit"]
    assert asked[:3] == [("start", everything), ("withdraw", everything[1:]), ("start", everything)]
    assert {row["state"] for row in running.rows()} == {"done"}


def test_table_compares_with_the_plain_model_once_both_are_done(sweep, tmp_path):
    """Results of two methods' and the plain model's evaluations by hand, the plain one's last."""
    config = sweep({"method": ["none", "aura", "det0"]}, evaluate={"toxicity_prompts": "prompts.jsonl"})
    document = read_config_file(config)
    cells, graph = read_grid(document)
    running = Sweep(resolve(SweepConfig, merge("sweep", document, {})), cells, graph)
    (tmp_path / "sweep" / "results").mkdir(parents=True)

    def finish(job_id, shares):
        head = {"prompts_sha256": "p", "scorer": "s", "num_samples": 1, "settings": {}}
        kept = {"toxic_share": shares, "maximum": shares}
        results = {"schema": SCHEMA, "model_fingerprint": "f", "toxicity": {**head, "per_prompt": kept}}
        (tmp_path / "sweep" / graph.jobs[job_id].product).write_text(json.dumps(results))
        command = JobCommand(tmp_path / "sweep", job_id, "evaluate")
        command.begin()
        command.end(0)

    plain, aura, det0 = (chain[-1].id for chain in graph.chains)
    finish(aura, [0.5, 0.0, 0.25])
    finish(det0, [0.0, 0.0, 0.0])
    running.write_table()
    assert not [name for name in pd.read_csv(tmp_path / "sweep" / "table.csv") if name.startswith("against_plain.")]
    finish(plain, [1.0, 0.5, 0.5])
    running.write_table()
    table = pd.read_parquet(tmp_path / "sweep" / "table.parquet")
    found = table[[f"against_plain.times_less_toxic.{name}" for name in ("value", "low", "high")]]
    baseline, *others = (ByPrompt(np.array(s), np.array(s)) for s in ([1.0, 0.5, 0.5], [0.5, 0.0, 0.25], [0.0] * 3))
    expected = [list(ratios(baseline, other)["probability"].values()) for other in others]
    assert found.isna().all(axis=1).tolist() == [True, False, False]
    assert found.iloc[1:].to_numpy().tolist() == expected
    value, low, high = expected[-1]
    assert value == high == math.inf > low > 0, "no toxic continuation of three: infinitely fewer, at least so many"
    written = pd.read_csv(tmp_path / "sweep" / "table.csv")
    pd.testing.assert_frame_equal(table, written.astype(table.dtypes))
    assert not running.left()
    results = tmp_path / "sweep" / graph.jobs[aura].product
    results.write_text(results.read_text()[:-9])
    assert [job.id for job in running.left() if job.stage == "evaluate"] == [aura], "damaged results are made again"
    running.write_table()
    running._queue(graph.jobs[aura])
    assert not results.exists(), "evaluate replaces nothing that it did not write"
    assert results.with_name(f"{results.name}.damaged").exists()


def test_interrupted_stage_that_finished_tasks_or_columns_got_on(tmp_path):
    """By the marks of a real store, which are all there from the start."""
    store = make_store(tmp_path / "store.zarr", 400, [16], num_unfinished=3)
    assert kept("collect", tmp_path / "none.zarr") == 0
    before = kept("collect", store)
    group = open_group(str(store))
    left = unfinished(group)
    assert (before > 0, len(left)) == (True, 3)
    commit(group, left[0], {})
    assert kept("collect", store) == before + 1
    whole = make_store(tmp_path / "whole.zarr", 40, [16])
    assert kept("score", whole) == 0
    assert main(["score", "--store", str(whole), "--statistics", "auroc"]) == 0
    assert kept("score", whole) > 0


def test_interrupted_evaluation_that_continued_prompts_got_on(tmp_path):
    results = tmp_path / "gemma-aura.json"
    assert kept("evaluate", results) == 0
    (tmp_path / "gemma-aura.continuations.part-0.jsonl").write_text("{}\n")
    (tmp_path / "gemma-aura-s0.5.continuations.part-0.jsonl").write_text("another's\n")
    assert kept("evaluate", results) == 3


def test_lock_outlives_the_sweep_as_long_as_a_job_runs(tmp_path):
    with locked(tmp_path) as lock:
        job = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    try:
        with pytest.raises(StoreError, match="or a job that it left"), locked(tmp_path):
            pass
    finally:
        job.kill()
        job.wait()
    with locked(tmp_path):
        pass


def test_sweep_goes_on_where_files_cannot_be_locked(tmp_path, monkeypatch, caplog):
    def refused(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refused)
    with locked(tmp_path):
        assert "cannot be locked" in caplog.text


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"nodes": 2, "tasks_per_node": 8, "gpus_per_node": 8}, {"world_size": 16, "device": "cuda"}),
        ({"slurm_nodes": 2, "slurm_ntasks_per_node": 8, "slurm_gres": "gpu:8"}, {"world_size": 16, "device": "cuda"}),
        ({"gpus_per_node": 0, "collect": {"slurm_tasks_per_node": 4}}, {"world_size": 4}),
        (3, {"world_size": 3}),
    ],
)
def test_ranks_are_planned_as_they_are_started(asked, expected):
    launcher, setting = ("local", "ranks") if isinstance(asked, int) else ("slurm", "resources")
    config = resolve(SweepConfig, {"grid": {}, "out": "none", setting: asked})
    assert LAUNCHERS[launcher].planned(config, "collect") == expected


def test_dry_run_says_what_would_run_and_writes_nothing(sweep, tmp_path, capsys):
    """Of the evaluations, those that differ in strength alone are asked about once."""
    (tmp_path / "texts.csv").write_text("text\nIt rained all day.\n")
    config = sweep(
        [{"method": ["none"]}, {"seed": [0, 1], "method": ["aura"], "strength": [0.5, 1.0]}],
        plan={"device_memory": "80GB", "world_size": 4},
        tflops=1e-9,
        evaluate={"perplexity_texts": str(tmp_path / "texts.csv"), "text_column": "text", "tasks": ["arc_easy"]},
    )
    assert main(["sweep", "--config", config, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "5 cells" in shown
    assert "11 jobs, 11 to run" in shown
    assert "  collect      2, 2 to run" in shown
    evaluations = next(line for line in shown.splitlines() if line.startswith("  5, each "))
    assert evaluations.endswith(" GPU-hours, without zero-shot tasks")
    each = float(evaluations.split()[2])
    hours = [float(line.split(": ")[1].split()[0]) for line in shown.splitlines() if line.startswith("  collect-")]
    total = float(shown.strip().splitlines()[-1].split()[0])
    assert min(*hours, each) > 0
    assert total == pytest.approx(sum(hours) + 5 * each, rel=0.01)
    assert not Path(tmp_path / "sweep").exists()


@pytest.fixture
def answering(monkeypatch):
    """`answering(ends)`: stands for processes that plan; of a model that `ends` names one ends by that signal. Returns
    the models that each was asked about.
    """

    def stand_in(ends):
        asked = []

        def run(command, **settings):
            models = [job["model"] for _, job in json.loads(Path(command[-2]).read_text())]
            asked.append(models)
            last = next((i for i, model in enumerate(models) if model in ends), None)
            answers = [{"seconds": 3600.0 * len(model), "gpu": False} for model in models[:last]]
            lines = "".join(json.dumps(answer) + "\n" for answer in answers)
            code = 0 if last is None else -ends[models[last]]
            Path(command[-1]).write_text(lines if code == 0 else f'{lines}{{"sec')
            return subprocess.CompletedProcess(command, code, "{}\n", "at work\n")

        monkeypatch.setattr("aura_dist.sweep.cost.subprocess.run", run)
        return asked

    return stand_in


def test_equal_jobs_are_asked_about_once_and_one_that_ends_the_process_takes_no_other_with_it(answering):
    asked = answering({"too large": signal.SIGKILL})
    jobs = {name: ("evaluate", {"model": name}) for name in ("small", "too large", "last")}
    costs = plan_costs({**jobs, "again": ("evaluate", {"model": "small", "strength": 0.5})})
    assert asked == [["small", "too large", "last"], ["last"]]
    assert costs["again"] is costs["small"]
    assert costs["too large"].words == "not known: killed by SIGKILL; last output: at work"
    total = Cost.total([*costs.values(), Cost(gpu_hours=9.0, reason="too large")])
    assert total.words == "14 hours of CPU ranks, and 2 not known"


def test_interrupted_planning_asks_no_further(answering):
    asked = answering({"b": signal.SIGINT})
    costs = plan_costs({name: ("collect", {"model": name}) for name in "abc"})
    assert asked == [["a", "b", "c"]]
    assert [bool(cost.reason) for cost in costs.values()] == [False, True, True]


def test_place_that_cannot_be_written_is_one_error(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/none/such")
    with pytest.raises(ConfigError, match=r"jobs cannot be planned: .*/none/such"):
        plan_costs({"a": ("collect", {"model": "m"})})


def test_many_jobs_are_shared_by_processes(answering, monkeypatch):
    monkeypatch.setattr("aura_dist.sweep.cost.available_cores", lambda: 3)
    asked = answering({})
    models = ["m" * i for i in range(1, 18)]
    costs = plan_costs({model: ("collect", {"model": model}) for model in models})
    assert sorted(map(len, asked)) == [5, 6, 6]
    assert [cost.cpu_hours for cost in costs.values()] == list(range(1, 18)), "each has its own"


def test_slurm_is_refused_where_there_is_none(sweep, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["sweep", "--config", sweep({"method": ["aura"]}), "--launcher", "slurm"]) == 2
    assert "error: --launcher slurm: expected Slurm's sbatch on this machine, found none" in capsys.readouterr().err


def test_command_line_refuses_a_grid_that_is_not_there(tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text("out: x\n")
    assert main(["sweep", "--config", str(path)]) == 2
    assert "error: 'grid' is required" in capsys.readouterr().err


def test_all_of_a_sweep_may_stand_in_its_own_section(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aura_dist.sweep.cost.plan_costs", lambda jobs: {})
    path = Path(sweep({"method": ["aura", "det0"]}))
    document = yaml.safe_load(path.read_text())
    own = {name: document.pop(name) for name in ("grid", "out", "jobs", "retries")}
    path.write_text(yaml.safe_dump({**document, "sweep": own}))
    assert main(["sweep", "--config", str(path), "--dry-run"]) == 0
    assert "2 cells" in capsys.readouterr().out
