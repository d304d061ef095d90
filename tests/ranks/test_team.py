"""Ranks claim work and share values; those that wait for others leave when these have been stopped."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from torch.distributed import HashStore

from aura_dist.errors import RunInterruptedError, StoreError
from aura_dist.ranks.layout import Layout
from aura_dist.ranks.signals import interruption
from aura_dist.ranks.team import Team
from aura_dist.ranks.world import World

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def teams() -> Iterator[list[Team]]:
    """Two ranks' teams, in one process."""
    store = HashStore()
    both = [Team(World(Layout("replicate", 2), rank), store) for rank in range(2)]
    yield both
    for team in both:
        team.close()


def test_rank_0_does_not_wait_for_a_rank_that_was_stopped(teams):
    first, second = teams
    second.ended_by(interruption(signal.SIGTERM))
    with pytest.raises(RunInterruptedError, match="SIGTERM received"):
        first.meet("streamed")


def test_rank_0_that_waits_heeds_its_own_signal(teams):
    with pytest.raises(RunInterruptedError, match="SIGUSR1 received"):
        teams[0].meet("streamed", lambda: int(signal.SIGUSR1))


def test_ranks_do_not_wait_for_what_a_stopped_rank_0_makes(teams):
    first, second = teams
    first._leave_stopped = lambda: None
    first.ended_by(interruption(signal.SIGINT))
    with pytest.raises(RunInterruptedError, match="SIGINT received"):
        second.from_first("left", list)


def test_work_that_is_done_ends_well_whoever_is_stopped_now(teams):
    first, second = teams
    second.ended_by(interruption(signal.SIGTERM))
    first.finish()


def together(teams, call):
    """What `call` returns for each team, each in a thread of its own."""
    with ThreadPoolExecutor(len(teams)) as threads:
        return list(threads.map(call, teams))


def test_every_rank_gathers_values_of_any_size(teams, monkeypatch):
    monkeypatch.setattr("aura_dist.ranks.team._VALUE_BYTES", 1000)
    values = [np.arange(3), np.arange(10_000)]
    for found in together(teams, lambda team: team.gather("values", values[team.world.global_rank])):
        assert [part.tolist() for part in found] == [value.tolist() for value in values]


def test_rank_that_gathers_does_not_wait_for_one_that_was_stopped(teams):
    first, second = teams
    second.ended_by(interruption(signal.SIGTERM))
    with pytest.raises(RunInterruptedError, match="SIGTERM received"):
        first.gather("values", 1)


def test_units_are_claimed_once_and_turn_by_turn(teams):
    units = [3, 2, 2, 1, 1, 1]
    first, second = together(teams, lambda team: list(team.claimed("units", range(6), int, units.__getitem__)))
    assert sorted(first + second) == [(unit, turn) for unit, number in enumerate(units) for turn in range(number)]


def test_what_is_made_once_a_host_reaches_its_other_ranks(teams):
    made = []

    def make():
        made.append(1)
        return {"ids": np.arange(5)}

    found = together(teams, lambda team: team.once_a_host("data", make))
    assert [value["ids"].tolist() for value in found] == [list(range(5))] * 2
    assert len(made) == 1


def test_rank_that_cannot_open_what_was_made_makes_it_itself(teams):
    first, second = teams
    assert first.once_a_host("data", lambda: 1) == 1
    first.close()
    assert second.once_a_host("data", lambda: 2) == 2


def test_reason_of_a_failure_is_not_lost_to_a_signal_that_follows_it(teams, monkeypatch):
    def struck(seconds):
        raise interruption(signal.SIGTERM)

    failure = StoreError("the disk is full")
    with monkeypatch.context() as patch:
        patch.setattr("aura_dist.ranks.team.time.sleep", struck)
        assert teams[0].ended_by(failure) is failure
    assert "the disk is full" in str(teams[1].ended_by(RuntimeError("gloo")))


STOPPED = """
import os, signal, time
from aura_dist import cli
from aura_dist.ranks.signals import interruption
def run(arguments):
    raise interruption(signal.SIGUSR1)
cli.run = run
code = cli.main([])
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGUSR1)
raise SystemExit(code)
"""


def test_signals_that_come_while_a_stopped_command_ends_do_not_change_its_exit_code():
    """Slurm ends a step's other ranks when one exits, and requeues a job for the code of the first signal alone."""
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGUSR1, done
    assert done.stderr.startswith("stopped: SIGUSR1 received")


def test_ranks_of_a_host_begin_their_turns_together(teams):
    first, second = teams
    together(teams, lambda team: team.keep_abreast("waves", leaves=False))
    with ThreadPoolExecutor(1) as ahead:
        waits = ahead.submit(first.keep_abreast, "waves", leaves=False)
        with pytest.raises(TimeoutError):
            waits.result(timeout=0.5)
        second.keep_abreast("waves", leaves=False)
        waits.result(timeout=5)
        waits = ahead.submit(first.keep_abreast, "waves", leaves=False)
        second.keep_abreast("waves", leaves=True)  # it has no more, and does not wait
        waits.result(timeout=5)


def test_a_rank_does_not_wait_for_a_turn_of_a_stopped_one(teams):
    first, second = teams
    together(teams, lambda team: team.keep_abreast("waves", leaves=False))
    second.ended_by(interruption(signal.SIGTERM))
    with pytest.raises(RunInterruptedError, match="SIGTERM received"):
        first.keep_abreast("waves", leaves=False)
