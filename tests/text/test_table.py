"""Labelled text of every format: nothing guessed, every fault named by its row."""

import hashlib
import json
import os
import sys

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from aura_dist.errors import InputError
from aura_dist.text.labels import parse_labels
from aura_dist.text.table import read_table

AWKWARD = [
    "NA",
    "null",
    "nan",
    "None",
    "",
    " 1.0",
    "0x10",
    "true",
    "naïve 日本 🙂",
    'say "so"',
    "two\nlines",
    "dos\r\nlines",
    "a,b\tc",
]


@pytest.fixture
def written(tmp_path):
    """`written(name, content)`: path of a file with that content."""

    def write(name, content):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(file)

    return write


def quoted(values):
    return "\r\n".join(["text", *('"' + v.replace('"', '""') + '"' for v in values)]) + "\r\n"


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.tsv", "a.jsonl", "a.ndjson", "a.parquet"])
def test_texts_come_back_as_they_are(name, tmp_path, written):
    if name.endswith("parquet"):
        source = str(tmp_path / name)
        parquet.write_table(pa.table({"text": AWKWARD}), source)
    elif name.endswith(("jsonl", "ndjson")):
        source = written(name, "\n".join(json.dumps({"text": v}, ensure_ascii=False) for v in AWKWARD))
    else:
        source = written(name, quoted(AWKWARD))
    assert read_table(source, ["text"]).columns == {"text": AWKWARD}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_columns_of_any_line_end_and_byte_order_mark(name, end, bom, written):
    between = "," if name == "a.csv" else "\t"
    lines = [between.join(f) for f in (("text", "toxic", "more"), ("a", "1", "x"), ("b", "0", "y"))]
    table = read_table(written(name, bom + end.join(lines) + end), ["toxic", "text"])
    assert table.columns == {"toxic": ["1", "0"], "text": ["a", "b"]}
    assert len(table) == 2


def test_blank_lines_are_no_rows(written):
    assert read_table(written("a.csv", "\n\ntext,y\n\na,1\n\nb,0\n\n"), ["text"]).columns == {"text": ["a", "b"]}
    assert read_table(written("a.jsonl", '\n{"text": "a"}\n\n \n{"text": "b"}'), ["text"]).columns["text"] == ["a", "b"]


