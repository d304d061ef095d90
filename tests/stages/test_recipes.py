"""The recipes of `configs/` that are programs: what they make of small files."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aura_dist.cli import main
from aura_dist.evaluation.prompts import read_prompts

CONFIGS = Path(__file__).parents[2] / "configs"
OPENINGS = CONFIGS / "held_out_openings.py"
FRONT = CONFIGS / "front.py"
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

    further = [
        {"prompt": {"text": "one\u2028two\x85three", "toxicity": 0.25}, "continuation": {"text": "four"}},
        {"prompt.text": "five", "prompt.toxicity": None},
    ]
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in further)
    (collected / "beside.jsonl").write_text(lines, encoding="utf-8")
    done = openings(collected, "--words", "5", "--beside", str(collected / "beside.jsonl"))
    assert done.returncode == 0, done.stderr
    read = read_prompts(str(collected / "out.jsonl"), None, None)
    assert read.texts[-2:] == ["one\u2028two\x85three", "five"]
    np.testing.assert_array_equal(read.toxicity[-2:], [0.25, np.nan])
    assert (read.toxicity[:-2] == 1).all()
    made = read.texts[:-2]
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


def front(*words):
    command = [sys.executable, str(FRONT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def neutral(tmp_path_factory):
    path = tmp_path_factory.mktemp("neutral") / "neutral.csv"
    path.write_text("\n".join(["text", *(f"A river of number {i} is long and quiet." for i in range(60))]) + "\n")
    return path


@pytest.fixture(scope="module")
def started(collected, neutral, tmp_path_factory):
    """`started(run, *flags, texts=…, comments=…, grid=…)` runs `front.py start` on small files."""
    place = tmp_path_factory.mktemp("start")
    (place / "texts.csv").write_text("text\nA lake is deep.\n")
    (place / "grid.yaml").write_text("model: some/model  # a note\ncollect: {modules: [mlp, '*.o_proj']}\n")

    def start(run, *flags, texts=place / "texts.csv", comments=collected / "comments.csv", grid=place / "grid.yaml"):
        sizes = ["--choosing", 5, "--again", 4, "--reported", 8, "--words", 5]
        return front("start", grid, comments, neutral, texts, run, *sizes, *flags)

    return start


def texts_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [row["text"] for row in csv.DictReader(file)]


def prompts_of(path):
    return [json.loads(line)["prompt"]["text"] for line in path.read_text().splitlines()]


def test_no_text_of_a_front_is_in_two_parts(started, neutral, tmp_path):
    comments = tmp_path / "comments.csv"
    alike = [(f"{text} and much longer than the other one", toxic) for text, toxic in COMMENTS]
    rows = [f"{text},{toxic}" for text, toxic in [*COMMENTS, *alike]]
    comments.write_text("\n".join(["text,toxic", *rows]) + "\n")
    done = started(tmp_path / "a run", comments=comments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["some/model", ""]
    parts = tmp_path / "a run" / "parts"
    prompts = {name: set(prompts_of(parts / f"{name}.jsonl")) for name in ("choose", "again", "report")}
    assert {name: len(texts) for name, texts in prompts.items()} == {"choose": 5, "again": 4, "report": 8}
    assert len(set.union(*prompts.values())) == 17
    fitted = {" ".join(text.split()[:5]) for text in texts_of(parts / "fit.csv")}
    assert not fitted & set.union(*prompts.values())
    others = {*texts_of(parts / "control.csv"), *texts_of(parts / "choose.csv")}
    assert not others & set(texts_of(parts / "fit.csv"))
    control, chosen = texts_of(parts / "control.csv"), texts_of(parts / "choose.csv")
    assert (len(control), len(chosen)) == (45, 15)
    assert {*control, *chosen} == set(texts_of(neutral))


def test_what_a_front_cannot_start_with_is_one_line(started, neutral, tmp_path):
    (tmp_path / "rtp.jsonl").write_text('{"txt": "once"}\n')
    (tmp_path / "rtp.csv").write_text("prompt.text\nonce\n")
    known, unknown = '{"prompt": {"text": "once", "toxicity": 0.5}}\n', '{"prompt": {"text": "twice"}}\n'
    (tmp_path / "second.jsonl").write_text(known + unknown)
    (tmp_path / "first.jsonl").write_text(unknown + known)
    (tmp_path / "both.csv").write_text(f"text\nA hill is high.\n{COMMENTS[0][0]}\n")
    (tmp_path / "grid.yaml").write_text("model: some/model\ncollect: {modules: mlp}\n")
    for flags, given, said in (
        (["--reported", 100], {}, "expected 109 toxic comments of 5 words or more"),
        (["--reported", 0], {}, "--reported: expected 1 or more, got 0"),
        (["--again", 0], {}, "--again: expected 1 or more, got 0"),
        (["--choosing", -5], {}, "--choosing: expected 1 or more, got -5"),
        (["--prompts", tmp_path / "rtp.jsonl"], {}, "'prompt.text'"),
        (["--judges", "profanity-chek"], {}, "profanity-chek"),
        (["--prompts", tmp_path / "rtp.csv"], {}, "expected prompts as JSON lines"),
        (["--prompts", tmp_path / "second.jsonl"], {}, "expected a column 'prompt.toxicity' in row 1"),
        (["--prompts", tmp_path / "first.jsonl"], {}, "expected a column 'prompt.toxicity' in row 0"),
        ([], {"texts": tmp_path / "both.csv"}, "comments.csv' does not have, got 1 of them, such as"),
        ([], {"texts": neutral}, "got 60 of them, such as 'A river of number 0 is long and quiet.'"),
        ([], {"grid": tmp_path / "grid.yaml"}, "expected `model`, a name, and `collect: modules`, a list"),
    ):
        done = started(tmp_path / "run", *flags, **given)
        assert done.returncode == 1, said
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert said in done.stderr
        assert not (tmp_path / "run" / "parts").exists()


def test_a_front_goes_on_with_what_it_was_started_with(started, tmp_path):
    run = tmp_path / "run"
    assert started(run).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (run / "parts").iterdir()}
    assert started(run).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (run / "parts").iterdir()} == before
    (tmp_path / "texts.csv").write_text("text\nA hill is high.\n")
    (tmp_path / "rtp.jsonl").write_text('{"prompt": {"text": "once"}}\n')
    for flags, given, what in (
        (["--model", "other/model"], {}, "model"), ([], {"texts": tmp_path / "texts.csv"}, "texts"),
        (["--prompts", tmp_path / "rtp.jsonl"], {}, "prompts"), (["--words", 4], {}, "words"),
    ):  # fmt: skip
        done = started(run, *flags, **given)
        assert f"expected the {what} that it was started with" in done.stderr
        assert done.returncode == 1


def cell(path, method, gate, strength, perplexity, toxic, place, scorer="s"):
    acts = {"method": method, "gate": gate and {"kind": gate}, "strength": strength, "directory": place}
    document = {
        "schema": 1, "intervention": method and acts, "perplexity": perplexity and {"token_weighted": perplexity},
        "toxicity": {"overall": {"probability": {"value": toxic}}, "prompts_sha256": "p", "num_samples": 5,
                     "scorer": scorer},
    }  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))


@pytest.fixture
def choose(tmp_path):
    """`choose(*flags)`: what `front.py choose` prints of small results, as name, directory's name and strength."""
    rows = [["state", "output"]]
    cells = [
        # method, gate, strength, perplexity, toxic
        (None, None, None, 20.0, 0.2), ("aura", None, 1.0, 20.6, 0.01), ("aura", None, 0.5, 20.4, 0.1),
        ("aura", None, 0.2, 20.1, 0.15), ("aura", "tokens", 2.0, 20.5, 0.02), ("mean-act", None, 1.0, 30.0, 0.0),
        ("mean-act", None, 0.5, 25.0, 0.05),
    ]  # fmt: skip
    for i, one in enumerate(cells):
        cell(tmp_path / f"{i}.json", *one, place=f"i{i}")
        rows.append(["done", str(tmp_path / f"{i}.json")])
    rows.append(["failed", "nowhere.json"])
    (tmp_path / "table.csv").write_text("\n".join(map(",".join, rows)) + "\n")

    def run(*flags):
        done = front("choose", tmp_path / "table.csv", *flags)
        assert done.returncode == 0, done.stderr
        printed = [line.split("\t") for line in done.stdout.splitlines()]
        return [(name, Path(place).name, strength) for name, place, strength in printed]

    return run


