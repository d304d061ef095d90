"""Some of the bad and odd inputs of `tests/bad_inputs.py`, which runs all of them and prints the count."""

import subprocess
import sys

import pytest

from tests.bad_inputs import Inputs, all_cases
from tests.distributed.launch import REPOSITORY


def test_there_are_hundreds_of_all_kinds_and_verbs(tmp_path):
    cases = all_cases(Inputs(tmp_path))
    names = [case.name for found in cases.values() for case in found]
    assert len(names) >= 200
    assert len(set(names)) == len(names)
    assert all(cases.values())


@pytest.mark.timeout(300)
def test_every_twentieth_ends_as_it_should():
    """In a process of its own, because it forks."""
    command = [sys.executable, "-m", "tests.bad_inputs", "--every", "20"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert " inputs, 0 not as they should end" in ended.stdout
