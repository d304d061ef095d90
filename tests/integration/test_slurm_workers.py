"""`--dask slurm` when Slurm refuses: a script stands for `sbatch`."""

import os
import stat

import dask
import pytest

from aura_dist.errors import ClusterError, ConfigError
from aura_dist.runtime import slurm_workers
from aura_dist.runtime.cluster import dask_client, worker_shape

pytest.importorskip("dask_jobqueue", reason="the extra `slurm` is not installed")

REFUSES = 'echo "sbatch: error: invalid partition specified: nope" >&2\nexit 1\n'
OPTIONS = {"interface": "lo"}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Writes Slurm's commands; `scancel` does nothing."""

    def write(sbatch: str) -> None:
        for name, script in (("sbatch", sbatch), ("scancel", "exit 0\n")):
            file = tmp_path / name
            file.write_text(f"#!/bin/sh\n{script}")
            file.chmod(file.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return write


@pytest.mark.timeout(60)
def test_refusal_ends_the_command(commands, caplog):
    commands(REFUSES)
    with pytest.raises(ClusterError, match="invalid partition specified"), dask_client("slurm", 2, "1GB", OPTIONS):
        pass
    assert "could not be closed" not in caplog.text


def test_lines_of_dasks_own_configuration_stay_in_the_job_script():
    with dask.config.set({"jobqueue.slurm.job-script-prologue": ["module load python"]}):
        assert slurm_workers._prologue({})[-1] == "module load python"
        assert slurm_workers._prologue({"job_script_prologue": ["source env"]})[-1] == "source env"
    assert slurm_workers._prologue({"job_script_prologue": "source env"})[-1] == "source env"
    assert all(line.startswith("export ") for line in slurm_workers._prologue({"job_script_prologue": None}))


@pytest.mark.parametrize(("name", "value"), [("processes", 0), ("cores", "two")])
def test_numbers_of_a_job_are_checked(name, value):
    with pytest.raises(ConfigError, match=f"--slurm: expected {name} to be an integer of at least 1"):
        worker_shape("slurm", 1, "1GB", {name: value})