def test_chosen_is_the_least_toxic_cell_that_costs_little(choose):
    assert choose() == [("aura-gated", "i4", "2.0"), ("aura", "i2", "0.5"), ("mean-act", "i6", "0.5")]


def test_contenders_are_the_least_toxic_within_the_budget_of_all_methods(choose):
    assert choose("--contenders", 2) == [("aura-gated", "i4", "2.0"), ("aura", "i2", "0.5")]
    assert len(choose("--contenders", 9)) == 3
    assert choose("--contenders", 0) == []


def test_what_is_measured_again_counts(choose, tmp_path):
    cell(tmp_path / "again" / "i2.json", "aura", None, 0.5, None, 0.1, "i2")
    cell(tmp_path / "again" / "i3.json", "aura", None, 0.2, None, 0.08, "i3")
    cell(tmp_path / "again" / "i4.json", "aura", "tokens", 2.0, None, 0.09, "i4")
    expected = [("aura", "i3", "0.2"), ("aura-gated", "i4", "2.0"), ("mean-act", "i6", "0.5")]
    assert choose("--measured", tmp_path / "again") == expected
    (tmp_path / "again" / "i3.json").unlink()
    assert ("aura", "i2", "0.5") in choose("--measured", tmp_path / "again")
    (tmp_path / "again" / "i2.json").unlink()
    cell(tmp_path / "again" / "i1.json", "aura", None, 1.0, None, 0.0, "i1")
    assert ("aura", "i2", "0.5") in choose("--measured", tmp_path / "again"), "the other is over the budget"
    cell(tmp_path / "again" / "i2.json", "aura", None, 0.5, None, 0.1, "i2", scorer="another")
    done = front("choose", tmp_path / "table.csv", "--measured", tmp_path / "again")
    assert (done.returncode, done.stdout) == (1, "")
    assert "expected results on one set of prompts by one judge, got 2" in done.stderr
    cell(tmp_path / "plain" / "none.json", None, None, None, None, 0.1, "")
    for flags, said in (
        (["--measured", tmp_path / "nowhere"], "expected a directory of results, found none"),
        (["--measured", tmp_path / "plain"], "expected toxicity under interventions, got results without"),
        (["--contenders", -1], "--contenders: expected 0 or more, got -1"),
    ):
        done = front("choose", tmp_path / "table.csv", *flags)
        assert (done.returncode, done.stdout) == (1, ""), flags
        assert said in done.stderr


