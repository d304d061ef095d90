"""The scoring engine on stores of known values: what is computed, restarted, refused, and by whom."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from urllib.parse import urlsplit

import dask
import numpy as np
import psutil
import pytest
import xarray as xr
from scipy.stats import false_discovery_control

import aura_dist
from aura_dist.cli import main
from aura_dist.errors import InputError, StoreError
from aura_dist.scoring import worker
from aura_dist.scoring.cluster import dask_client
from aura_dist.scoring.columns import statistics_by_concept
from aura_dist.scoring.statistics import STATISTICS
from aura_dist.stages import score as stage
from aura_dist.store import grid
from aura_dist.store.access import open_group
from aura_dist.store.record import SCORED, read_times
from aura_dist.store.schema import tasks_of
from aura_dist.store.shards import PARTIAL
from tests.stores import TOKENS_PER_BATCH, make_store

WIDTHS, CONCEPTS, NUM_ROWS = (320, 200, 96), ("toxic", "insult"), 250
OVER_COLUMNS = [name for name, statistic in STATISTICS.items() if statistic.of]
DEADLINE_SECONDS = 120


def score(store, *more):
    return main(["score", "--store", str(store), *more])


def score_files(store: Path) -> dict[str, bytes]:
    """Every file of scores by its path."""
    return {str(f.relative_to(store)): f.read_bytes() for f in sorted(store.glob("scores/**/c/**/*")) if f.is_file()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A collected store that has not been scored."""
    return make_store(tmp_path_factory.mktemp("plain") / "store.zarr", NUM_ROWS, WIDTHS, CONCEPTS)


@pytest.fixture(scope="module")
def scored(plain, tmp_path_factory):
    """The same store, scored undisturbed."""
    store = tmp_path_factory.mktemp("scored") / "store.zarr"
    shutil.copytree(plain, store)
    assert score(store) == 0
    return store


@pytest.fixture
def store(plain, tmp_path):
    """A copy to do something to."""
    return Path(shutil.copytree(plain, tmp_path / "store.zarr"))


def test_store_holds_every_statistic_of_every_neuron(scored):
    view = aura_dist.open_store(scored)
    labels_CN = view["samples"]["label"].values.T
    for site in view["activations"]:
        values = view["activations"][site]["max"].values
        expected = statistics_by_concept(values, labels_CN, OVER_COLUMNS)
        found = view["scores"][site]["max"]
        assert set(found.data_vars) == set(STATISTICS)
        for name in OVER_COLUMNS:
            assert found[name].dims == ("concept", "neuron")
            assert found[name].dtype == STATISTICS[name].dtype
            np.testing.assert_array_equal(found[name].values, expected[name], err_msg=name)


def test_q_values_are_over_the_whole_model(scored):
    scores = aura_dist.open_store(scored)["scores"]
    for concept in CONCEPTS:
        p, q = (
            np.concatenate([scores[s]["max"][name].sel(concept=concept).values for s in scores])
            for name in ("p_value", "q_value")
        )
        np.testing.assert_allclose(q, false_discovery_control(p), rtol=1e-12)


def test_coordinates(scored):
    view = aura_dist.open_store(scored)
    responses, scores = view["activations"]["layers.1.up"]["max"], view["scores"]["layers.1.up"]["max"]["auroc"]
    assert set(responses.coords) >= {"site", "unit", "row", "tokens"}
    assert set(scores.coords) >= {"site", "unit", "concept"}
    assert float(scores.sel(concept="insult", neuron=7)) == scores.values[1, 7]
    assert str(scores["site"].item()) == "layers.1.up"
    np.testing.assert_array_equal(responses["tokens"], view["samples"]["num_tokens"])
    assert view["scores"].attrs["partial"] is False


def test_top_neurons_is_a_table(scored):
    top = aura_dist.top_neurons(scored, "toxic", 5)
    columns = ["site", "layer", "unit", "auroc", "auroc_se", "q_value", "mean_positive", "mean_negative"]
    assert [c for c in top.columns if c != "kind"] == columns
    best, view = top.iloc[0], aura_dist.open_store(scored)["scores"]
    found = view[best.site]["max"].sel(concept="toxic", neuron=best.unit)
    assert all(float(found[name]) == best[name] for name in columns[3:])
    assert top["auroc"].is_monotonic_decreasing


