"""Jobs of a sweep: their state files, and what the launchers make of them."""

import pytest

from aura_dist.runtime.job_command import JobCommand


@pytest.fixture
def command(tmp_path):
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