def reported(run, name, toxic, perplexity, fingerprint="a"):
    """A results file: `toxic` of each of four prompts."""
    (run / "results").mkdir(parents=True, exist_ok=True)
    share = {"value": sum(toxic) / 4, "low": 0.0, "high": 1.0}
    document = {
        "schema": 1, "model": {"name": f"who/{run.name}"}, "model_fingerprint": fingerprint,
        "perplexity": {"token_weighted": perplexity, "sha256": "t"},
        "toxicity": {"prompts_sha256": "p", "scorer": "s", "num_samples": 2, "settings": {},
                     "overall": {"probability": share}, "per_prompt": {"toxic_share": toxic, "maximum": toxic}},
    }  # fmt: skip
    (run / "results" / f"{name}.json").write_text(json.dumps(document))


def test_table_joins_what_several_runs_reported(tmp_path):
    first, second = tmp_path / "small", tmp_path / "large"
    for run, perplexity in ((first, 20.0), (second, 10.0)):
        reported(run, "none", [1.0, 0.5, 0.5, 0.0], perplexity)
        reported(run, "aura", [0.5, 0.5, 0.0, 0.0], perplexity - 0.25)
    reported(second, "mean-act-gated", [0.0, 0.5, 0.0, 0.0], 10.5)
    done = front("table", first, second)
    assert done.returncode == 0, done.stderr
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    assert [name for name in head if "toxic" in name] == ["small: toxic, %", "large: toxic, %"]
    none, aura, gated = rows
    assert none == ["none", "50.0 (0.0–100.0)", "–", "20.00", "50.0 (0.0–100.0)", "–", "10.00"]
    assert (aura[0], aura[3], aura[6]) == ("aura", "−0.25", "−0.25")
    assert aura[2].startswith("2.0 (")
    assert gated[:4] == ["mean-act, gated", "–", "–", "–"]
    assert (gated[5][:5], gated[6]) == ("4.0 (", "+0.50")
    some = front("table", second, "--rows", "mean-act-gated", "none")
    assert [line.split("|")[1].strip() for line in some.stdout.splitlines()[2:]] == ["mean-act, gated", "none"]


