"""Continuations on disk: kept over interruptions, once each, and only those of the same settings."""

import json

import pytest

from aura_dist.errors import StoreError
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
    assert [p.name for p in journal.path.parent.iterdir()] == ["run.[1].continuations.jsonl"]
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