@pytest.mark.parametrize("k", [np.int64(3), np.uint8(3)])
def test_numbers_of_numpy_count_neurons(scored, k):
    assert aura_dist.top_neurons(scored, "toxic", k).equals(aura_dist.top_neurons(scored, "toxic", 3))


@pytest.mark.parametrize("k", [True, 2.0, "3", np.float64(3)])
def test_other_numbers_of_neurons_are_refused(scored, k):
    with pytest.raises(InputError, match="k: expected an integer of at least 1, got"):
        aura_dist.top_neurons(scored, "toxic", k)


@pytest.mark.parametrize("store", [5, None, xr.DataTree(), {"a": 1}])
def test_what_is_no_store_is_refused(store):
    with pytest.raises(InputError, match="store: expected a path, a URL or what `open_store` returns, got"):
        aura_dist.top_neurons(store, "toxic", 3)


def test_nothing_is_computed_by_accident(scored):
    computed = []

    def counting(graph, keys, **_):
        computed.append(keys)
        return dask.get(graph, keys)

    with dask.config.set(scheduler=counting):
        view = aura_dist.open_store(scored)
        aura_dist.top_neurons(scored, "toxic", 3)
        repr(view)
        assert not computed
        view["scores"]["layers.0.up"]["max"]["auroc"].load()
        assert len(computed) == 1, "the scheduler that counts is the one in use"


@pytest.fixture
def short_spans(monkeypatch):
    """Scores of few neurons in a file, so that small stores have many files."""
    monkeypatch.setattr(grid, "MIN_COLUMNS_PER_SPAN", 64)


def test_a_chunk_column_is_in_one_task_and_a_chunk_read_once(store, short_spans, monkeypatch):
    from distributed import Client

    tasks, reads, sorts, client_map = [], [], [], Client.map

    def counted(log, function):
        return lambda *args, **options: log.append(args) or function(*args, **options)

    # what the workers run is found by its name; what the client holds would be sent to them, log and all
    monkeypatch.setattr(
        Client, "map", lambda client, *args, **options: tasks.extend(args[1]) or client_map(client, *args, **options)
    )
    monkeypatch.setattr(worker, "_read_runs", counted(reads, worker._read_runs))
    monkeypatch.setattr(worker, "statistics_by_concept", counted(sorts, worker.statistics_by_concept))
    with dask.config.set(scheduler=lambda *_, **__: pytest.fail("a computation beside the tasks")):
        assert score(store) == 0
    warm_up = 1  # compile_kernels
    spans = [span for task in tasks for span in task]
    assert len(spans) == len(set(spans)) == len(score_files(store)) == 4 + 3 + 1
    assert sum(span.num_columns for span in spans) == len(reads) == len(sorts) - warm_up == 3 * 16
    regions = {(array.path, columns.start, columns.stop) for array, _, columns in reads}
    assert len(regions) == len(reads)


def test_small_neighbours_share_a_task(monkeypatch):
    monkeypatch.setattr(stage, "TASK_BYTES", 96 * 4)
    places = [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("a", 5), ("b", 0), ("b", 1)]
    spans = [worker.Span(site, "max", i, i * 32, (i + 1) * 32, 16, ("auroc",)) for site, i in places]
    neuron_bytes = {("a", "max"): 4, ("b", "max"): 16}
    tasks = [[(c.site, c.index) for c in task] for task in stage._tasks(iter(spans), neuron_bytes, 24)]
    assert tasks == [places[:3], places[3:4], places[4:5], places[5:6], places[6:]]
    assert [len(task) for task in stage._tasks(iter(spans[:4]), neuron_bytes, 2)] == [2, 2]


def test_narrowed_then_widened_equals_all_at_once(store, scored):
    assert score(store, "--statistics", "auroc", "mean_positive") == 0
    assert set(aura_dist.open_store(store)["scores"]["layers.0.up"]["max"].data_vars) == {"auroc", "mean_positive"}
    assert score(store, "--statistics", "q_value") == 0
    assert set(aura_dist.open_store(store)["scores"]["layers.0.up"]["max"].data_vars) >= {"p_value", "q_value"}
    assert score(store) == 0
    assert score_files(store) == score_files(scored)
    written = {f: (store / f).stat().st_mtime_ns for f in score_files(store)}
    assert score(store, "--statistics", "auroc", "q_value") == score(store) == 0
    assert {f: (store / f).stat().st_mtime_ns for f in written} == written, "what is there is not made again"


