"""`--dask slurm` when Slurm refuses, or its jobs end early. Scripts stand for Slurm's commands; jobs run here."""

import asyncio
import os
import re
import signal
import stat
import time
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import dask
import pytest

from aura_dist.errors import ClusterError, ConfigError
from aura_dist.scoring import slurm_workers
from aura_dist.scoring.cluster import dask_client, worker_shape

pytest.importorskip("dask_jobqueue", reason="the extra `slurm` is not installed")

# A job is a process group; the file of its number says that it was submitted.
RUNS = 'copy=$(mktemp -p "$JOBS")\ncp "$1" "$copy"\nsetsid sh "$copy" > /dev/null 2>&1 &\n'
RUNS += 'touch "$JOBS/$!.job"\necho "Submitted batch job $!"\n'
ENDS = 'sh -c "exit 1" &\ntouch "$JOBS/$!.job"\necho "Submitted batch job $!"\n'
WAITS = 'setsid sleep 60 > /dev/null 2>&1 &\ntouch "$JOBS/$!.job"\n'
REFUSES = 'echo "sbatch: error: invalid partition specified: nope" >&2\nexit 1\n'
LISTS = 'cd "$JOBS" && for f in *.job; do kill -0 "-${f%.job}" 2> /dev/null && echo "${f%.job}"; done\nexit 0\n'
OPTIONS = {"interface": "lo", "scheduler_options": {"dashboard_address": ":0"}}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Writes Slurm's commands."""

    def write(sbatch: str, squeue: str = LISTS) -> None:
        scripts = {"sbatch": sbatch, "scancel": 'kill -9 "-$1"\n', "squeue": squeue}
        for name, script in scripts.items():
            file = tmp_path / f".{name}"
            file.write_text(f"#!/bin/sh\n{script}")
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
            file.replace(tmp_path / name)

    (tmp_path / "jobs").mkdir()
    monkeypatch.setenv("JOBS", str(tmp_path / "jobs"))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(slurm_workers, "LOOK_SECONDS", 0.5)
    return write


def kill_worker(client) -> int:
    """Kill a worker's job, its process group; gives the group."""
    group = client.submit(os.getpgrp, pure=False).result(timeout=60)
    os.killpg(group, signal.SIGKILL)
    return group


def work(before) -> None:
    """Hand in a task after `before`; as the stage does, say that the scheduler was lost if the task is cancelled."""
    with dask_client("slurm", 1, "1GB", OPTIONS) as client:
        before(client)
        try:
            client.submit(os.getpgrp, pure=False).result(timeout=90)
        except CancelledError as error:
            raise ClusterError("the scheduler was lost") from error


@pytest.mark.timeout(60)
def test_refusal_ends_the_command(commands, caplog):
    commands(REFUSES)
    with pytest.raises(ClusterError, match="invalid partition specified"), dask_client("slurm", 2, "1GB", OPTIONS):
        pass
    assert "could not be closed" not in caplog.text


@pytest.mark.timeout(180)
@pytest.mark.parametrize("processes", [1, 2])
def test_job_that_ends_before_the_work_is_submitted_again(processes, commands, caplog):
    commands(RUNS)
    options = {**OPTIONS, "cores": 2, "processes": processes}
    with dask_client("slurm", processes, "1GB", options) as client:
        client.wait_for_workers(processes, timeout=60)
        group = kill_worker(client)
        assert client.submit(os.getpgrp, pure=False).result(timeout=90) != group
    assert "1 of 1 jobs have ended before the work" in caplog.text
    assert "could not be closed" not in caplog.text


@pytest.mark.timeout(180)
@pytest.mark.parametrize("processes", [1, 2])
def test_job_with_a_worker_is_kept_even_where_squeue_does_not_list_it(processes, commands, caplog):
    commands(RUNS)
    with dask_client("slurm", processes, "1GB", {**OPTIONS, "cores": 2, "processes": processes}) as client:
        client.wait_for_workers(processes, timeout=60)
        commands(RUNS, squeue="exit 0\n")
        looks = slurm_workers.MISSES + 2
        time.sleep(looks * (slurm_workers.LOOK_SECONDS + 0.2))
        assert client.submit(os.getpgrp, pure=False).result(timeout=60)
    assert "have ended before the work" not in caplog.text
    assert "could not be replaced" not in caplog.text


@pytest.mark.timeout(60)
def test_job_that_waits_in_the_queue_is_not_submitted_again(commands, caplog):
    commands(f'{WAITS}echo "Welcome to the Stampede3 Supercomputer"\necho "Submitted batch job $!"\n')
    with dask_client("slurm", 1, "1GB", OPTIONS):
        time.sleep((slurm_workers.MISSES + 2) * (slurm_workers.LOOK_SECONDS + 0.2))
    assert "have ended before the work" not in caplog.text


@pytest.mark.parametrize(
    "said",
    [
        "Submitted batch job 4123",
        "Submitted batch job 4123 on cluster c2",
        "2 nodes of Stampede3 are free\nSubmitted batch job 4123",
        "4123",
        "4123;c2",
        "2026-11-24 INFO\n4123\n",
    ],
)
def test_number_of_a_job_is_found_in_whatever_sbatch_says(said):
    found = re.search(slurm_workers.JOB_ID, said)
    assert found is not None
    assert found["job_id"] == "4123"


def test_job_that_the_cluster_forgets_meanwhile_is_no_error():
    jobs, closed = {}, []

    class Job:
        job_id = None  # refused

        async def close(self):
            closed.append(self)
            jobs.pop("job-1", None)  # as the cluster does with the job of a worker that was lost

    jobs.update({f"job-{i}": Job() for i in range(3)})
    spec = {name: {} for name in jobs}
    cluster = SimpleNamespace(workers=jobs, worker_spec=spec, scheduler=SimpleNamespace(workers={}))
    asyncio.run(slurm_workers._Keeper(cluster, 3)._forget_ended(set()))
    assert (jobs, len(closed)) == ({}, 2)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("sbatch", "why"), [(REFUSES, "invalid partition specified"), (ENDS, "output of the jobs")], ids=["refuses", "ends"]
)
def test_jobs_that_give_no_worker_again_and_again_end_the_command(sbatch, why, commands, caplog):
    commands(RUNS)

    def seen_then_killed(client):
        client.wait_for_workers(1, timeout=60)
        time.sleep(1)
        commands(sbatch)
        kill_worker(client)

    with pytest.raises(ClusterError, match=f"5 submissions in a row gave no worker .*{why}"):
        work(seen_then_killed)
    assert caplog.text.count("submitting as many again") == 5
    assert "could not be closed" not in caplog.text


@pytest.mark.timeout(60)
def test_jobs_that_end_at_once_end_the_command(commands):
    commands(ENDS)
    with pytest.raises(ClusterError, match="5 submissions in a row gave no worker"):
        work(lambda client: None)


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
