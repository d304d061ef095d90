"""`--dask slurm` on a real Slurm of two nodes gives what threads give."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.scoring.test_score import score_files
from tests.stores import make_store

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(480)]
DEADLINE_SECONDS = 180


def settings(tmp_path: Path, num_workers: int) -> str:
    """A settings file for jobs of one worker each."""
    options = {
        "queue": "main",
        "cores": 2,
        "processes": 1,
        "memory": "3GB",
        "walltime": "0:10:00",
        "interface": "lo",
        "log_directory": str(tmp_path / "logs"),
        "local_directory": str(tmp_path),
        "job_extra_directives": ["--exclusive"],  # so that two jobs take two nodes
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"score": {"slurm": options, "num_workers": num_workers}}))
    return str(config)


def test_slurm_equals_threads(slurm, tmp_path):
    threads = make_store(tmp_path / "threads.zarr", 150, (320, 200), ("toxic", "insult"))
    by_slurm = Path(shutil.copytree(threads, tmp_path / "slurm.zarr"))
    config = settings(tmp_path, 2)

    def score(store, *more):
        return slurm.run(sys.executable, "-m", "aura_dist", "score", "--store", store, *more, timeout=180)

    done = score(by_slurm, "--config", config, "--dask", "slurm")
    logs = "\n".join(log.read_text() for log in (tmp_path / "logs").glob("*"))
    assert done.returncode == 0, f"{done.stderr}\n{logs}"
    done = score(threads)
    assert done.returncode == 0, done.stderr
    assert score_files(by_slurm) == score_files(threads)
    assert not slurm.queue(), "the jobs end with the command"


@pytest.mark.timeout(480)
def test_cancelled_job_is_submitted_again(slurm, tmp_path):
    threads = make_store(tmp_path / "threads.zarr", 400, (512,) * 12, ("toxic", "insult"))
    store = Path(shutil.copytree(threads, tmp_path / "slurm.zarr"))
    command = [sys.executable, "-m", "aura_dist", "score", "--store"]
    process = subprocess.Popen(
        [*command, str(store), "--config", settings(tmp_path, 1), "--dask", "slurm"],
        env=slurm.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    end = time.monotonic() + DEADLINE_SECONDS
    while not list(store.glob("scores/*/*/c/0/0/*")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "no column was scored"
        time.sleep(0.01)
    (first,) = slurm.queue()
    slurm.run("scancel", first)
    num_scored = len(list(store.glob("scores/*/*/c/0/0/*")))
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, output
    assert "1 of 1 jobs have ended before the work: submitting as many again (try 1 of 5)" in output
    assert num_scored < 12, "it was cancelled in the middle"
    done = slurm.run(*command, threads, timeout=DEADLINE_SECONDS)
    assert done.returncode == 0, done.stderr
    assert score_files(store) == score_files(threads)
    assert not slurm.queue(), "the jobs end with the command"