def test_unknown_statistic_is_named(store, capsys):
    assert score(store, "--statistics", "auroc", "median") == 2
    assert "'median'" in capsys.readouterr().err
    assert not (store / "scores").exists()


def test_interrupted_q_values_are_made_again(store, scored, monkeypatch):
    def cut_off(*_):
        raise KeyboardInterrupt

    adjust = stage.adjust
    monkeypatch.setattr(stage, "adjust", cut_off)
    assert score(store) == 130
    assert "q_value" not in aura_dist.open_store(store)["scores"]["layers.0.up"]["max"]
    monkeypatch.setattr(stage, "adjust", adjust)
    assert score(store) == 0
    assert score_files(store) == score_files(scored)


def test_unfinished_store_is_refused_or_scored_in_part(tmp_path, capsys, caplog):
    whole = make_store(tmp_path / "whole.zarr", NUM_ROWS, (96,), CONCEPTS)
    part = make_store(tmp_path / "part.zarr", NUM_ROWS, (96,), CONCEPTS, num_unfinished=2)
    assert score(part) == 2
    refusal = capsys.readouterr().err
    view = aura_dist.open_store(part)
    missing = int(np.isnan(view["activations"]["layers.0.up"]["max"].values[:, 0]).sum())
    assert 0 < missing < NUM_ROWS
    assert f"{missing} of {NUM_ROWS} rows are missing" in refusal
    assert score(part, "--partial") == 0
    view = aura_dist.open_store(part)
    there = NUM_ROWS - missing
    assert view["scores"].attrs["partial"] is True
    assert (view["scores"].attrs["num_rows"], view["scores"].attrs["total_rows"]) == (there, NUM_ROWS)
    assert aura_dist.top_neurons(part, "toxic", 1).attrs["partial"]
    labels_CN, values = view["samples"]["label"].values.T, view["activations"]["layers.0.up"]["max"].values
    expected = statistics_by_concept(values[:there], labels_CN[:, :there], ["auroc"])["auroc"]
    np.testing.assert_array_equal(view["scores"]["layers.0.up"]["max"]["auroc"].values, expected)
    # the rest is collected: the scores of a part must not stand for the whole
    for name in ("activations", "progress"):
        shutil.copytree(whole / name, part / name, dirs_exist_ok=True)
    assert score(part) == 0
    assert score(whole) == 0
    assert score_files(part) == score_files(whole)
    assert aura_dist.open_store(part)["scores"].attrs["partial"] is False


def test_rows_missing_in_the_middle_are_left_out(tmp_path):
    store = make_store(tmp_path / "store.zarr", 400, (96,), CONCEPTS, dtype="float16")
    view = aura_dist.open_store(store)
    labels_CN, values = view["samples"]["label"].values.T, view["activations"]["layers.0.up"]["max"].values
    assert values.dtype == np.float16
    tasks = tasks_of(view["samples"]["num_tokens"].values, TOKENS_PER_BATCH)
    assert len(tasks) > 3
    (store / "progress" / "done" / "c" / "1").unlink()
    assert score(store, "--partial") == 0
    scores = aura_dist.open_store(store)["scores"]
    there = np.ones(400, bool)
    there[tasks[1].start : tasks[1].stop] = False
    assert scores.attrs["num_rows"] == there.sum()
    expected = statistics_by_concept(values[there], labels_CN[:, there], OVER_COLUMNS)
    for name in OVER_COLUMNS:
        np.testing.assert_array_equal(scores["layers.0.up"]["max"][name].values, expected[name], err_msg=name)


def test_part_without_a_class_is_refused(tmp_path, capsys):
    store = make_store(tmp_path / "store.zarr", 64, (32,), num_unfinished=0)
    done = sorted((store / "progress" / "done" / "c").iterdir())
    for file in done:
        file.unlink()
    assert score(store, "--partial") == 2
    assert "0 positive and 0 negative rows among the 0" in capsys.readouterr().err


