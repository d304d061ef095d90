"""Jobs of a sweep: their state files, and what the launchers make of them."""

import os
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from aura_dist.errors import ClusterError, ConfigError
from aura_dist.ranks.slurm_queue import queued_jobs
from aura_dist.sweep import slurm as slurm_jobs
from aura_dist.sweep import slurm_job
from aura_dist.sweep.jobs import JobCommand
from aura_dist.sweep.local import LocalLauncher
from aura_dist.sweep.slurm_job import make_executor, outside_job, stage_resources


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
    assert attempt(command, "", -35).reason == "killed by signal 35; last output: no output"
    assert command.log.read_text().count("error: no such file") == 1, "the log keeps all"


def test_interruptions_count_once_they_leave_nothing_new(command):
    done = []
    command = replace(command, kept=lambda: len(done))
    for task in range(4):
        done.append(task)
        assert attempt(command, "", 138).state == "queued"
        assert attempt(command, "", 143).state == "queued"
    assert command.state.attempts == 0
    assert attempt(command, "", 138).state == "queued"
    state = attempt(command, "", 138)
    assert (state.state, state.attempts, state.submission) == ("failed", 1, "")
    assert "3 starts in a row were ended by a signal" in state.reason
    command.write(state.submitted())
    assert attempt(command, "", 138).state == "queued", "tried again, it is counted anew"
    for _ in range(4):
        command.begin()
        command.end(130, asked=True)
        assert command.state.state == "queued", "a person may stop at any time"


def test_signal_from_outside_is_a_failure_of_a_local_job(command, monkeypatch):
    process = SimpleNamespace(poll=lambda: 143)
    monkeypatch.setattr(JobCommand, "start", lambda self, log, **how: process)
    launcher = LocalLauncher(1)
    launcher.start([command])
    assert launcher.ended() == [command.job]
    assert (command.state.state, command.state.attempts) == ("failed", 1)
    assert command.state.reason.startswith("killed by SIGTERM")


