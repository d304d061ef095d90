"""What is asked of a cluster, before there is one; progress lines; the memory a worker needs."""

import socket
from contextlib import suppress

import pytest

from aura_dist.errors import ClusterError, ConfigError, StoreError
from aura_dist.ranks.process import available_cores
from aura_dist.ranks.progress import Progress
from aura_dist.scoring.cluster import check_settings, dask_client, worker_shape
from aura_dist.scoring.column_sums import WORKER_BYTES, scoring_bytes


@pytest.mark.parametrize("kind", ["threads", "processes", "slurm", "tcp://host:8786", "tls://host:8786"])
def test_kinds_of_cluster(kind):
    assert check_settings(kind, "1GB") == 10**9


@pytest.mark.parametrize(
    ("kind", "limit", "message"),
    [
        ("fork", "1GB", "--dask: expected one of threads, processes, slurm, tcp://HOST:PORT, got 'fork'"),
        ("http://host", "1GB", "--dask: expected one of"),
        ("threads", "much", "--memory-limit: expected a size such as 4GB, got 'much'"),
        ("threads", "0GB", "--memory-limit: expected a size above 0"),
    ],
)
def test_wrong_settings_are_named(kind, limit, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(kind, limit)


def test_shape_of_a_worker():
    assert worker_shape("threads", 3, "1GB", {}) == (10**9, 3)
    assert worker_shape("threads", None, "1GB", {}) == (10**9, available_cores())
    assert worker_shape("processes", 3, "1GB", {}) == (10**9, 1)
    assert worker_shape("slurm", 3, "1GB", {}) == (10**9, 1)
    assert worker_shape("slurm", 3, "1GB", {"cores": 8, "processes": 2, "memory": "6GB"}) == (3 * 10**9, 4)
    with pytest.raises(ConfigError, match="walltime in quotes"):
        worker_shape("slurm", 3, "1GB", {"walltime": 3600})
    with pytest.raises(ConfigError, match="--slurm memory: expected a size such as 4GB, got 'much'"):
        worker_shape("slurm", 3, "1GB", {"memory": "much"})


@pytest.mark.parametrize(
    ("kind", "num_workers", "slurm", "message"),
    [
        ("threads", None, {"queue": "main"}, "--slurm: expected it with --dask slurm, got it with --dask threads"),
        ("processes", 2, {"cores": 4}, "--slurm: expected it with --dask slurm, got it with --dask processes"),
        ("tcp://host:8786", None, {"cores": 4}, "--slurm: expected it with --dask slurm"),
        ("tls://host:8786", 2, {}, "--num-workers: expected none, because the cluster runs already, got 2"),
    ],
)
def test_settings_of_another_kind_of_cluster_are_refused(kind, num_workers, slurm, message):
    with pytest.raises(ConfigError, match=message):
        worker_shape(kind, num_workers, "1GB", slurm)


def test_machine_without_slurm_is_named(monkeypatch, tmp_path):
    pytest.importorskip("dask_jobqueue", reason="the extra `slurm` is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    with pytest.raises(ClusterError, match="expected Slurm's sbatch on this machine"), dask_client("slurm", 1, "1GB"):
        pass


def test_an_error_within_the_context_stays_what_it_is():
    with pytest.raises(StoreError, match=r"^mine$"), dask_client("threads", 1, "1GB"):
        raise StoreError("mine")


def test_memory_of_a_worker_grows_with_what_it_holds():
    one = scoring_bytes(10_000, 500, 4, 1)
    assert one - WORKER_BYTES > 10_000 * 500 * 4
    assert scoring_bytes(10_000, 500, 4, 1, 2) - one == one - WORKER_BYTES
    assert scoring_bytes(10_000, 1000, 4, 1) > one
    assert scoring_bytes(10_000, 500, 2, 1) - WORKER_BYTES > 10_000 * 500 * (2 + 4), "float16 is converted"


def test_progress_says_neurons_and_bytes_a_second():
    progress = Progress("score", 4, 4000, unit="chunk columns", cost_unit="neurons")
    progress.advance(1, 1000, 2 * 10**9)
    line = progress.line()
    assert line.startswith("score: 1 of 4 chunk columns, ")
    assert " neurons/s, " in line
    assert " GB/s, " in line
    plain = Progress("collect", 4, 4000)
    plain.advance(1, 1000)
    assert "GB/s" not in plain.line()


def test_another_dashboard_on_this_machine_is_no_matter():
    with socket.socket() as other:
        with suppress(OSError):  # somebody's already
            other.bind(("127.0.0.1", 8787))
            other.listen()
        with dask_client("threads", 1, "1GB") as client:
            assert client.submit(sum, [1, 2]).result() == 3
