"""Continuations on disk: kept over interruptions, once each, and only those of the same settings."""

import errno
import fcntl
import json

import pytest

from aura_dist.errors import ConfigError, StoreError
from aura_dist.evaluation.journal import Journal, settings_key


def record(prompt, sample, text="t"):
    return {"prompt": prompt, "sample": sample, "text": text}


@pytest.fixture
def journal(tmp_path):
    return Journal(str(tmp_path / "run.[1].json"), "mine")  # a name that is a pattern, too


def test_parts_are_folded_in_order_once_each(journal):
    for rank, pairs in enumerate([[(1, 0), (0, 1)], [(0, 0), (1, 0)]]):
        with journal.part(rank) as append:
            append(record(p, s) for p, s in pairs)
    assert journal.read() == {}, "parts under way are not seen"
    assert journal.fold() == (3, 1)
    assert list(journal.read()) == [(0, 0), (0, 1), (1, 0)]
    assert [p.name for p in journal.path.parent.glob("[!.]*")] == ["run.[1].continuations.jsonl"], "beside the lock"
    assert journal.fold() == (3, 0)


def test_torn_and_foreign_lines_are_dropped(journal):
    with journal.part(0) as append:
        append([record(0, 0), record(1, 0)])
    path = journal.path.with_name("run.[1].continuations.part-0.jsonl")
    foreign = json.dumps({"settings": "other", **record(2, 0)})
    path.write_text(f"{foreign}\nnot json\n[]\n" + path.read_text()[:-5])
    assert journal.fold() == (1, 4)
    assert list(journal.read()) == [(0, 0)]


def test_whole_line_without_its_break_is_torn(journal):
    """What is appended after it would stand on the same line."""
    with journal.part(0) as append:
        append([record(0, 0)])
    path = journal.path.with_name("run.[1].continuations.part-0.jsonl")
    path.write_text(path.read_text().rstrip("\n"))
    assert journal.fold()[0] == 0


def test_flushed_before_the_end(journal):
    with journal.part(0) as append:
        append([record(0, 0, "zwei\nZeilen \u2028 und")])
        assert journal.fold() == (1, 0)


def test_no_part_before_the_first_batch(journal):
    with journal.part(0):
        pass
    assert list(journal.path.parent.iterdir()) == []


def test_disk_that_cannot_be_written(tmp_path):
    journal = Journal(str(tmp_path / "nowhere" / "r.json"), "mine")
    with pytest.raises(StoreError, match="cannot be written"), journal.part(0) as append:
        append([record(0, 0)])


def test_key_is_of_values_not_of_their_order():
    assert settings_key({"a": 1, "b": None}) == settings_key({"b": None, "a": 1})
    assert settings_key({"a": 1}) != settings_key({"a": 2})


def test_a_second_run_with_the_same_results_file_is_refused(tmp_path):
    first, second, elsewhere = (Journal(str(tmp_path / name), "mine") for name in ("r.json", "r.json", "s.json"))
    first.fold()
    with first.part(0) as append:
        append([record(0, 0)])
        with pytest.raises(ConfigError, match=r"expected no other run to write .*; wait for it, end it, or give"):
            second.fold()
        elsewhere.fold()
        append([record(1, 0)])
    found = first.fold()
    assert found == (2, 0), "no line is lost"
    del first, elsewhere, append
    assert [p.name for p in tmp_path.iterdir()] == ["r.continuations.jsonl"]
    second.fold()


def test_a_run_that_failed_leaves_the_file_to_the_next(tmp_path):
    first, next_one = (Journal(str(tmp_path / "r.json"), "mine") for _ in range(2))
    first.fold()

    def fail():
        with first.part(0) as append:
            append([record(0, 0)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert next_one.fold() == (1, 0)


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def fails(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", fails)
    journal = Journal(str(tmp_path / "r.json"), "mine")
    journal.fold()
    del journal
    assert "cannot be locked" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_lines_of_other_weights_of_a_server_are_refused_and_kept(tmp_path):
    began, other, more = (
        settings_key({"server": "s", "seed": seed, "probe": probe}) for seed, probe in ((0, "a"), (0, "b"), (1, "b"))
    )
    with Journal(str(tmp_path / "r.json"), began).part(0) as append:
        append([record(0, 0)])
    with pytest.raises(StoreError, match=r"continue the probe greedily .* got another .*; give another --out"):
        Journal(str(tmp_path / "r.json"), other).fold()
    found = [Journal(str(tmp_path / "r.json"), settings).fold() for settings in (began, more)]
    assert found == [(1, 0), (0, 1)], "lines of other settings are made again, as ever"