class Executor:
    """submitit's, without a cluster: gives numbers, refuses arrays of more than `room` jobs in all."""

    def __init__(self):
        self.submitted = []
        self.after = []
        self.room = 100

    def make(self, directory, stage, resources, after=()):
        self.after.append(list(after))
        return self

    @contextmanager
    def batch(self):
        before = len(self.submitted)
        yield
        if len(self.submitted) > self.room:
            del self.submitted[before:]
            raise RuntimeError("sbatch: error: Job violates accounting/QOS policy (job submit limit, user's size)")

    def submit(self, task):
        self.submitted.append(task)
        return SimpleNamespace(job_id=f"7_{len(self.submitted)}")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A launcher whose jobs stay where the test puts them; `queue` is what squeue would say."""
    monkeypatch.setattr(slurm_job, "CACHED_SECONDS", 0.0)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    executor, queue = Executor(), {"7_1", "7_2"}
    monkeypatch.setattr(slurm_jobs, "make_executor", executor.make)
    monkeypatch.setattr(slurm_jobs, "queued_jobs", lambda: queue)
    monkeypatch.setattr(slurm_jobs, "cancel_waiting", queue.difference_update)
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
    monkeypatch.setattr(slurm_jobs, "queued_jobs", lambda: None)
    with pytest.raises(ClusterError, match="would be started twice"):
        slurm_jobs.SlurmLauncher(tmp_path, {}).adopt([command])


@pytest.fixture
def chain(command):
    """score-a ◀ fit-a ◀ evaluate-a."""
    score = JobCommand(command.directory, "score-a", "score")
    fit = JobCommand(command.directory, "fit-a", "fit", ("score-a",))
    return score, fit, JobCommand(command.directory, "evaluate-a", "evaluate", ("fit-a",))


def test_jobs_are_submitted_at_once_each_after_those_that_it_needs(slurm, chain):
    slurm.executor.after.clear()
    assert slurm.launcher.start(chain) == ["score-a", "fit-a", "evaluate-a"]
    assert slurm.executor.after == [[], ["7_1"], ["7_2"]]
    score, fit, _ = chain
    attempt(score, "", 0)
    attempt(fit, "error: no room\n", 1)
    assert slurm.launcher.ended() == ["score-a", "fit-a"]
    slurm.launcher.withdraw(chain[2:])
    slurm.executor.after.clear()
    assert slurm.launcher.start(chain[1:]) == ["fit-a", "evaluate-a"]
    assert slurm.executor.after == [[], ["7_4"]], "score is done"


def test_jobs_with_the_same_needs_are_one_array(slurm, chain):
    more = [JobCommand(chain[1].directory, f"fit-{name}", "fit", ("score-a",)) for name in "bc"]
    slurm.executor.after.clear()
    slurm.launcher.start([*chain[:2], *more])
    assert slurm.executor.after == [[], ["7_1"]]


def test_job_that_slurm_drops_for_what_it_waits_for_was_not_tried(slurm, chain):
    score, fit, evaluate = chain
    slurm.launcher.start(chain)
    score.begin()
    slurm.queue.clear()  # all three, at once
    assert [slurm.launcher.ended(), slurm.launcher.ended()] == [[], ["score-a"]]
    assert (fit.state.state, evaluate.state.attempts) == ("queued", 0)
    slurm.launcher.withdraw([fit, evaluate])
    assert slurm.launcher.ended() == []


def test_waiting_job_that_a_user_cancels_fails_once_its_turn_has_come(slurm, chain):
    score, fit, _ = chain
    slurm.queue.clear()
    slurm.queue.add("7_1")
    slurm.launcher.start([score, fit])
    assert [slurm.launcher.ended() for _ in range(3)] == [[]] * 3
    attempt(score, "", 0)
    assert slurm.launcher.ended() == ["score-a"]
    assert slurm.launcher.ended() == ["fit-a"]
    assert "gone and wrote no end" in fit.state.reason


def test_next_sweep_does_not_follow_what_waits_for_a_job_that_is_gone(slurm, chain):
    slurm.queue.add("7_3")
    slurm.launcher.start(chain)
    slurm.queue.remove("7_2")
    after = slurm_jobs.SlurmLauncher(chain[0].directory, {})
    assert after.adopt(chain) == ["score-a"]
    slurm.queue.add("7_2")
    assert after.adopt(chain) == ["score-a", "fit-a", "evaluate-a"]
    attempt(chain[0], "", 0)
    assert after.ended() == ["score-a"]
    slurm.queue.remove("7_2")  # Slurm's word on score-a was another
    assert [after.ended(), after.ended()] == [[], ["fit-a"]]
    assert (chain[1].state.state, chain[1].state.attempts) == ("queued", 0)
    slurm.queue.add("7_2")
    chain[1].write(chain[1].state.submitted())
    after = slurm_jobs.SlurmLauncher(chain[0].directory, {})
    assert after.adopt(chain[1:]) == ["fit-a", "evaluate-a"]


def test_job_that_slurm_drops_though_what_it_needs_is_done_is_submitted_again(slurm, chain):
    """Slurm's word counts there: a stage that was done, and killed as it ended, has not ended well."""
    score, fit, _ = chain
    slurm.launcher.start([score, fit])
    attempt(score, "", 0)
    assert slurm.launcher.ended() == ["score-a"]
    slurm.queue.clear()
    assert [slurm.launcher.ended(), slurm.launcher.ended()] == [[], ["fit-a"]]
    assert (fit.state.state, fit.state.attempts) == ("queued", 0)
    slurm.launcher.start([fit])
    assert slurm.executor.after[-1] == []
    assert [slurm.launcher.ended(), slurm.launcher.ended()] == [[], ["fit-a"]]
    assert (fit.state.state, fit.state.attempts) == ("failed", 1), "once"


def test_what_has_ended_is_not_waited_for_by_slurm(slurm, chain):
    score, fit, evaluate = chain
    slurm.launcher.start([score, fit])
    attempt(score, "", 0)
    attempt(fit, "error: no room\n", 1)
    other = JobCommand(fit.directory, "fit-b", "fit", ("score-a",))
    assert slurm.launcher.start([other, evaluate]) == ["fit-b"], "what fit-a failed is told first"
    assert slurm.executor.after[-1] == []


