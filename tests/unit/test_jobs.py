"""Jobs of a sweep: their state files, and what the launchers make of them."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from aura_dist.errors import ClusterError
from aura_dist.runtime import slurm_jobs
from aura_dist.runtime.job_command import JobCommand
from aura_dist.runtime.local_jobs import LocalLauncher


@pytest.fixture
def command(tmp_path):
    (tmp_path / "jobs").mkdir()
    return JobCommand(tmp_path, "fit-a", "fit")


def attempt(command, output, code):
    command.begin()
    with command.open_log() as log:
        log.write(output)
    command.end(code)
    return command.state


def test_reason_is_what_the_last_attempt_said(command):
    assert attempt(command, "error: no such file\n", 2).reason == "no such file"
    state = attempt(command, "Traceback\nMemoryError\n", 1)
    assert state.reason == "exit code 1; last output: MemoryError"
    assert (state.attempts, state.starts) == (2, 2)
    assert attempt(command, "", -9).reason == "killed by SIGKILL; last output: no output"
    assert command.log.read_text().count("error: no such file") == 1, "the log keeps all"


class Executor:
    """submitit's, without a cluster: gives numbers."""

    def __init__(self):
        self.submitted = []

    def batch(self):
        return nullcontext()

    def submit(self, task):
        self.submitted.append(task)
        return SimpleNamespace(job_id=f"7_{len(self.submitted)}")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A launcher whose jobs stay where the test puts them; `queue` is what squeue would say."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    executor, queue = Executor(), {"7_1", "7_2"}
    monkeypatch.setattr(slurm_jobs, "make_executor", lambda *arguments: executor)
    monkeypatch.setattr(slurm_jobs, "_queue", lambda: queue)
    monkeypatch.setattr(slurm_jobs, "SQUEUE_SECONDS", -1.0)
    return SimpleNamespace(launcher=slurm_jobs.SlurmLauncher(tmp_path, {}), executor=executor, queue=queue)


def test_job_that_waits_in_slurm_to_be_tried_again_has_not_ended(slurm, command):
    slurm.launcher.start([command])
    attempt(command, "error: no room\n", 1)
    assert slurm.launcher.ended() == [command.job]
    slurm.launcher.start([command])
    assert (command.state.state, command.state.attempts) == ("queued", 1)
    assert slurm.launcher.ended() == [], "it is in the queue: another would run beside it"
    attempt(command, "", 0)
    assert slurm.launcher.ended() == [command.job]


def test_job_that_slurm_never_begins_uses_up_its_attempts(slurm, command):
    slurm.queue.clear()
    for times in (1, 2, 3):
        slurm.launcher.start([command])
        assert slurm.launcher.ended() == [], "one answer of squeue may lack it"
        assert slurm.launcher.ended() == [command.job]
        assert (command.state.state, command.state.attempts) == ("failed", times)


def test_killed_job_is_one_attempt(slurm, command):
    slurm.launcher.start([command])
    command.begin()
    slurm.queue.clear()
    assert [slurm.launcher.ended(), slurm.launcher.ended()] == [[], [command.job]]
    assert (command.state.state, command.state.attempts) == ("failed", 1)


def test_next_sweep_follows_what_is_in_the_queue_and_has_not_ended(slurm, command, tmp_path, monkeypatch):
    other = JobCommand(tmp_path, "fit-b", "fit")
    slurm.launcher.start([command, other])
    attempt(other, "error: no room\n", 1)  # Slurm still cleans up after it
    after = slurm_jobs.SlurmLauncher(tmp_path, {})
    assert after.adopt([command, other, JobCommand(tmp_path, "fit-c", "fit")]) == [command.job]
    monkeypatch.setattr(slurm_jobs, "_queue", lambda: None)
    with pytest.raises(ClusterError, match="would be started twice"):
        slurm_jobs.SlurmLauncher(tmp_path, {}).adopt([command])


@pytest.mark.parametrize(
    ("gpus", "num_slots", "ranks", "shares"),
    [
        ("0,1,2,3", 2, 2, [["0", "1"], ["2", "3"]]),
        ("0,1,2,3", 2, 1, [["0", "1"], ["2", "3"]]),
        ("0,1,2", 2, 2, [["0", "1"], ["2", "0"]]),
        ("0,1,2,3", 2, 3, [["0", "1", "2"], ["3", "0", "1"]]),
        ("5", 3, 1, [["5"]] * 3),
        ("5", 2, 2, [["5"]] * 2),
        ("0,1", 1, 2, [[]]),
        ("", 2, 1, [[], []]),
    ],
)
def test_every_rank_of_a_local_job_has_a_gpu_where_there_are_as_many(gpus, num_slots, ranks, shares, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    launcher = LocalLauncher(num_slots)
    assert [launcher._share(slot, ranks) for slot in range(num_slots)] == shares
