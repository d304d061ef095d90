"""Kills, signals, full disks: no row is lost or doubled, nothing hangs, and one command goes on."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from aura_dist.cli import main
from aura_dist.ranks.team import DEAD_SECONDS
from tests.distributed.launch import Launch, Torchrun, launched, run_ranks
from tests.store.test_store_faults import chunk_files

pytestmark = pytest.mark.timeout(300)

NUM_RANKS = 2
SHARDINGS = ("replicate", "fsdp", "tensor")
# of tiny batches, so that there is a time in which to be struck
BATCHES = [
    "--num-positive", "200", "--num-negative", "200", "--tokens-per-batch", "24", "--modules", "all",
    "--pooling", "max", "mean",
]  # fmt: skip


def arguments(model, data, store, *more):
    return [
        "collect",
        "--model",
        str(model),
        "--data",
        data,
        "--concepts",
        "toxic",
        "--store",
        str(store),
        *BATCHES,
        *more,
    ]


def wait_until_working(launch: Launch, store: Path, num_tasks: int = 1) -> None:
    """Until some tasks are finished."""
    end = time.monotonic() + 120
    while sum(f.read_bytes() != b"" for f in store.glob("activations/*/max/c/*/0")) < num_tasks:
        assert time.monotonic() < end, launch.text()
        assert launch.is_running(), launch.text()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tiny_dir, sentences_csv, tmp_path_factory):
    """`whole(sharding, …)`: the uninterrupted store under a strategy and further flags, made at first use."""
    out = tmp_path_factory.mktemp("whole")
    made: dict[tuple[str, ...], Path] = {}

    def store(*flags):
        if flags not in made:
            made[flags] = out / f"{len(made)}"
            run_ranks(NUM_RANKS, arguments(tiny_dir("llama"), sentences_csv, made[flags], "--sharding", *flags))
        return made[flags]

    return store


def run_slowly(command):
    """`aura-dist COMMAND` as a rank that takes 20 ms more a batch, so that no machine is too fast to strike it."""
    from aura_dist.collecting.capture import Capture

    run = Capture.run

    def slow(*given):
        time.sleep(0.02)
        run(*given)

    Capture.run = slow
    return main(command)


def kill_and_resume(sharding, seed, model, data, store, expected, *more):
    """Kill one rank or all at a random moment; the same command completes the store, bit for bit."""
    chance = random.Random(seed)
    command = arguments(model, data, store, "--sharding", sharding, *more)
    with launched(Launch(NUM_RANKS, command, run_slowly)) as launch:
        wait_until_working(launch, store)
        time.sleep(chance.uniform(0, 1.5))
        assert launch.is_running(), f"they ended before the kill:\n{launch.text()}"
        ranks = launch.ranks()
        for rank in ranks if chance.random() < 0.5 else ranks[chance.randrange(len(ranks)) :][:1]:
            rank.kill()
        # rank 0 of a replicated model does the rest, and then waits for a sign of life
        launch.wait(DEAD_SECONDS + 30)
    run_ranks(NUM_RANKS, command)
    assert chunk_files(store) == chunk_files(expected)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_killed_and_resumed_equals_uninterrupted(sharding, whole, tiny_dir, sentences_csv, tmp_path):
    kill_and_resume(sharding, 1, tiny_dir("llama"), sentences_csv, tmp_path / "store", whole(sharding))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_five_kills(whole, tiny_dir, sentences_csv, tmp_path):
    for turn in range(25):
        sharding = SHARDINGS[turn % 3]
        kill_and_resume(sharding, 100 + turn, tiny_dir("llama"), sentences_csv, tmp_path / f"{turn}", whole(sharding))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_kills_where_tokens_are_kept(sharding, whole, tiny_dir, sentences_csv, tmp_path):
    """Values of tokens have files of their own, which ranks write in turns under tensor parallelism."""
    kept = ("--keep-tokens", "*.layers.1.mlp.*")
    for turn in range(3):
        store = tmp_path / f"{turn}"
        expected = whole(sharding, *kept)
        kill_and_resume(sharding, 200 + turn, tiny_dir("llama"), sentences_csv, store, expected, *kept)
        assert len(list(store.glob("activations/*.layers.1.mlp.*/tokens/c/**/0"))) > 500


@pytest.mark.parametrize(("first", "second"), [("replicate", "tensor"), ("tensor", "replicate")])
def test_another_strategy_finishes_a_store(first, second, whole, tiny_dir, sentences_csv, tmp_path):
    from tests.collecting.test_strategies import assert_same

    store = tmp_path / "store"
    command = arguments(tiny_dir("llama"), sentences_csv, store)
    with launched(Launch(NUM_RANKS, [*command, "--sharding", first])) as launch:
        wait_until_working(launch, store)
        launch.kill()
    run_ranks(NUM_RANKS, [*command, "--sharding", second])
    assert_same(store, whole("replicate"), f"{first}, then {second}")


def test_one_process_and_two_finish_each_others_stores(whole, tiny_dir, sentences_csv, tmp_path, monkeypatch):
    from aura_dist.collecting.capture import Capture
    from tests.collecting.test_strategies import assert_same

    run, calls = Capture.run, iter(range(30))

    def interrupted(self, *args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        run(self, *args)

    store, command = tmp_path / "begun-by-one", arguments(tiny_dir("llama"), sentences_csv, tmp_path / "begun-by-one")
    with monkeypatch.context() as patch:
        patch.setattr(Capture, "run", interrupted)
        assert main(command) == 130
    run_ranks(NUM_RANKS, command)
    assert_same(store, whole("replicate"), "one, then two")
    store, command = tmp_path / "begun-by-two", arguments(tiny_dir("llama"), sentences_csv, tmp_path / "begun-by-two")
    with launched(Launch(NUM_RANKS, command)) as launch:
        wait_until_working(launch, store)
        launch.kill()
    assert main(command) == 0
    assert_same(store, whole("replicate"), "two, then one")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_signal_to_one_rank_ends_all_together(number, whole, tiny_dir, sentences_csv, tmp_path):
    store = tmp_path / "store"
    command = arguments(tiny_dir("llama"), sentences_csv, store, "--sharding", "fsdp")
    with launched(Launch(NUM_RANKS, command)) as launch:
        wait_until_working(launch, store)
        launch.ranks()[1].send_signal(number)
        assert launch.wait(20) == [128 + number] * NUM_RANKS, launch.text()
        assert f"stopped: {number.name} received; finished tasks are kept: run the same command" in launch.text()
    run_ranks(NUM_RANKS, command)
    assert chunk_files(store) == chunk_files(whole("fsdp"))


def test_torchrun_that_is_terminated_leaves_a_store_to_go_on_with(whole, tiny_dir, sentences_csv, tmp_path):
    store = tmp_path / "store"
    command = arguments(tiny_dir("llama"), sentences_csv, store)
    with launched(Torchrun(NUM_RANKS, command)) as launch:
        wait_until_working(launch, store)
        launch.agent.terminate()
        launch.wait(30)
        assert launch.text().count("stopped: SIGTERM received") >= 1, launch.text()
    run_ranks(NUM_RANKS, command)
    assert chunk_files(store) == chunk_files(whole("replicate"))


@pytest.mark.parametrize("sharding", ["fsdp", "tensor"])
def test_dead_rank_does_not_leave_the_other_hanging(sharding, tiny_dir, sentences_csv, tmp_path):
    store = tmp_path / "store"
    with launched(
        Launch(NUM_RANKS, arguments(tiny_dir("llama"), sentences_csv, store, "--sharding", sharding))
    ) as launch:
        wait_until_working(launch, store)
        launch.ranks()[1].kill()
        assert launch.wait(30) == [2, -signal.SIGKILL], launch.text()
        assert "Traceback" not in launch.text()
        assert re.search("^error: another rank is gone: .*run the same command to go on$", launch.text(), re.MULTILINE)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 700 kB; `small_disk.grow()` gives it room."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk_is_one_error_and_all_ranks_leave(small_disk, whole, tiny_dir, sentences_csv):
    store = small_disk / "store"
    command = arguments(tiny_dir("llama"), sentences_csv, store)
    with launched(Launch(NUM_RANKS, command)) as launch:
        start = time.monotonic()
        assert launch.wait(90) == [2, 2], launch.text()
        text = launch.text()
        assert time.monotonic() - start < 90
        assert len(re.findall("^error: ", text, re.MULTILINE)) == 1, text
        assert re.search("error: --store .*No space left on device.*finished tasks are kept", text), text
        assert "Traceback" not in text
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    run_ranks(NUM_RANKS, command)
    assert chunk_files(store) == chunk_files(whole("replicate"))
    assert os.path.ismount(small_disk)