def test_json_keeps_its_types_and_nests_as_dotted_columns(written):
    rows = [{"prompt": {"text": "a", "scores": {"toxicity": 0.5}}, "y": True}, {"prompt": {"text": None}, "y": 1}]
    source = written("a.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, rows)))
    assert read_table(source, ["prompt.text", "y"]).columns == {"prompt.text": ["a", None], "y": [True, 1]}
    with pytest.raises(InputError, match=r"expected a column 'prompt.scores.toxicity' in row 1, found prompt"):
        read_table(source, ["prompt.scores.toxicity"])


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_digest_is_that_of_the_files_bytes(name, written):
    content = "text\r\na\r\n" if name == "a.csv" else '{"text": "a"}'
    table = read_table(written(name, content), ["text"])
    assert table.sha256 == hashlib.sha256(content.encode()).hexdigest()
    assert table.source.endswith(name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "body,toxic\na,1\n", "expected a column 'text', found body, toxic$"),
        ("a.csv", "text,toxic\na,1\nb,0\nc\n", "row 2: expected 2 fields as in the header, got 1"),
        ("a.csv", 'text,toxic\n"a\nb\nc",1\nd,0,2\n', "row 1: expected 2 fields as in the header, got 3"),
        ("a.tsv", "text\ttoxic\na\t1\nb,0\n", "row 1: expected 2 fields as in the header, got 1"),
        ("a.csv", b"text,toxic\na,1\n\nb,0\n\xe9,1\n", "row 2: expected UTF-8, got the byte 0xe9; convert"),
        ("a.csv", b"text,t\xf6xic\na,1\n", "the header: expected UTF-8, got the byte 0xf6"),
        ("a.csv", "text\na".encode("utf-16"), "the header: expected UTF-8, got the byte 0xff"),
        ("a.csv", "text,toxic,text\na,1,b\n", "expected distinct column names, got text, toxic, text"),
        ("a.csv", 'text,toxic\na,1\n"b,0\n', "row 1 cannot be parsed: unexpected end of data"),
        ("a.csv", 'text,toxic\na,1\n"b"c,0\n', "row 1 cannot be parsed: .*; a field that starts with a quotation mark"),
        ("a.tsv", 'text\ttoxic\na\t1\n"b" c\t0\n', "row 1 cannot be parsed: .* must be quoted, and its marks doubled"),
        ("a.csv", "", "expected a header line, got an empty file"),
        ("a.csv", "\n\n", "expected a header line, got an empty file"),
        ("a.csv", "text,toxic\n", "expected at least one row, got none"),
        ("a.jsonl", "", "expected at least one row, got none"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "row 1: expected one JSON object a line: "),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000, "row 1: expected one JSON object a line: "),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "row 1: expected a JSON object, got list"),
        ("a.jsonl", '{"text": "a"}\nnull\n', "row 1: expected a JSON object, got NoneType"),
        ("a.jsonl", '{"text": "a"}\n{"body": "b"}\n', "expected a column 'text' in row 1, found body"),
        ("a.jsonl", '{"text": "a"}\n{}\n', "expected a column 'text' in row 1, found none"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\x80"}\n', "row 1: expected UTF-8, got the byte 0x80"),
        ("a.json", '[{"text": "a"}]', "row 0: expected a JSON object, got list"),
        ("a.txt", "a", "expected a file ending in .csv, .tsv, .jsonl, .json, .ndjson, .parquet, got '.txt'"),
        ("a.csv.gz", b"\x1f\x8b", "expected a file ending in .*, got '.gz'"),
        ("a", "a", "expected a file ending in .*, got ''"),
        ("a.parquet", "no such thing", "cannot be read: "),
    ],
)
def test_faults_are_named(name, content, message, written):
    source = written(name, content)
    with pytest.raises(InputError, match=message) as raised:
        read_table(source, ["text"])
    assert str(raised.value).startswith(f"data {source!r}")


@pytest.mark.parametrize("name", ["nowhere.csv", "nowhere.jsonl", "nowhere.parquet", "nowhere", "some/nowhere"])
def test_file_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"data '{name}': no such file"):
        read_table(name, ["text"])


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".csv", "x" * 300 + ".parquet"])
def test_name_that_no_file_can_have(name):
    with pytest.raises(InputError, match=r"^data 'x+.* cannot be read: .*too long"):
        read_table(name, ["text"])


def test_missing_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=r"no such file$"):
        read_table(str(tmp_path / "train.csv"), ["text"])


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_split_of_a_file_is_refused(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="a file has no splits, got --split test; leave it out"):
        read_table(str(tmp_path / name), ["text"], split="test")


def test_hub_name_is_loaded_with_its_split(monkeypatch):
    asked = []

    def load_dataset(name, *, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"text": ["a"], "y": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_table("owner/name", ["text"], split="test").columns == {"text": ["a"]}
    assert asked == [("owner/name", "test")]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that cannot be read by anyone")
def test_unreadable_file(tmp_path):
    (tmp_path / "a.csv").symlink_to("/proc/self/mem")
    with pytest.raises(InputError, match="cannot be read: "):
        read_table(str(tmp_path / "a.csv"), ["text"])


def test_directory_of_something_else(tmp_path):
    (tmp_path / "a.csv").mkdir()
    for place in (tmp_path, tmp_path / "a.csv"):
        with pytest.raises(InputError, match="cannot be read: "):
            read_table(str(place), ["text"])


def test_parquet_keeps_types_and_nulls(tmp_path):
    source = str(tmp_path / "a.parquet")
    columns = {"text": ["NA", None], "y": [1.0, None], "flag": [True, False], "prompt": [{"text": "a"}, {"text": "b"}]}
    parquet.write_table(pa.table(columns), source)
    table = read_table(source, ["text", "y", "flag", "prompt.text"])
    assert table.columns == {"text": ["NA", None], "y": [1.0, None], "flag": [True, False], "prompt.text": ["a", "b"]}
    with open(source, "rb") as file:
        assert table.sha256 == hashlib.file_digest(file, "sha256").hexdigest()
    with pytest.raises(InputError, match=r"expected a column 'body', found text, y, flag, prompt\.text"):
        read_table(source, ["body"])


def test_parquet_without_rows(tmp_path):
    source = str(tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), source)
    with pytest.raises(InputError, match="expected at least one row, got none"):
        read_table(source, ["text"])
    with pytest.raises(InputError, match="expected a column 'body', found text"):
        read_table(source, ["body"])


