"""Ranks that wait for others leave when those have been stopped."""

import signal
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore

from aura_dist.errors import RunInterruptedError
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