@pytest.mark.parametrize("row_chunk", ["0", "2"], ids=["full", "the last, in part"])
def test_damaged_shard_is_named_and_nothing_written_for_its_span(row_chunk, store, capsys):
    shard = store / "activations" / "layers.1.up" / "max" / "c" / row_chunk / "0"
    flip(shard)
    assert score(store) == 2
    assert f"the chunk {str(shard)!r} is damaged" in capsys.readouterr().err
    assert not [f for f in score_files(store) if f.startswith("scores/layers.1.up/max")]


def test_score_that_cannot_be_written_is_named(store, capfd):
    assert score(store, "--statistics", "auroc", "num_distinct") == 0
    directory = store / "scores" / "layers.1.up" / "max" / "c" / "0"
    shutil.rmtree(directory)
    directory.write_text("in the way of the directory")
    capfd.readouterr()
    assert score(store, "--statistics", "auroc", "num_distinct") == 2
    shown = capfd.readouterr().err
    assert re.search("a score cannot be written: .*Not a directory", shown)
    assert "Traceback" not in shown


def test_worker_near_its_memory_limit_goes_on(store, scored):
    """Beyond Dask's 80 % it would pause for ever: what is freed is kept for the next column."""
    process = started(store, "--memory-limit", "350MB", "--num-workers", "1")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert score_files(store) == score_files(scored)


def flip(chunk: Path) -> None:
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)


def test_damaged_chunks_are_not_read_in_part(scored, tmp_path):
    """Neither of responses, in the last row chunk, nor of scores, for one concept of several."""
    store = Path(shutil.copytree(scored, tmp_path / "store.zarr"))
    responses = aura_dist.open_store(str(store))["activations"]["layers.1.up"]["max"]
    assert np.isfinite(responses[240:245, :3].values).all()
    flip(store / "activations" / "layers.1.up" / "max" / "c" / "2" / "0")
    with pytest.raises(StoreError, match="checksum"):
        [responses[240:245, i : i + 13].compute() for i in range(0, 200, 13)]
    flip(store / "scores" / "layers.1.up" / "max" / "c" / "0" / "0" / "0")
    with pytest.raises(StoreError, match=r"'scores/layers\.1\.up/max', found it missing or damaged"):
        [aura_dist.open_store(str(store))["scores"]["layers.1.up"]["max"][name].values for name in STATISTICS]
    shutil.rmtree(store / "scores" / "layers.1.up" / "max" / "c")
    with pytest.raises(StoreError, match=r"layers\.1\.up has not been scored"):
        aura_dist.top_neurons(str(store), "toxic", 5)


def test_error_of_a_worker_reaches_the_client_as_it_is(tmp_path):
    from distributed.core import clean_exception, error_message

    (tmp_path / "no-store").mkdir()
    span = worker.Span("site", "max", 0, 0, 16, 16, ("auroc",))
    with pytest.raises(StoreError, match="expected a store that `collect` wrote") as raised:
        worker.score_spans(worker.Source(str(tmp_path / "no-store"), ((0, 32),), "token"), [span])
    message = error_message(raised.value)
    _, received, _ = clean_exception(message["exception"].data, None)
    assert isinstance(received, StoreError)
    assert str(received) == str(raised.value)


def test_too_small_a_memory_limit_is_refused_before_any_worker(store, monkeypatch, capsys):
    monkeypatch.setattr(stage, "dask_client", None)
    assert score(store, "--memory-limit", "200MB") == 2
    assert "--memory-limit: expected at least 0." in capsys.readouterr().err


def test_cluster_that_is_there(store, scored):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None, protocol="tcp", host="127.0.0.1"
    ) as cluster:
        assert cluster.scheduler_address.startswith("tcp://")
        assert score(store, "--dask", cluster.scheduler_address) == 0
    assert score_files(store) == score_files(scored)


def test_workers_that_come_later_are_noted(store, monkeypatch):
    from distributed import Client, LocalCluster

    @contextmanager
    def slow_to_come(*settings):
        none_yet = LocalCluster(n_workers=0, threads_per_worker=1, processes=False, dashboard_address=None)
        with none_yet as cluster, Client(cluster) as client:
            Timer(1.0, cluster.scale, [1]).start()
            yield client

    monkeypatch.setattr(stage, "dask_client", slow_to_come)
    assert score(store) == 0
    assert read_times(open_group(str(store)), SCORED)["workers"] == 1