def test_older_submission_is_not_followed_where_the_next_one_was_cut_short(slurm, chain, monkeypatch):
    score, fit, _ = chain
    slurm.launcher.start([score, fit])
    attempt(score, "error: no room\n", 1)
    assert slurm.launcher.ended() == ["score-a"]
    slurm.launcher.withdraw([fit])
    slurm.queue.add("7_2")  # it goes a little later

    def killed():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(slurm.executor, "batch", killed)
        with pytest.raises(KeyboardInterrupt):
            slurm.launcher.start([score])
    assert score.state.submission
    assert slurm_jobs.SlurmLauncher(score.directory, {}).adopt([score, fit]) == []
    assert slurm.launcher.start([score]) == ["score-a"]
    monkeypatch.setattr(slurm.executor, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        slurm.launcher.start([fit])
    assert fit.state.submission
    assert slurm_jobs.SlurmLauncher(score.directory, {}).adopt([score, fit]) == []


def test_queue_that_takes_no_more_jobs_is_filled_and_asked_again_once_one_has_ended(slurm, chain, monkeypatch):
    fits = [JobCommand(chain[0].directory, f"fit-{name}", "fit", ("score-a",)) for name in "bcde"]
    slurm.executor.room = 3
    started = slurm.launcher.start([chain[0], *fits])
    assert started == ["score-a", "fit-b", "fit-c"]
    assert slurm.launcher.room == 0
    assert slurm.launcher.start(fits[2:]) == []
    attempt(chain[0], "", 0)
    assert slurm.launcher.ended() == ["score-a"]
    slurm.executor.room += 1
    assert slurm.launcher.room > 0
    assert slurm.launcher.start(fits[2:]) == ["fit-d"]
    slurm.launcher.withdraw(fits[:3])
    assert slurm.launcher.start(fits[3:]) == [], "places of ended jobs are free a little later"
    monkeypatch.setattr(slurm_jobs, "FULL_SECONDS", -1.0)
    monkeypatch.setattr(slurm_jobs, "REFUSED_SECONDS", -1.0)
    slurm.launcher._full_until = 0.0
    with pytest.raises(ClusterError, match=r"sbatch refused the jobs of fit: .*submit limit"):
        slurm.launcher.start(fits[3:])
    with pytest.raises(ClusterError, match="sbatch refused"):
        slurm_jobs.SlurmLauncher(chain[0].directory, {}).start(fits[3:])


def test_slurm_that_does_not_answer_is_asked_again(slurm, chain, monkeypatch):
    now = time.monotonic()

    def silent():
        raise RuntimeError("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")

    fits = [JobCommand(chain[0].directory, f"fit-{name}", "fit", ("score-a",)) for name in "bc"]
    slurm.launcher.start(chain[:1])
    with monkeypatch.context() as patched:
        patched.setattr(slurm.executor, "batch", silent)
        assert slurm.launcher.start(fits) == []
    assert slurm.launcher.room == 0
    slurm.launcher._full_until = 0.0
    assert slurm.launcher.start(fits) == ["fit-b", "fit-c"]
    monkeypatch.setattr(slurm.executor, "batch", silent)
    for job in (*fits, chain[0]):
        attempt(job, "error: no room\n", 1)
    slurm.launcher.ended()
    monkeypatch.setattr("time.monotonic", lambda: now + 3600)  # since the last one that was taken
    assert slurm.launcher.start(chain[:1]) == []
    assert slurm_jobs.SlurmLauncher(chain[0].directory, {}).start(chain[:1]) == []
    monkeypatch.setattr(slurm_jobs, "REFUSED_SECONDS", -1.0)
    with pytest.raises(ClusterError, match=r"sbatch refused .* timed out"):
        slurm_jobs.SlurmLauncher(chain[0].directory, {}).start(chain[:1])


def test_array_that_is_too_large_for_the_site_is_cut(slurm, chain, monkeypatch):
    batch = slurm.executor.batch

    @contextmanager
    def at_most_two():
        before = len(slurm.executor.submitted)
        with batch():
            yield
            if len(slurm.executor.submitted) > before + 2:
                del slurm.executor.submitted[before:]
                raise RuntimeError("sbatch: error: Batch job submission failed: Invalid job array specification")

    monkeypatch.setattr(slurm.executor, "batch", at_most_two)
    fits = [JobCommand(chain[0].directory, f"fit-{name}", "fit", ("score-a",)) for name in "bcdef"]
    assert slurm.launcher.start([chain[0], *fits]) == ["score-a", *(f.job for f in fits)]


def test_job_is_not_submitted_before_what_it_needs(slurm, chain):
    score, fit, evaluate = chain
    slurm.launcher.start([score])
    attempt(score, "error: no room\n", 1)  # which nobody has been told yet
    assert slurm.launcher.start([fit, evaluate]) == []
    assert len(slurm.executor.submitted) == 1


def test_jobs_of_an_earlier_grid_that_are_still_in_the_queue_are_named(slurm, chain, caplog):
    slurm.launcher.start(chain[:2])
    after = slurm_jobs.SlurmLauncher(chain[0].directory, {})
    assert after.adopt(chain[:1]) == ["score-a"]
    assert (
        "1 jobs in Slurm's queue are of an earlier grid, and no cell waits for them (to end them: scancel 7)"
        in caplog.text
    )


def test_long_submission_looks_up_between_arrays(slurm, chain, monkeypatch):
    monkeypatch.setattr(slurm_jobs, "SUBMIT_SECONDS", -1.0)
    assert slurm.launcher.start(chain) == ["score-a"]
    assert slurm.launcher.start(chain[1:]) == ["fit-a"]


def test_local_sweep_waits_for_what_is_in_the_queue(slurm, command, monkeypatch):
    slurm.launcher.start([command])
    local = LocalLauncher(1)
    with pytest.raises(ClusterError, match=r"--launcher local: expected no job .* got 1, .*first: scancel 7$"):
        local.adopt([command])
    monkeypatch.setattr(slurm_jobs, "queued_jobs", lambda: None)
    with pytest.raises(ClusterError, match=r"would be started twice; .* remove .*/jobs/\*\.slurm"):
        local.adopt([command])
    monkeypatch.setattr(slurm_jobs, "queued_jobs", lambda: {"8"})
    assert local.adopt([command]) == [], "it is gone"
    command.write(command.state.renewed())
    monkeypatch.setattr(slurm_jobs, "queued_jobs", lambda: None)
    assert local.adopt([command]) == [], "what was settled once is not asked again"


def test_queue_is_asked_of_whole_whatever_the_user_sets_for_squeue(tmp_path, monkeypatch):
    """A script stands for squeue: it leaves out what Slurm's own does, of hidden partitions and other states."""
    script = tmp_path / "squeue"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *"--user {os.getuid()} "*) ;; *) exit 1 ;; esac\n'
        'test -n "$SQUEUE_STATES" || printf "7_1\\n7_2\\n"\n'
        'case "$*" in *--all*) echo 8 ;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "somebody-else")
    assert queued_jobs() == {"7_1", "7_2", "8"}
    script.write_text("#!/bin/sh\nexit 1\n")
    assert queued_jobs() is None


