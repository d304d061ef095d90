"""`launch/serve.sh` with a stand-in for Python: it runs `evaluate` with the command of a server, and ends like it."""

import os
import subprocess

import pytest

from tests.distributed.launch import REPOSITORY

SERVER = "vllm-here serve {model} --host 127.0.0.1 --port {port} --dtype float32"


@pytest.fixture
def serve(tmp_path):
    """`serve(code, …)`: the script's exit code, and the words of an evaluate that ends with `code`."""

    def run(code, *arguments, **env):
        evaluate = tmp_path / "evaluate"
        evaluate.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/asked\nexit {code}\n')
        evaluate.chmod(0o755)
        (tmp_path / "asked").unlink(missing_ok=True)
        given = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "CONTAINER": str(evaluate), "VLLM": "vllm-here",
            "SERVE": "--dtype float32", **env,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", REPOSITORY / "launch" / "serve.sh", *arguments],
            env=given, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        asked = tmp_path / "asked"
        return done, asked.read_text().splitlines() if asked.exists() else []

    return run


def test_evaluates_with_a_server_of_its_own(serve, tmp_path):
    (tmp_path / "aura").mkdir()
    expected = ["python", "-m", "aura_dist", "evaluate", "--model", "m", "--server", SERVER]
    laid = ["--intervention", f"{tmp_path}/aura"]
    for name, flags in ((f"{tmp_path}/aura@0.5", [*laid, "--strength", "0.5"]), (f"{tmp_path}/aura", laid), ("", [])):
        done, asked = serve(3, "m", "--out", "r.json", AURA_INTERVENTION=name)
        assert done.returncode == 3, done.stderr
        assert asked == [*expected, *flags, "--out", "r.json"]
    done, asked = serve(0)
    assert done.returncode != 0
    assert "usage: bash launch/serve.sh MODEL" in done.stderr
    assert not asked


def test_a_job_that_slurm_warned_is_queued_again(serve, tmp_path):
    for name, does in (("srun", 'exec "$@"'), ("scontrol", f'echo "$@" >> {tmp_path}/asked'), ("sleep", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    done, asked = serve(138, "m", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2")
    assert done.returncode == 138
    assert asked[-1] == "requeue 7"
    done, asked = serve(138, "m", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2", MAX_REQUEUES="2")
    assert done.returncode == 138
    assert asked[-2:] == ["--server", SERVER]
    assert "requeued 2 times and not finished" in done.stderr