@pytest.mark.parametrize("place", ["a.parquet", "directory"])
def test_rewritten_parquet_is_read_anew(place, tmp_path):
    """Also if its time of change stays, as with `cp -p` or a file system of coarse times."""
    file = tmp_path / "a.parquet" if place == "a.parquet" else tmp_path / place / "part-0.parquet"
    file.parent.mkdir(exist_ok=True)
    digests = set()
    for texts in (["a"], ["b"]):
        parquet.write_table(pa.table({"text": texts}), file)
        os.utime(file, (1e9, 1e9))
        table = read_table(str(tmp_path / place), ["text"])
        assert table.columns["text"] == texts
        digests.add(table.sha256)
    assert len(digests) == 2


def test_digest_of_a_directory_is_that_of_its_files_and_the_split(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        parquet.write_table(pa.table({"text": ["a"]}), tmp_path / name / "train.parquet")
        parquet.write_table(pa.table({"text": ["a"]}), tmp_path / name / "test.parquet")
        os.utime(tmp_path / name / "train.parquet", (len(name), 1e9))
    digests = [read_table(str(tmp_path / n), ["text"], split=s).sha256 for n, s in (("a", "train"), ("b", "train"))]
    assert digests[0] == digests[1] != read_table(str(tmp_path / "a"), ["text"], split="test").sha256


def test_parquet_in_a_directory_named_like_a_partition(tmp_path):
    (tmp_path / "text=x").mkdir()
    parquet.write_table(pa.table({"text": ["a"], "a.b": ["c"]}), tmp_path / "text=x" / "a.parquet")
    assert read_table(str(tmp_path / "text=x" / "a.parquet"), ["text", "a.b"]).columns == {"text": ["a"], "a.b": ["c"]}


@pytest.mark.parametrize("save", ["parquet", "disk", "directory"])
def test_narrow_floats_keep_their_dtype(save, tmp_path):
    """So that a threshold of 0.7 takes what was written as 0.7."""
    scores = {"y": pa.array([0.7, None, 0.2], pa.float32()), "z": pa.array([0.7, None, 0.2], pa.float64())}
    if save == "disk":
        datasets.Dataset(pa.table(scores)).save_to_disk(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        parquet.write_table(pa.table(scores), tmp_path / "data" / "a.parquet")
    source = tmp_path / "data" / "a.parquet" if save == "parquet" else tmp_path / "data"
    table = read_table(str(source), ["y", "z"])
    assert table.columns == {"y": [np.float32(0.7), None, np.float32(0.2)], "z": [0.7, None, 0.2]}
    assert [type(v) for v in table.columns["y"]] == [np.float32, type(None), np.float32]
    assert parse_labels(table, ["y", "z"], 0.7).tolist() == [[1, 1], [-1, -1], [0, 0]]


def test_saved_data_set(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["NA", "b"], "y": [1, 0]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
    one = read_table(str(tmp_path / "one"), ["text", "y"])
    assert one.columns == {"text": ["NA", "b"], "y": [1, 0]}
    assert read_table(str(tmp_path / "splits"), ["y"], split="test").columns == {"y": [1, 0]}
    with pytest.raises(InputError, match="expected a split 'train', found test"):
        read_table(str(tmp_path / "splits"), ["y"])
    datasets.Dataset.from_dict({"text": ["NA", "c"], "y": [1, 0]}).save_to_disk(tmp_path / "other")
    assert read_table(str(tmp_path / "other"), ["text"]).sha256 != one.sha256


def test_directory_of_parquet_files(tmp_path):
    for i, texts in enumerate((["a", "b"], ["c"])):
        parquet.write_table(pa.table({"text": texts}), tmp_path / f"part-{i}.parquet")
    assert read_table(str(tmp_path), ["text"]).columns == {"text": ["a", "b", "c"]}
