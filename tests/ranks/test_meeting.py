"""Ranks meet, or all of them end in time and say whom they waited for; whatever is at the port."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from itertools import count

import pytest
from torch.distributed import TCPStore

from aura_dist.errors import ConfigError
from aura_dist.ranks import meeting
from aura_dist.ranks.world import Place, _step_ports

pytestmark = pytest.mark.timeout(60)
SECONDS = 2.0


def free_port(port=0) -> int | None:
    """`port`, or any; None if a program has it."""
    with suppress(OSError), socket.create_server(("", port)) as found:
        return found.getsockname()[1]


@pytest.fixture
def launcher(monkeypatch):
    """`launcher(num_ranks, port)`: the variables that all ranks of a launch have."""
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(meeting.LONGER, str(SECONDS))
    monkeypatch.setattr(meeting, "ANSWER_SECONDS", 0.5)

    def start(num_ranks, port, **more):
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": num_ranks, **more}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        return port

    return start


def meet(ranks, num_ranks) -> list[TCPStore | ConfigError]:
    """How the meeting ends for each of `ranks`, which come together; none may take longer than it should."""

    def one(rank):
        try:
            return meeting.meet(Place(rank, num_ranks, rank))
        except ConfigError as error:
            return error

    start = time.monotonic()
    with ThreadPoolExecutor(len(ranks)) as threads:
        found = list(threads.map(one, ranks))
    assert time.monotonic() - start < SECONDS + 3
    return found


def assert_met(stores) -> None:
    for number, store in enumerate(stores, start=1):
        assert not isinstance(store, ConfigError), store
        assert store.add("key", 1) == number


@pytest.fixture
def stranger() -> Iterator:
    """`stranger(answer, port)`: a program at a port that reads nothing and sends `answer`; None: it never does."""
    listeners = []

    def listen(answer, port=0):
        listeners.append(listener := socket.create_server(("", port), backlog=8))
        kept = []

        def serve():
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    kept.append(connection)
                    if answer is not None:
                        with suppress(OSError):
                            connection.sendall(answer)
                            connection.shutdown(socket.SHUT_WR)
                            connection.recv(1000)
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        return listener.getsockname()[1]

    yield listen
    for listener in listeners:
        listener.close()


STRANGERS = {
    "silent": None,
    "closing": b"",
    "talking": b"SSH-2.0-OpenSSH_9.9\r\n" * 100,
    "web": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "binary": bytes(range(256)) * 8,
}


def test_all_who_come_share_a_store_and_the_next_launch_takes_the_same_port(launcher):
    port = launcher(3, free_port())
    assert_met(meet([0, 1, 2], 3))
    assert_met(meet([2, 0, 1], 3))
    assert port


def test_ranks_that_never_come_are_named_by_all_others(launcher):
    launcher(5, free_port())
    for rank, error in zip([0, 1, 4], meet([0, 1, 4], 5), strict=True):
        assert f"rank {rank} of 5" in str(error)
        assert "waited up to 2 s for rank 2, 3; expected 5 processes to come" in str(error)


def test_late_rank_is_waited_for(launcher):
    launcher(2, free_port())
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(meeting.meet, Place(0, 2))
        time.sleep(SECONDS / 2)
        assert_met([meeting.meet(Place(1, 2)), first.result()])


def test_rank_0_that_never_comes_is_named(launcher):
    launcher(3, free_port())
    for error in meet([1, 2], 3):
        assert "for rank 0: " in str(error)
        assert "refused" in str(error)


@pytest.mark.parametrize("kind", STRANGERS)
def test_port_that_the_launcher_fixed_is_taken(kind, launcher, stranger):
    port = launcher(3, stranger(STRANGERS[kind]))
    first, *others = meet([0, 1, 2], 3)
    assert f"127.0.0.1:{port}, cannot listen there" in str(first)
    assert "Address already in use" in str(first)
    for error in others:
        assert f"for rank 0: what {'listens' if kind == 'silent' else 'answers'} at port {port}" in str(error)


@pytest.mark.parametrize("kind", STRANGERS)
def test_ranks_of_a_slurm_step_try_another_port(kind, launcher, stranger):
    jobs = ({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "3"} for job in count(int(time.time() * 100) % 10**6))
    step = next(job for job in jobs if all(map(free_port, _step_ports(job)[:2])))
    first, second, *_ = _step_ports(step)
    stranger(STRANGERS[kind], first)
    launcher(3, first, **step)
    stores = meet([0, 1, 2], 3)
    assert_met(stores)
    assert {store.port for store in stores} == {second}


def test_store_of_another_launch_is_not_joined(launcher):
    port = launcher(2, free_port())
    other = TCPStore("127.0.0.1", port, None, True, timedelta(seconds=5), wait_for_workers=False)
    first, second = meet([0, 1], 2)
    assert "Address already in use" in str(first)
    assert f"at port {port}" in str(second)
    assert other.num_keys() <= 1, "nothing is written to it"


def test_launch_of_another_size_or_job_at_the_same_port_is_another(launcher, monkeypatch):
    launcher(3, free_port())
    with ThreadPoolExecutor(1) as threads:
        elsewhere = threads.submit(meet, [0, 1], 3)
        time.sleep(0.3)
        monkeypatch.setenv("WORLD_SIZE", "4")
        (error,) = meet([2], 4)
        assert "is not rank 0 of this launch" in str(error)
        assert all("for rank 2;" in str(e) for e in elsewhere.result())


def test_second_process_of_a_rank_is_refused(launcher):
    launcher(3, free_port())
    first, *others = meet([0, 1, 1], 3)
    assert "for rank 2;" in str(first)
    assert sum("expected one process of that rank, got another" in str(e) for e in others) == 1


def test_slow_rank_0_counts_no_rank_that_has_hung_up(launcher, monkeypatch):
    """Else that rank would come again when the port is torch's already."""
    launcher(2, free_port(), **{meeting.LONGER: "6"})
    monkeypatch.setattr(meeting, "ANSWER_SECONDS", 1.0)
    greet, calls = meeting._Meeting._greet, []

    def slow(self, connection, came):
        calls.append(connection)
        time.sleep(1.5 if len(calls) == 1 else 0)
        greet(self, connection, came)

    monkeypatch.setattr(meeting._Meeting, "_greet", slow)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda rank: meeting.meet(Place(rank, 2)), range(2)))
    assert_met(found)
    assert len(calls) == 2