def test_scheduler_that_does_not_answer(store, monkeypatch, capsys):
    monkeypatch.setattr("aura_dist.scoring.cluster.CONNECT_SECONDS", 1)
    assert score(store, "--dask", "tcp://127.0.0.1:9") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --dask tcp://127.0.0.1:9: expected a cluster")


@pytest.fixture(scope="module")
def long_store(tmp_path_factory):
    """A store of many sites, so that there is a middle to be killed in."""
    return make_store(tmp_path_factory.mktemp("long") / "store.zarr", 400, (128,) * 24, CONCEPTS)


@pytest.fixture(scope="module")
def long_scores(long_store, tmp_path_factory):
    store = Path(shutil.copytree(long_store, tmp_path_factory.mktemp("undisturbed") / "store.zarr"))
    assert score(store) == 0
    return score_files(store)


def finished_files(store: Path) -> dict[str, bytes]:
    """The files of scores, without those that a killed process had begun."""
    return {name: content for name, content in score_files(store).items() if not name.endswith(PARTIAL)}


def started(store: Path, *more: str, start_new_session: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-m", "aura_dist", "score", "--store", str(store), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=start_new_session,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background job ignores
    )  # fmt: skip


def wait_for_spans(store: Path, process: subprocess.Popen, count: int) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while len(list(store.glob("scores/*/*/c/0/0/0"))) < count:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_client_killed_and_restarted(kind, long_store, long_scores, tmp_path, monkeypatch):
    store = Path(shutil.copytree(long_store, tmp_path / "store.zarr"))
    process = started(store, "--dask", kind, "--num-workers", "2")
    wait_for_spans(store, process, 5)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=DEADLINE_SECONDS)
    psutil.wait_procs(tree, timeout=DEADLINE_SECONDS)
    kept = [f for f in score_files(store) if f.endswith("/c/0/0/0")]
    assert 5 <= len(kept) < len(long_scores), "it was killed in the middle"
    monkeypatch.setattr(stage, "adjust", lambda *_: None)  # which writes every file again
    written = {f: (store / f).stat().st_mtime_ns for f in kept}
    assert score(store) == 0
    assert {f: (store / f).stat().st_mtime_ns for f in kept} == written, "finished spans are kept"
    monkeypatch.undo()
    assert score(store) == 0
    assert finished_files(store) == long_scores


def test_worker_killed(long_store, long_scores, tmp_path):
    store = Path(shutil.copytree(long_store, tmp_path / "store.zarr"))
    process = started(store, "--dask", "processes", "--num-workers", "2")
    wait_for_spans(store, process, 5)
    workers = [c for c in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in " ".join(c.cmdline())]
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, output
    assert finished_files(store) == long_scores


def test_interrupt_at_a_terminal(long_store, tmp_path):
    """Ctrl-C reaches the workers' processes too: they leave the word to the client."""
    store = Path(shutil.copytree(long_store, tmp_path / "store.zarr"))
    process = started(store, "--dask", "processes", "--num-workers", "2", start_new_session=True)
    wait_for_spans(store, process, 5)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130, output
    assert output.splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in output


def test_an_error_of_a_task_is_one_line(store):
    flip(store / "activations" / "layers.1.up" / "max" / "c" / "0" / "0")
    output, _ = (process := started(store)).communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 2
    assert output.splitlines()[-1].startswith("error: the chunk")
    assert "Traceback" not in output


def test_dashboard_is_where_it_is_said_to_be(caplog):
    pytest.importorskip("bokeh", reason="the extra with the dashboard is not installed")
    caplog.set_level("INFO")
    with dask_client("threads", 1, "1GB"):
        link = urlsplit(next(m for m in caplog.messages if m.startswith("dashboard: ")).removeprefix("dashboard: "))
        with socket.create_connection((link.hostname, link.port), timeout=5):
            pass


def test_settings_file_takes_slurm_options(tmp_path, store, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"score": {"store": str(store), "dask": "slurm", "slurm": {"queu": "main"}}}))
    assert main(["score", "--config", str(config)]) == 2
    assert "--slurm: expected keys and values" in capsys.readouterr().err
    assert score(store, "--dask", "slurm", "--slurm", "queue") == 2
    assert "expected KEY=VALUE" in capsys.readouterr().err
    assert score(store, "--dask", "slurm", "--slurm", "walltime=60") == 2
    assert "expected walltime in quotes" in capsys.readouterr().err