@pytest.fixture
def stages(monkeypatch):
    """Files of the log that a stage would have been started with, in place of its process."""
    started = []

    def start(self, log, **how):
        started.append(log.name)
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(JobCommand, "start", start)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return started


def test_job_of_a_driver_that_was_killed_while_it_submitted_does_not_run_beside_the_next_ones(slurm, command, stages):
    slurm.launcher.start([command])
    command.slurm_id.unlink()  # sbatch had answered, and the number was not written yet
    after = slurm_jobs.SlurmLauncher(command.directory, {})
    assert after.adopt([command]) == []
    command.write(command.state.renewed())
    after.start([command])
    orphan, counted = slurm.executor.submitted
    assert (orphan(), stages, command.state.state) == (0, [], "queued")
    assert (counted(), len(stages), command.state.state) == (0, 1, "done")
    assert orphan() == 0
    assert (len(stages), command.state.starts) == (1, 1)


def test_job_on_a_node_that_still_shows_an_older_state_waits_for_the_present_one(slurm, command, stages, monkeypatch):
    slurm.launcher.start([command])
    (task,) = slurm.executor.submitted
    present = command.state
    command.write(present.renewed())
    monkeypatch.setattr(slurm_job, "CACHED_SECONDS", 30.0)
    monkeypatch.setattr("time.sleep", lambda seconds: command.write(present))
    assert (task(), len(stages), command.state.state) == (0, 1, "done")


