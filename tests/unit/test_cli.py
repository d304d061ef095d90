"""The command line: help, exit codes, one-line errors."""

import subprocess
import sys
import time

import pytest

from aura_dist.cli import main
from aura_dist.config import VERBS

HELP_SECONDS = 0.5


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "aura_dist", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_help_is_instant():
    def seconds():
        start = time.perf_counter()
        assert run("--help").returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < HELP_SECONDS


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert "--config FILE" in capsys.readouterr().out


def test_user_error_is_one_line_and_exit_code_2():
    ended = run("fit", "--store", "nowhere.zarr", "--concept", "a", "--out", "o")
    assert ended.returncode == 2
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: --store 'nowhere.zarr'")


def test_debug_shows_the_traceback():
    ended = run("fit", "--store", "nowhere.zarr", "--concept", "a", "--out", "o", "--debug")
    assert ended.returncode != 0
    assert "Traceback" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "VERB"),
        (["colect"], "invalid choice: 'colect'"),
        (["collect", "--modle", "x"], "--modle"),
        (["collect", "--config", "nowhere.yaml"], "config file 'nowhere.yaml' cannot be read"),
        (["score"], "--store is required"),
        (["score", "--store"], "--store: expected one argument"),
    ],
)
def test_wrong_words_are_errors(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not valid YAML"), ("- a\n- b", "expected keys and values, got a list"), ("storee: x", "unknown key")],
)
def test_broken_config_files_are_errors(text, message, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert main(["score", "--config", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_empty_config_file_is_no_settings(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("")
    assert main(["score", "--config", str(file)]) == 2
    assert "--store is required" in capsys.readouterr().err
