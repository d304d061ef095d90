"""`--dask slurm` on a real Slurm of two nodes gives what threads give."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.test_score import score_files
from tests.stores import make_store

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
CLUSTER = Path(__file__).parent / "local_cluster.sh"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")


@pytest.fixture(scope="module")
def slurm_conf(tmp_path_factory):
    """The settings file of a Slurm that runs while the tests of this module do."""
    pytest.importorskip("dask_jobqueue", reason="the extra `slurm` is not installed")
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"Slurm cannot be started here: {', '.join(missing) or 'this is not root'}")
    state = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", CLUSTER, "start", state], check=True, timeout=90)
    yield state / "slurm.conf"
    subprocess.run(["bash", CLUSTER, "stop", state], check=True, timeout=30)


def test_slurm_equals_threads(slurm_conf, tmp_path):
    threads = make_store(tmp_path / "threads.zarr", 150, (320, 200), ("toxic", "insult"))
    slurm = Path(shutil.copytree(threads, tmp_path / "slurm.zarr"))
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
        environment = {**os.environ, "SLURM_CONF": str(slurm_conf)}
        command = [sys.executable, "-m", "aura_dist", "score", "--store", str(store), *more]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)

    done = score(slurm, "--config", str(config), "--dask", "slurm")
    logs = "\n".join(log.read_text() for log in (tmp_path / "logs").glob("*"))
    assert done.returncode == 0, f"{done.stderr}\n{logs}"
    done = score(threads)
    assert done.returncode == 0, done.stderr
    assert score_files(slurm) == score_files(threads)
    left = subprocess.run(
        ["squeue", "-h", "-t", "PENDING,RUNNING"],
        env={**os.environ, "SLURM_CONF": str(slurm_conf)}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert left.stdout == "", "the jobs end with the command"
