"""Scripts of `launch/` with a stand-in for srun: what they give it, and what they make of its end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import REPOSITORY


@pytest.fixture
def ranks(tmp_path):
    """`ranks(code, …)`: ranks.sbatch as Slurm would run it, around an srun that ends with that code."""

    def run(code, **env):
        for name, body in (("srun", f'echo "cores ${{SRUN_CPUS_PER_TASK:-unset}}"; exit {code}'), ("scontrol", "")):
            program = tmp_path / name
            program.write_text(f"#!/bin/sh\n{body}\n")
            program.chmod(0o755)
        (tmp_path / "launch").mkdir(exist_ok=True)
        (tmp_path / "launch" / "site.sh").write_text((REPOSITORY / "launch" / "site.sh").read_text())
        job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
        return subprocess.run(
            ["bash", REPOSITORY / "launch" / "ranks.sbatch", "collect"],
            env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **job, **env},
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip

    return run


def test_warned_job_that_may_not_queue_itself_again_says_so(ranks):
    done = ranks(138, MAX_REQUEUES="0")
    assert done.returncode == 138
    assert "stopped: requeued 0 times and not finished" in done.stderr


def test_ranks_have_the_cores_that_the_job_asked_for(ranks):
    assert ranks(0).stdout == "cores unset\n"
    assert ranks(0, SLURM_CPUS_PER_TASK="8").stdout == "cores 8\n"
    assert ranks(3, SLURM_CPUS_PER_TASK="8", SRUN_CPUS_PER_TASK="2").stdout == "cores 2\n"


def test_site_may_read_variables_that_are_not_set(ranks, tmp_path):
    site = tmp_path / "mine.sh"
    site.write_text('echo "loaded $NO_SUCH_VARIABLE"\n')
    done = ranks(0, SITE=str(site))
    assert (done.returncode, done.stdout) == (0, "loaded \ncores unset\n"), done.stderr


def test_pipeline_submits_nothing_before_all_settings_are_right(tmp_path):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/submitted\nenv > {tmp_path}/env\necho 7\n')
    sbatch.chmod(0o755)
    settings = tmp_path / "run.yaml"
    settings.write_text(
        "model: m\nstore: s.zarr\ncollect: {data: c.csv, concepts: [toxic]}\nfit: {concept: toxic, out: i}\n"
    )
    allocation = {"SLURM_JOB_ID": "3", "SLURM_CPUS_PER_TASK": "2", "SLURM_MEM_PER_NODE": "9", "SLURM_CONF": "/c"}
    programs = [str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]

    def pipeline():
        return subprocess.run(
            ["bash", REPOSITORY / "launch" / "pipeline.sh", settings],
            env={"PATH": os.pathsep.join(programs), **allocation},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    done = pipeline()
    assert done.returncode == 2
    assert done.stderr.startswith("error: --out is required"), done.stderr
    assert done.stderr.endswith("nothing is submitted: evaluate lacks what it needs\n")
    assert not (tmp_path / "submitted").exists()
    with settings.open("a") as file:
        file.write("evaluate: {perplexity_texts: t.csv, out: r.json}\n")
    done = pipeline()
    assert (done.returncode, done.stdout) == (0, "collect 7\nscore 7\nfit 7\nevaluate 7\n"), done.stderr
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert [line.count("--dependency=afterok:7 --kill-on-invalid-dep=yes") for line in submitted] == [0, 1, 1, 1]
    inherited = [n for n in (tmp_path / "env").read_text().splitlines() if n.startswith(("SLURM_", "SRUN_"))]
    assert inherited == ["SLURM_CONF=/c"], "what the allocation has is not the jobs'"


@pytest.mark.parametrize("script", ["sweep.sh", "score_dask.sh"])
def test_script_finds_its_checkout_within_an_allocation_and_as_a_job(script, tmp_path):
    """`echo` stands for a container."""
    copy = tmp_path / "slurm_script"  # as sbatch makes it
    copy.write_bytes((REPOSITORY / "launch" / script).read_bytes())
    for place, submitted_from in ((REPOSITORY / "launch" / script, tmp_path), (copy, REPOSITORY)):
        env = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(submitted_from), "CONTAINER": "echo"}
        done = subprocess.run(
            ["bash", place, "x.yaml"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("python -m aura_dist ")
