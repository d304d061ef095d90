"""Two launches on one store: the second says who is at work, and destroys nothing; a killed launch is no bar."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest

from aura_dist.cli import main
from aura_dist.errors import StoreError
from aura_dist.ranks.process import this_process
from aura_dist.ranks.signals import StopFlag
from aura_dist.store import launches
from aura_dist.store.access import damaged, exists, open_group, zarr_store
from aura_dist.store.launches import Mark, _marks, _write, at_work
from tests.store.test_store_faults import chunk_files

pytestmark = pytest.mark.timeout(200)
ALL = ("collect", "score")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    for name, seconds in {"BEAT_SECONDS": 0.3, "DEAD_SECONDS": 1.5, "WAIT_SECONDS": 1.0}.items():
        monkeypatch.setattr(launches, name, seconds)


@pytest.fixture(params=["directory", "memory://"])
def place(request, tmp_path):
    return str(tmp_path / "s.zarr") if request.param == "directory" else f"memory://{tmp_path}/s.zarr"


def entered(path, verb="collect", *, against=("collect",), wait=False):
    return at_work(path, zarr_store(path), verb, against=against, wait=wait)


@pytest.fixture
def ended():
    """What `this_process` said in a process that has ended."""
    say = "from aura_dist.ranks.process import this_process; print(this_process())"
    said = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, check=True).stdout
    return eval(said)


def leave_mark(path, process, verb="collect") -> Mark:
    """The mark of a launch that is not at work any more, or on another machine."""
    mark = Mark(f"{launches.MARK}0123", verb, {**process, "job": "4711"}, "2026-11-28 03:00:00")
    assert _write(zarr_store(path), mark)
    return mark


@pytest.mark.parametrize("spoilt", [{"process": {}}, {"process": "me"}, {"beat": "x"}, {"since": None}])
def test_a_damaged_mark_is_no_bar(spoilt, place, ended):
    mark = leave_mark(place, ended)
    assert _write(zarr_store(place), replace(mark, **spoilt))
    with entered(place):
        assert len(_marks(zarr_store(place))) == 1


@contextmanager
def beating(path, mark):
    """The mark of a launch that is at work on another machine."""
    leaving = threading.Event()

    def beat():
        number = 0
        while not leaving.wait(0.2):
            number += 1
            _write(zarr_store(path), replace(mark, beat=number))

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    leaving.set()
    thread.join()


def test_second_launch_says_who_is_at_work_and_since_when(place):
    with entered(place):
        since = time.strftime("%Y-%m-%d %H:")
        for wait in (False, True):
            start = time.monotonic()
            with pytest.raises(StoreError, match=f"`collect` of process {os.getpid()} on .*, since {since}"):
                entered(place, wait=wait).__enter__()
            assert (time.monotonic() - start > 1) is wait
        assert len(_marks(zarr_store(place))) == 1
    assert not exists(place), "nothing is left"
    with entered(place):
        pass


def test_second_launch_begins_when_the_first_ends(place, monkeypatch):
    monkeypatch.setattr(launches, "WAIT_SECONDS", 20)
    first = entered(place)
    first.__enter__()
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(lambda: entered(place, wait=True).__enter__())
        time.sleep(0.5)
        assert not second.done()
        first.__exit__(None, None, None)
        second.result()


def test_verbs_that_do_not_disturb_each_other_work_at_once(place):
    with entered(place), entered(place, "score", against=("score",)):
        for verb in ALL:
            with pytest.raises(StoreError, match="no other launch at work"):
                entered(place, verb, against=ALL).__enter__()


def test_mark_of_a_process_that_was_killed_is_removed_at_once(place, ended):
    leave_mark(place, ended)
    start = time.monotonic()
    with entered(place):
        assert time.monotonic() - start < 1
        assert [mark.process["pid"] for mark in _marks(zarr_store(place))] == [os.getpid()]


def test_mark_of_another_machine_counts_as_long_as_its_beat_moves(place):
    mark = leave_mark(place, {**this_process(), "space": "another machine", "host": "gpu07"})
    with beating(place, mark), pytest.raises(StoreError, match=r"on gpu07 \(Slurm job 4711\), since 2026-11-28 03:00"):
        entered(place).__enter__()
    start = time.monotonic()
    with entered(place, against=ALL):
        assert 1.5 <= time.monotonic() - start < 5


def test_of_launches_that_come_together_one_works_at_a_time(place, monkeypatch):
    monkeypatch.setattr(launches, "WAIT_SECONDS", 30)
    inside = []

    def launch(number):
        with entered(place, wait=True):
            inside.append(number)
            assert inside == [number]
            time.sleep(0.05)
            inside.remove(number)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(launch, range(3)))


def test_launch_whose_store_was_taken_over_stops_in_an_orderly_way(place, caplog):
    store = zarr_store(place)
    with StopFlag() as stop, stop.deferred(), entered(place):
        (mark,) = _marks(store)
        launches._remove(store, mark)
        end = time.monotonic() + 20
        while stop.received is None and time.monotonic() < end:
            time.sleep(0.05)
        assert stop.received == signal.SIGTERM
    assert "another launch has taken over the store" in caplog.text


def test_nothing_is_damaged_while_another_is_at_work(tmp_path, plain_store, ended):
    import shutil

    path = str(shutil.copytree(plain_store("llama"), tmp_path / "s.zarr"))
    group = open_group(path)
    advice = "again with --overwrite"
    for name, verb in {"activations/x/max": "collect", "scores/x/max/auroc": "score"}.items():
        assert f"{verb} {advice}" in str(damaged(group, name, "gone"))
        with entered(path, verb):
            assert f"{verb} {advice}" in str(damaged(group, name, "gone")), "this launch is no other"
        other = leave_mark(path, {**this_process(), "space": "elsewhere", "launch": "another"}, verb)
        found = str(damaged(group, name, "gone"))
        assert advice not in found
        assert f"`{verb}` of process {os.getpid()} on " in found
        assert "is at work on it: wait until that has ended, and run the same command again" in found
        launches._remove(zarr_store(path), other)
        leave_mark(path, {**ended, "launch": "another"}, verb)
        assert f"{verb} {advice}" in str(damaged(group, name, "gone")), "it was killed"
        launches._remove(zarr_store(path), other)
    group.attrs["created"] = False
    leave_mark(path, {**this_process(), "space": "elsewhere", "launch": "another"})
    with pytest.raises(StoreError, match=r"never finished being made; `collect` of .*wait until that has ended"):
        open_group(path)


@pytest.fixture
def commands(tiny_dir, sentences_csv, tmp_path):
    store = str(tmp_path / "s.zarr")
    collect = ["collect", "--model", str(tiny_dir("llama")), "--data", sentences_csv, "--concepts", "toxic"]
    return (
        store,
        [*collect, "--num-positive", "20", "--num-negative", "20", "--modules", "*.0.mlp.down_proj", "--store", store],
        ["score", "--store", store, "--statistics", "auroc"],
    )


def test_commands_heed_each_other_and_leave_no_mark(commands, refused, ended, caplog):
    store, collect, score = commands
    logging.getLogger("aura_dist").propagate = True
    leave_mark(store, ended)
    assert main(collect) == main(score) == main([*score, "--overwrite"]) == 0
    assert not _marks(zarr_store(store))
    before = chunk_files(root := zarr_store(store).root)
    with entered(store):
        refused(collect, "no other launch at work on it, got `collect` of process")
        refused([*collect, "--overwrite"], "no other launch at work on it, got `collect` of process")
        assert main(score) == 0
    with entered(store, "score"):
        refused([*collect, "--overwrite"], "no other launch at work on it, got `score` of process")
        refused(score, "no other launch at work on it, got `score` of process")
        assert main(collect) == 0
    assert chunk_files(root) == before
    assert main([*collect, "--overwrite"]) == 0
    responses = {name: chunk for name, chunk in before.items() if not name.startswith("scores/")}
    assert chunk_files(root) == responses, "collected again, without scores"
    assert not _marks(zarr_store(store))


def test_finished_store_that_cannot_be_written_is_still_finished(commands, monkeypatch):
    _, collect, _ = commands
    assert main(collect) == 0
    monkeypatch.setattr(launches, "run_in_zarr", _no_writing(launches.run_in_zarr))
    assert main(collect) == 0


def _no_writing(run):
    def refuse(work):
        if work.__qualname__.endswith(".set"):
            work.close()
            raise PermissionError("read-only")
        return run(work)

    return refuse