def test_job_that_nobody_noted_is_followed_once_it_runs(slurm, command, stages, monkeypatch):
    slurm.launcher.start([command])
    command.slurm_id.unlink()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    (orphan,) = slurm.executor.submitted
    adopted = []
    monkeypatch.setattr(
        JobCommand, "end", lambda self, code: adopted.extend(slurm_jobs.SlurmLauncher(self.directory, {}).adopt([self]))
    )
    orphan()
    assert adopted == [command.job]


@pytest.mark.parametrize(("code", "exit_code"), [(2, 2), (-9, 137), (143, 143)])
def test_slurm_hears_how_a_stage_ended_from_its_first_task(slurm, command, stages, monkeypatch, code, exit_code):
    process = SimpleNamespace(wait=lambda: code)
    monkeypatch.setattr(JobCommand, "start", lambda self, log: process)
    slurm.launcher.start([command])
    (task,) = slurm.executor.submitted
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert task() == code
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(SystemExit) as ended:
        task()
    assert ended.value.code == exit_code


def test_stage_that_was_done_as_it_was_warned_ends_well_for_slurm(slurm, command, stages, monkeypatch):
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    command = replace(command, kept=lambda: 0)
    slurm.launcher.start([command])
    (task,) = slurm.executor.submitted
    task()
    task._process = SimpleNamespace()
    monkeypatch.setattr(slurm_job, "_ended", lambda process: 0)
    with pytest.raises(SystemExit) as ended:
        task.checkpoint()
    assert ended.value.code is None
    monkeypatch.setattr(slurm_job, "_ended", lambda process: 138)
    for again in (True, True, False):
        command.begin()
        assert (task.checkpoint() is not None) == again, "three times without getting on are enough"
    assert command.state.state == "failed"


@pytest.mark.parametrize("begun", [False, True])
def test_warning_before_the_stage_has_started_is_no_end(slurm, command, begun, monkeypatch):
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    slurm.launcher.start([command])
    (task,) = slurm.executor.submitted
    if begun:
        command.begin()
    assert task.checkpoint() is not None
    assert (command.state.state, command.state.attempts) == ("queued", 0)


def test_running_job_that_was_given_up_says_nothing_of_the_next_ones_state(slurm, command, stages, monkeypatch):
    slurm.launcher.start([command])
    (given_up,) = slurm.executor.submitted
    begin = JobCommand.begin
    monkeypatch.setattr(JobCommand, "begin", lambda self: (begin(self), self.write(self.state.submitted())))
    given_up()
    assert command.state.state == "queued"


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


def test_resources_of_a_stage_are_its_own_over_all_others():
    shared = {"timeout_min": 5, "slurm_additional_parameters": {"licenses": "a"}}
    resources = {**shared, "collect": {"nodes": 2, "timeout_min": 9}}
    assert stage_resources(resources, "collect") == {**shared, "nodes": 2, "timeout_min": 9}
    assert stage_resources(resources, "fit") == {**shared, "nodes": 1, "tasks_per_node": 1}
    many = {"slurm_nodes": 2, "slurm_ntasks_per_node": 4, "slurm_tasks_per_node": 4}
    assert stage_resources(many, "score") == {"nodes": 1, "tasks_per_node": 1}
    with pytest.raises(ConfigError, match="collect: expected keys and values, got 8"):
        stage_resources({"collect": 8}, "collect")