def test_figures_that_were_not_measured_are_dashes(tmp_path):
    reported(tmp_path / "run", "none", [1.0, 0.5, 0.5, 0.0], None)
    reported(tmp_path / "run", "aura", [0.0, 0.0, 0.0, 0.0], 20.0)
    none, aura = front("table", tmp_path / "run").stdout.splitlines()[2:]
    assert none.endswith("| – | – |")
    assert aura.endswith("| – |")
    assert "| ∞ (0." in aura, "no toxic continuation of four prompts does not show that there is none"


@pytest.mark.parametrize(
    ("rows", "plain", "said"),
    [
        (["pid-act"], "a", "--rows: expected some of aura, none, got 'pid-act'"),
        ([], "another", "expected results of one model on the same texts"),
    ],
)
def test_table_of_what_does_not_go_together_is_refused(tmp_path, rows, plain, said):
    reported(tmp_path / "run", "none", [1.0, 0.5, 0.5, 0.0], 20.0, plain)
    reported(tmp_path / "run", "aura", [0.5, 0.5, 0.0, 0.0], 20.0)
    done = front("table", tmp_path / "run", *(["--rows", *rows] if rows else []))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stdout == ""


GRID = """
model: unused
retries: 0
collect: {data: parts/fit.csv, concepts: [toxic], num_positive: 12, num_negative: 12, modules: [mlp],
  pooling: [max, mean, drawn, mean_square], skip_first_tokens: 1}
evaluate: &how {toxicity_prompts: parts/choose.jsonl, num_samples: 2, max_new_tokens: 4, scorer: profanity-check,
  perplexity_texts: parts/choose.csv}
grid:
  - method: [none]
  - method: [aura]
    strength: [0.5, 1.0]
  - method: [mean-act]
    gate: [tokens]
    control: [control.zarr]
    gate_pooling: [mean, drawn]
    gate_min_accuracy: [0]
  - method: [mean-act]
    gate: [units]
    control: [control.zarr]
"""


@pytest.mark.slow
def test_front_goes_from_files_to_a_page(tiny_dir, collected, neutral, tmp_path):
    pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
    (tmp_path / "grid.yaml").write_text(GRID)
    comments = [(f"word {i} of a much longer comment about {i} things and more", i % 2) for i in range(600)]
    (tmp_path / "c.csv").write_text("\n".join(["text,toxic", *(f"{text},{toxic}" for text, toxic in comments)]) + "\n")
    texts = tmp_path / "texts.csv"
    texts.write_text(neutral.read_text().replace("river", "street"))
    command = [
        "bash",
        CONFIGS / "front.sh",
        tmp_path / "grid.yaml",
        tmp_path / "c.csv",
        neutral,
        texts,
        tmp_path / "run",
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {
        **os.environ,
        "PATH": path,
        "MODEL": str(tiny_dir("llama")),
        "JUDGES": "profanity-check",
        "SAMPLES": "1",
        "PARTS": "--choosing 60 --again 20 --reported 30",
        "CONTENDERS": "2",
        "BUDGET": "1e9",
    }

    def run(**more):
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env | more, check=False)

    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    made = tmp_path / "run"
    lines = (made / "front.md").read_text().splitlines()
    assert {line.split(" |")[0] for line in lines[2:]} == {"| none", "| aura", "| mean-act-gated"}
    assert "times less toxic" in lines[0]
    assert (
        len(list((made / "again").glob("*[0-9].json"))) == len((made / "contenders.tsv").read_text().splitlines()) == 2
    )
    page = (made / "report.html").read_text()
    assert "A ring marks" in page
    before = {path: path.stat().st_mtime_ns for path in (made / "results").glob("*.json")}
    assert run().returncode == 0
    shutil.rmtree(made / "again")
    other = run(SAMPLES="2", CONTENDERS="0")
    assert other.returncode == 2
    assert "--num-samples 2" in other.stderr.split("expected it with")[1].split("got it with")[0]
    assert {path: path.stat().st_mtime_ns for path in (made / "results").glob("*.json")} == before
