"""`--dask slurm` on a real Slurm of two nodes gives what threads give."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.test_score import score_files
from tests.stores import make_store

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


def test_slurm_equals_threads(slurm, tmp_path):
    threads = make_store(tmp_path / "threads.zarr", 150, (320, 200), ("toxic", "insult"))
    by_slurm = Path(shutil.copytree(threads, tmp_path / "slurm.zarr"))
    config = tmp_path / "config.yaml"
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
    config.write_text(yaml.safe_dump({"score": {"slurm": options, "num_workers": 2}}))

    def score(store, *more):
        return slurm.run(sys.executable, "-m", "aura_dist", "score", "--store", store, *more, timeout=180)

    done = score(by_slurm, "--config", str(config), "--dask", "slurm")
    logs = "\n".join(log.read_text() for log in (tmp_path / "logs").glob("*"))
    assert done.returncode == 0, f"{done.stderr}\n{logs}"
    done = score(threads)
    assert done.returncode == 0, done.stderr
    assert score_files(by_slurm) == score_files(threads)
    assert not slurm.queue(), "the jobs end with the command"