def test_resources_of_every_stage_are_checked_before_the_first_job(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    monkeypatch.setattr("shutil.which", lambda name, *more, **named: f"/usr/bin/{name}")
    for wrong in ({"evaluate": {"nodez": 2}}, {"colect": {"nodes": 2}}):
        with pytest.raises(ConfigError, match=r"resources of .*(nodez|colect)"):
            slurm_jobs.SlurmLauncher(tmp_path, wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"slurm_time": "4:00:00"}, r"expected timeout_min \(minutes\), got slurm_time '4:00:00'"),
        ({"timeout_min": "60"}, "resources of fit: "),
        ({"mem_gb": "1.5"}, "resources of fit: "),
        ({"slurm_setup": 5}, "resources of fit: "),
        ({"slurm_setup": [5]}, "expected shell commands"),
    ],
)
def test_resources_of_another_type_are_refused(wrong, message, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    monkeypatch.setattr("shutil.which", lambda name, *more, **named: f"/usr/bin/{name}")
    with pytest.raises(ConfigError, match=message):
        make_executor(tmp_path, "fit", wrong)


def test_jobs_have_an_hour_and_the_python_that_is_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    monkeypatch.setattr("shutil.which", lambda name, *more, **named: f"/usr/bin/{name}")
    inside = "apptainer exec image.sif python"
    executor = make_executor(tmp_path, "fit", {"slurm_python": inside, "slurm_srun_args": "--mpi=none -l"})._executor
    script = executor._make_submission_file_text(executor._submitit_command_str, "id")
    assert "#SBATCH --time=60\n" in script
    assert f" --mpi=none -l {inside} -u -m submitit" in script
    assert "#SBATCH --time=7\n" in make_executor(
        tmp_path, "fit", {"timeout_min": 7}
    )._executor._make_submission_file_text("python", "id")


def test_what_jobs_wait_for_is_slurms_to_know(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    monkeypatch.setattr("shutil.which", lambda name, *more, **named: f"/usr/bin/{name}")
    resources = {
        "slurm_dependency": "singleton", "slurm_additional_parameters": [["licenses", "a"]],
        "slurm_teardown": ["rm -rf scratch"],
    }  # fmt: skip

    def script(after):
        return make_executor(tmp_path, "fit", resources, after)._executor._make_submission_file_text("python", "id")

    assert "#SBATCH --dependency=singleton" in script([])
    waiting = script(["3_1", "4"])
    assert waiting.count("--dependency") == 1
    for line in ("--dependency=afterok:3_1:4", "--kill-on-invalid-dep=yes", "--licenses=a"):
        assert f"#SBATCH {line}\n" in waiting
    commands = waiting[waiting.index("\nsrun ") :].split("\n")
    assert [line for line in commands[2:] if line and line[0] != "#"] == ["code=$?", "rm -rf scratch", "exit $code"]
    with pytest.raises(ConfigError, match="resources of fit"):
        make_executor(tmp_path, "fit", {"slurm_additional_parameters": 3}, ["4"])


def test_jobs_of_a_driver_that_is_a_job_have_their_own_cores_and_memory(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    monkeypatch.setattr("shutil.which", lambda name, *more, **named: f"/usr/bin/{name}")
    executor = make_executor(tmp_path, "score", {"cpus_per_task": 8, "slurm_setup": ["module load x"]})
    script = executor._executor._make_submission_file_text("python", "id")
    assert "#SBATCH --cpus-per-task=8" in script
    assert script.index("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK") < script.index("\nsrun ")
    assert "module load x" in script
    job = {"SLURM_JOB_ID": "3", "SLURM_MEM_PER_NODE": "100", "SLURM_CONF": "/c", "SBATCH_PARTITION": "p"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with outside_job():
        assert [n for n in job if n in os.environ] == ["SLURM_CONF", "SBATCH_PARTITION"]
    assert job.items() <= os.environ.items()
