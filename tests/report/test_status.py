"""status: what of a run is done, half done, damaged and left, from its files."""

import json
import os
import time

import pytest

from aura_dist.cli import main
from tests.results import write_results
from tests.stores import make_store

ROWS, WIDTHS = 300, [48, 80]


@pytest.fixture
def run(tmp_path):
    """A run that is half collected, with one evaluation."""
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    make_store(run / "store.zarr", ROWS, WIDTHS, num_unfinished=2)
    write_results(run, "plain", texts=["a", "b", "c", "d"])
    return run


def status(capsys, path):
    assert main(["status", str(path)]) == 0
    return capsys.readouterr().out.splitlines()


def part(lines, name):
    return next(line for line in lines if line.startswith(name))


def test_half_of_a_run(run, capsys):
    lines = status(capsys, run)
    assert lines[0].startswith("first: last change 0:")
    assert lines[0].endswith("seems to be running")
    done, total = map(int, part(lines, "collect").split("half done")[1].split(" tasks")[0].split(" of "))
    assert (total - done, done > 0) == (2, True)
    assert f"of {ROWS} rows, 2 modules, {sum(WIDTHS)} neurons" in part(lines, "collect")
    assert part(lines, "score").startswith("score     nothing")
    assert part(lines, "fit").split() == ["fit", "nothing"]
    assert part(lines, "evaluate").split() == ["evaluate", "done", "1", "plain"]


def test_scores_and_what_they_are_of(run, capsys):
    assert main(["score", "--store", str(run / "store.zarr"), "--partial"]) == 0
    capsys.readouterr()
    line = part(status(capsys, run), "score")
    assert line.startswith("score     done")
    assert "16 statistics, of " in line
    assert f"of {ROWS} rows" in line


def test_old_files_are_not_of_a_running_stage(run, capsys, monkeypatch):
    now = time.time()
    past = now - 7200
    monkeypatch.setattr("aura_dist.stages.status.time.time", lambda: now)
    for directory, _, names in os.walk(run):
        for name in [".", *names]:
            os.utime(os.path.join(directory, name), (past, past))
    assert status(capsys, run)[0] == "first: last change 2:00:00 ago"


def test_half_done_and_damaged_results_are_told_apart(run, capsys):
    (run / "results" / "later.continuations.jsonl").write_text('{"settings": 1}\n{"prompt": 0}\n')
    line = part(status(capsys, run), "evaluate")
    assert " ".join(line.split()) == "evaluate half done 1 plain; half done: later.continuations.jsonl (2 lines)"
    (run / "results" / "broken.json").write_text("{")
    assert "damaged: broken.json" in part(status(capsys, run), "evaluate")


def test_damaged_parts_are_states_not_errors(run, capsys):
    (run / "interventions" / "cut").mkdir(parents=True)
    (run / "store.zarr" / "zarr.json").write_text("{")
    lines = status(capsys, run)
    assert part(lines, "collect").startswith("collect   damaged")
    assert part(lines, "fit").split() == ["fit", "damaged", "0", "damaged:", "cut"]


def test_many_runs_are_a_table(run, capsys):
    second = run.parent / "group" / "second"
    second.mkdir(parents=True)
    make_store(second / "store.zarr", ROWS, WIDTHS)
    (run.parent / "notes").mkdir()
    lines = status(capsys, run.parent)
    assert lines[0].split()[:5] == ["run", "collect", "score", "fit", "evaluate"]
    assert [line.split()[0] for line in lines[1:3]] == ["first", "second"]
    assert part(lines, "second").split()[1] == "done"
    assert lines[3] == "0 of 2 runs have every part"


def test_jobs_of_a_sweep_and_why_they_failed(run, capsys):
    make_store(run / "collections" / "tiny" / "store.zarr", ROWS, WIDTHS)
    (run / "jobs").mkdir()
    for name, state, reason in (("fit-a", "done", ""), ("fit-b", "failed", "no such concept")):
        job = {"job": name, "stage": "fit", "state": state, "reason": reason, "seconds": 61.0}
        (run / "jobs" / f"{name}.json").write_text(json.dumps(job))
    (run / "jobs" / "damaged.json").write_text("{")
    lines = status(capsys, run)
    assert sum(line.startswith("collect ") for line in lines) == 2, "one for each store"
    assert "jobs: 1 done, 1 failed" in lines
    assert part(lines, "fit-b").split(maxsplit=3) == ["fit-b", "failed", "1:01", "no such concept"]
    (run / "jobs.json").write_text(json.dumps(["fit-a"]))
    assert "jobs: 1 done" in status(capsys, run), "fit-b is no part of the present grid"


def test_what_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    for place, message in ((tmp_path, "found none of them"), (tmp_path / "file", "found a file"), ("gone", "nothing")):
        assert main(["status", str(place)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: RUN_DIR ")
        assert message in error
        assert error.count("\n") == 1
    assert main(["status"]) == 2
    assert "RUN_DIR is required" in capsys.readouterr().err
    assert main(["status", "a", "b"]) == 2


def test_sweep_that_has_just_begun(tmp_path, capsys):
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    (tmp_path / "sweep.yaml").write_text("grid: {method: [aura]}\n")
    (jobs / "collect-a.json").write_text(json.dumps({"job": "collect-a", "stage": "collect", "state": "queued"}))
    (jobs / ".collect-a.json.4711").write_text((jobs / "collect-a.json").read_text())  # left by a killed writer
    lines = status(capsys, tmp_path)
    assert lines[-2:] == ["jobs: 1 queued", "collect-a  queued"]
