"""A real Slurm of two nodes on this machine, for as long as the tests of this directory run."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parent / "local_cluster.sh"
REPOSITORY = Path(__file__).parents[2]
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
POLL_SECONDS = 0.1


class Slurm:
    """Commands on the cluster, in an environment that finds it and this checkout."""

    def __init__(self, conf: Path) -> None:
        programs = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        self.env = {
            **os.environ,
            "SLURM_CONF": str(conf),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")])),
            "PATH": os.pathsep.join(programs),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def run(
        self, *words: str | Path, timeout: float = 60, cwd: Path | None = None, **env: str
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(w) for w in words], env={**self.env, **env}, cwd=cwd or REPOSITORY, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip

    def submit(self, *words: str | Path, cwd: Path | None = None, **env: str) -> str:
        """`sbatch WORDS`; the job's number."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def queue(self) -> dict[str, str]:
        """Number of a job, array tasks one by one → its state, of those in the queue."""
        shown = self.run("squeue", "--noheader", "--array", "--format", "%i %T").stdout
        return dict(line.split() for line in shown.splitlines())

    def wait(self, job: str, timeout: float, log: Path | None = None) -> str:
        """Until a job has ended; how, as Slurm names it."""
        end = time.monotonic() + timeout
        while True:
            shown = self.run("scontrol", "show", "job", job).stdout
            state = shown.partition("JobState=")[2].split()[0] if "JobState=" in shown else "GONE"
            if state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"):
                return state
            assert time.monotonic() < end, f"{state} after {timeout} s\n{log.read_text() if log else shown}"
            time.sleep(POLL_SECONDS)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """The cluster; skips where it cannot be started."""
    for extra in ("dask_jobqueue", "submitit"):
        pytest.importorskip(extra, reason="the extra `slurm` is not installed")
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"Slurm cannot be started here: {', '.join(missing) or 'this is not root'}")
    state = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", CLUSTER, "start", state], check=True, timeout=90)
    yield Slurm(state / "slurm.conf")
    subprocess.run(["bash", CLUSTER, "stop", state], check=True, timeout=30)


@pytest.fixture(scope="module", autouse=True)
def no_job_is_left(slurm):
    """Jobs of a test that failed, or of a fixture that was not waited for, are not those of the next module."""
    yield
    slurm.run("scancel", "--partition=main")
    end = time.monotonic() + 60
    while slurm.queue():
        assert time.monotonic() < end, slurm.queue()
        time.sleep(POLL_SECONDS)


def tail(paths: Sequence[Path]) -> str:
    """The ends of some files, for a failure's message."""
    return "\n".join(f"== {p}\n{p.read_text()[-3000:]}" for p in paths if p.exists())
