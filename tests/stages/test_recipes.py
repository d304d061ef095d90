"""The recipes of `configs/` that are programs: what they make of small files."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from aura_dist.cli import main

OPENINGS = Path(__file__).parents[2] / "configs" / "held_out_openings.py"
COMMENTS = [(f"this is comment number {i} and it is long enough to be cut", i % 2) for i in range(40)]


@pytest.fixture(scope="module")
def collected(tiny_dir, tmp_path_factory):
    """A file of comments whose labels are words, the first standing in it twice; and a store of some of them."""
    place = tmp_path_factory.mktemp("openings")
    rows = [*COMMENTS, *COMMENTS]
    lines = [f"{text},{'true' if toxic else 'false'}" for text, toxic in [*rows, ("too short", 1)]]
    (place / "comments.csv").write_text("\n".join(["text,toxic", *lines]) + "\n")
    command = ["collect", "--model", str(tiny_dir("llama")), "--data", str(place / "comments.csv")]
    command += ["--concepts", "toxic", "--num-positive", "8", "--num-negative", "8", "--store", str(place / "s.zarr")]
    assert main(command) == 0
    return place


def openings(place, *more):
    """Held out of a store, unless `more` says of what else."""
    command = [str(OPENINGS), str(place / "comments.csv"), str(place / "out.jsonl"), *more]
    command += [] if "--rest" in more else ["--store", str(place / "s.zarr")]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=False)


def test_comments_that_the_store_was_not_made_of_are_refused(collected, tmp_path):
    shuffled = tmp_path / "comments.csv"
    header, *lines = (collected / "comments.csv").read_text().splitlines()
    shuffled.write_text("\n".join([header, *lines[::-1]]) + "\n")
    command = [sys.executable, OPENINGS, shuffled, tmp_path / "out.jsonl", "--store", collected / "s.zarr"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "expected the file that" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_openings_are_of_toxic_comments_that_no_fit_saw(collected):
    import aura_dist

    beside = '{"prompt": {"text": "one\u2028two\x85three"}}'
    (collected / "beside.jsonl").write_text(f"{beside}\n\n{beside}", encoding="utf-8")
    done = openings(collected, "--words", "5", "--beside", str(collected / "beside.jsonl"))
    assert done.returncode == 0, done.stderr
    lines = (collected / "out.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert lines[-2:] == [beside, beside]
    made = [json.loads(line)["prompt"]["text"] for line in lines[:-2]]
    rows = aura_dist.open_store(collected / "s.zarr")["samples"]["row"].values
    seen = {COMMENTS[row % len(COMMENTS)][0] for row in rows}
    expected = {" ".join(text.split()[:5]) for text, toxic in COMMENTS if toxic and text not in seen}
    assert set(made) == expected


def test_the_rest_holds_none_of_the_comments_taken(collected, tmp_path):
    done = openings(collected, "--words", "5", "--number", "7", "--rest", str(tmp_path / "rest.csv"))
    assert done.returncode == 0, done.stderr
    lines = (collected / "out.jsonl").read_text(encoding="utf-8").splitlines()
    made = {json.loads(line)["prompt"]["text"] for line in lines}
    with (tmp_path / "rest.csv").open(newline="", encoding="utf-8") as file:
        rest = [(row["text"], row["toxic"] == "true") for row in csv.DictReader(file)]
    taken = [text for text, toxic in COMMENTS if toxic and " ".join(text.split()[:5]) in made]
    assert len(made) == len(taken) == 7
    kept = [(text, bool(toxic)) for text, toxic in [*COMMENTS, *COMMENTS, ("too short", 1)] if text not in taken]
    assert rest == kept


def test_no_opening_is_one_line(collected):
    done = openings(collected, "--words", "50")
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert "expected toxic comments of at least 50 words" in done.stderr
    assert done.stderr.count("\n") == 1