def test_rank_0_that_ends_while_others_wait_is_named(launcher, stranger):
    launcher(3, stranger(b"here\n"))
    for error in meet([1, 2], 3):
        assert "rank 0 came and ended; see what it said" in str(error)


@pytest.mark.parametrize("come", [[0, 1, 2], [0, 2]])
def test_ranks_of_torchrun_meet_in_its_store(come, launcher, monkeypatch):
    agent = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
    launcher(3, agent.port, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    for restart in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        found = meet(come, 3)
        if len(come) == 3:
            assert all(isinstance(store, TCPStore) for store in found), found
        else:
            assert all("for rank 1;" in str(error) for error in found), found


@pytest.mark.parametrize("variables", [{"MASTER_ADDR": ""}, {"MASTER_PORT": "0"}, {"MASTER_PORT": "70000"}])
def test_place_that_is_none(variables, launcher):
    launcher(2, 1, **variables)
    (error,) = meet([1], 2)
    assert "expected MASTER_ADDR and MASTER_PORT to be a host and a free port of rank 0" in str(error)


@pytest.mark.parametrize("seconds", ["a while", "0", "-5", "nan", "inf", ""])
def test_patience_that_is_no_number(seconds, launcher):
    launcher(2, 1, **{meeting.LONGER: seconds})
    (error,) = meet([0], 2)
    assert f"{meeting.LONGER}: expected a number of seconds above 0, got {seconds!r}" in str(error)
