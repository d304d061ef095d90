"""The scripts of `launch/` on a real Slurm of two nodes: equal to one process, resumed after Slurm's warning."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from aura_dist.cli import main
from aura_dist.errors import StoreError
from aura_dist.interventions.artifact import Intervention
from aura_dist.store.access import get_array, open_group, read_array
from aura_dist.store.schema import ATTEMPTS, DONE
from tests.collecting.test_strategies import assert_same
from tests.slurm.conftest import tail
from tests.store.test_store_faults import chunk_files

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
NODES = ["--nodes=2", "--ntasks-per-node=1"]
# both nodes are this machine, which knows no host n1
HERE = {"HEAD_NODE": "127.0.0.1", "MASTER_ADDR": "127.0.0.1", "PROCESSES": "1"}


@pytest.fixture(scope="module")
def settings(tiny_dir, sentences_csv):
    """Of a run of four tasks."""
    return {
        "model": str(tiny_dir("llama")),
        "concept": "toxic",
        "device": "cpu",
        "collect": {
            "data": sentences_csv,
            "concepts": ["toxic"],
            "tokens_per_batch": 512,
            "num_positive": 60,
            "num_negative": 60,
        },
        "evaluate": {"perplexity_texts": sentences_csv, "max_tokens": 16},
    }


def write_config(settings, directory: Path, **more) -> Path:
    """A run directory's settings."""
    directory.mkdir(exist_ok=True)
    intervention = str(directory / "interventions" / "aura")
    document = {
        **settings,
        **more,
        "store": str(directory / "store.zarr"),
        "fit": {"out": intervention},
        "evaluate": {**settings["evaluate"], "intervention": intervention, "out": str(directory / "aura.json")},
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def in_small_batches(settings, **more):
    """The same in batches so small that it takes a while."""
    return {**settings, "collect": {**settings["collect"], "tokens_per_batch": 48, **more}}


@dataclass(frozen=True)
class Submitted:
    """A job, the last of several, and the directory of its run."""

    job: str
    directory: Path


@pytest.fixture(scope="module")
def torchrun(slurm, settings, tmp_path_factory):
    """A collection by torchrun over two nodes."""
    directory = tmp_path_factory.mktemp("torchrun")
    config, log = write_config(settings, directory, sharding="tensor"), directory / "collect.log"
    command = [*NODES, "--output", log, "launch/multi_node.sbatch", "collect", "--config", config]
    return Submitted(slurm.submit(*command, **HERE), directory)


@pytest.fixture(scope="module")
def pipeline(slurm, settings, tmp_path_factory):
    """Collection and evaluation by torchrun over two nodes, scoring by Dask workers that are jobs, all dependent."""
    directory = tmp_path_factory.mktemp("pipeline")
    config = write_config(settings, directory, sharding="fsdp")
    worker = f"queue=main cores=1 memory=2GB walltime=0:10:00 interface=lo local_directory={directory}"
    how = {
        "RANKS": " ".join(NODES), "RANKS_SCRIPT": "launch/multi_node.sbatch", "WORKERS": "1", "DASK_WORKER": worker,
        "SBATCH_OUTPUT": str(directory / "%x.log"),
    }  # fmt: skip
    done = slurm.run("bash", "launch/pipeline.sh", config, **HERE, **how)
    assert done.returncode == 0, done.stderr
    jobs = dict(line.split() for line in done.stdout.splitlines())
    assert list(jobs) == ["collect", "score", "fit", "evaluate"]
    return Submitted(jobs["evaluate"], directory)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run directory made by one process."""
    directory = tmp_path_factory.mktemp("whole")
    config = write_config(settings, directory)
    for verb in ("collect", "score", "fit", "evaluate"):
        assert main([verb, "--config", str(config)]) == 0
    return directory


@pytest.fixture(scope="module")
def doomed(slurm, settings, whole, tmp_path_factory):
    """A collection of which three launches in a row have died in the same task."""
    directory = tmp_path_factory.mktemp("doomed")
    config, log = write_config(settings, directory), directory / "log"
    group = open_group(str(shutil.copytree(whole / "store.zarr", directory / "store.zarr")))
    get_array(group, DONE)[0], get_array(group, ATTEMPTS)[0] = 0, 3
    return Submitted(slurm.submit("--output", log, "launch/ranks.sbatch", "collect", "--config", config), directory)


def test_torchrun_over_two_nodes_equals_one_process(slurm, torchrun, pipeline, whole, doomed):
    """All are submitted before one is waited for: the nodes wait a lot."""
    directory = torchrun.directory
    assert slurm.wait(torchrun.job, 180) == "COMPLETED", tail([directory / "collect.log"])
    assert_same(directory / "store.zarr", whole / "store.zarr", "tensor")


def test_pipeline_of_dependent_jobs_equals_one_process(slurm, pipeline, whole):
    directory = pipeline.directory
    assert slurm.wait(pipeline.job, 240) == "COMPLETED", tail(sorted(directory.glob("*.log")))
    assert_same(directory / "store.zarr", whole / "store.zarr", "fsdp")
    ours, theirs = (Intervention.load(d / "interventions" / "aura") for d in (directory, whole))
    for site, scale in theirs.scale.items():
        np.testing.assert_allclose(ours.scale[site], scale, atol=2e-3, err_msg=site)  # a rank may swap at a near tie
    ours, theirs = (json.loads((d / "aura.json").read_text())["perplexity"] for d in (directory, whole))
    assert ours["token_weighted"] == pytest.approx(theirs["token_weighted"], rel=1e-4)


def test_job_that_fails_is_not_queued_again(slurm, doomed):
    log = doomed.directory / "log"
    assert slurm.wait(doomed.job, 120, log) == "FAILED"
    assert "error: --store" in log.read_text()
    assert "3 launches died in task 0" in log.read_text()
    assert "requeued" not in log.read_text()


def test_rank_that_fails_before_the_meeting_ends_the_others(slurm, settings, tmp_path):
    config, log, rank = write_config(settings, tmp_path), tmp_path / "log", tmp_path / "rank.sh"
    rank.write_text('[ "$SLURM_PROCID" = 0 ] || exit 7\nexec "$@"\n')
    job = slurm.submit(
        *NODES, "--output", log, "launch/ranks.sbatch", "collect", "--config", config, CONTAINER=f"bash {rank}", **HERE
    )
    assert slurm.wait(job, 30, log) == "FAILED"
    assert "waited" not in log.read_text()
    assert not (tmp_path / "store.zarr").exists()


def num_done(store: Path) -> int:
    """Finished tasks of a store; 0 while it is being made."""
    try:
        return int((read_array(open_group(str(store)), DONE) == 1).sum())
    except StoreError:
        return 0


def under_way(store: Path) -> bool:
    """Whether a task was begun, and neither finished nor given back."""
    group = open_group(str(store))
    return bool((read_array(group, ATTEMPTS)[read_array(group, DONE) == 0] > 0).any())


def interrupt_and_resume(slurm, settings, directory, times):
    """Slurm's warning in the middle of a collection, so many times; the job queues itself again and finishes.

    The first comes after a task is done, the others as soon as one is begun: so that some are left for all of them.
    """
    store, log = directory / "store.zarr", directory / "log"
    config = write_config(in_small_batches(settings), directory, sharding="fsdp")
    job = slurm.submit(*NODES, "--output", log, "launch/ranks.sbatch", "collect", "--config", config, **HERE)
    wait_until(lambda: num_done(store) > 0, log)
    for restart in range(1, times + 1):
        if restart > 1:
            wait_until(lambda: under_way(store), log)
        assert slurm.run("scancel", "--signal=USR1", job).returncode == 0
        wait_until(lambda: is_requeued(slurm, job, restart), log)  # noqa: B023
        assert times == 1 or not under_way(store), "a warning counts as no death"
        assert times == 1 or num_done(store) < len(read_array(open_group(str(store)), DONE)), "nothing is left"
        slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+1")  # Slurm lets it wait for two minutes
    assert slurm.wait(job, 180, log) == "COMPLETED", log.read_text()
    assert log.read_text().count("requeued as job") == times, log.read_text()


def is_requeued(slurm, job: str, times: int) -> bool:
    shown = slurm.run("scontrol", "show", "job", job).stdout
    return f"Restarts={times} " in shown and "JobState=PENDING" in shown


def wait_until(reached: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < end, tail([log])
        time.sleep(0.05)


def test_warned_job_queues_itself_again_and_finishes(slurm, settings, whole, tmp_path):
    interrupt_and_resume(slurm, settings, tmp_path, 1)
    assert_same(tmp_path / "store.zarr", whole / "store.zarr", "requeued once")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_job_warned_three_times_equals_the_uninterrupted_one(slurm, settings, tmp_path):
    settings = in_small_batches(settings, num_positive=240, num_negative=240, modules=["all"])  # 5 tasks
    uninterrupted = tmp_path / "uninterrupted"
    config, log = write_config(settings, uninterrupted, sharding="fsdp"), uninterrupted / "log"
    job = slurm.submit(*NODES, "--output", log, "launch/ranks.sbatch", "collect", "--config", config, **HERE)
    assert slurm.wait(job, 180, log) == "COMPLETED", log.read_text()
    interrupt_and_resume(slurm, settings, tmp_path / "warned", 3)
    assert chunk_files(tmp_path / "warned" / "store.zarr") == chunk_files(uninterrupted / "store.zarr")
