"""What `convert` writes holds the store's own numbers, as datasets, pandas and safetensors read them."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import aura_dist
from aura_dist.cli import main
from aura_dist.store import conversion
from aura_dist.store.access import open_group, read_array
from aura_dist.store.record import unfinished
from aura_dist.store.schema import SCHEMA_VERSION
from tests.stores import make_store

MADE_BEFORE = Path(__file__).with_name("made_before.tar.gz")


@pytest.fixture(scope="module", params=["float32", "float16"])
def store(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("stores") / "s.zarr"
    return make_store(place, 150, [40, 1100], ["toxic", "rude"], dtype=request.param)


def responses(store):
    group = open_group(str(store))
    return {name: read_array(group, f"activations/{name}/max") for name in ("layers.0.up", "layers.1.up")}


def test_datasets(store, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    pandas = pytest.importorskip("pandas")
    assert main(["convert", "--store", str(store), "--to", "datasets", "--out", str(tmp_path / "d")]) == 0
    assert len(list((tmp_path / "d" / "data").iterdir())) == 2, "a file a row chunk"
    loaded = datasets.load_dataset(str(tmp_path / "d"), split="train", cache_dir=str(tmp_path / "cache"))
    frame = pandas.read_parquet(tmp_path / "d")
    group = open_group(str(store))
    labels = read_array(group, "samples/label")
    assert loaded["row"][:] == frame["row"].tolist() == read_array(group, "samples/row").tolist()
    assert loaded["num_tokens"][:] == read_array(group, "samples/num_tokens").tolist()
    assert [-1 if label is None else label for label in loaded["rude"]] == labels[:, 1].tolist()
    for site, values in responses(store).items():
        column = f"{site}/max"
        assert loaded.features[column].length == values.shape[1]
        np.testing.assert_array_equal(np.array(loaded.with_format("numpy")[column]), values)
        np.testing.assert_array_equal(np.stack(frame[column]), values)
        assert frame[column][0].dtype == values.dtype


def test_safetensors(store, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "_FILE_BYTES", 100_000)  # less than both modules take
    assert main(["convert", "--store", str(store), "--to", "safetensors", "--out", str(tmp_path / "t")]) == 0
    index = json.loads((tmp_path / "t" / "index.json").read_text())
    files = {file: load_file(tmp_path / "t" / file) for file in set(index["weight_map"].values())}
    assert len(files) == 2
    assert index["metadata"]["concepts"] == ["toxic", "rude"]
    read = {name: files[file][name] for name, file in index["weight_map"].items()}
    for site, values in responses(store).items():
        np.testing.assert_array_equal(read[f"{site}/max"], values)
        assert read[f"{site}/max"].dtype == values.dtype
    for name in ("row", "num_tokens", "label"):
        np.testing.assert_array_equal(read[f"samples/{name}"], read_array(open_group(str(store)), f"samples/{name}"))


def test_some_modules(store, tmp_path):
    chosen = ["--modules", "*.1.up", "--to", "safetensors", "--out", str(tmp_path / "t")]
    assert main(["convert", "--store", str(store), *chosen]) == 0
    names = json.loads((tmp_path / "t" / "index.json").read_text())["weight_map"]
    assert {name for name in names if not name.startswith("samples/")} == {"layers.1.up/max"}


def test_store_of_an_earlier_schema_is_renewed(tmp_path):
    with tarfile.open(MADE_BEFORE) as archive:
        archive.extractall(tmp_path, filter="data")
    old, new = tmp_path / "run" / "store.zarr", tmp_path / "new.zarr"
    before = {str(f): f.read_bytes() for f in old.rglob("*") if f.is_file()}
    assert main(["score", "--store", str(old), "--overwrite"]) == 2
    assert main(["convert", "--store", str(old), "--to", "store", "--out", str(new)]) == 0
    assert {str(f): f.read_bytes() for f in old.rglob("*") if f.is_file()} == before
    assert open_group(str(new)).attrs["schema_version"] == SCHEMA_VERSION
    assert main(["score", "--store", str(new)]) == 0
    trees = [aura_dist.open_store(path) for path in (old, new)]
    for part in ("activations", "scores", "samples"):
        nodes = [{node.path: node for node in tree[part].subtree if node.data_vars} for tree in trees]
        assert nodes[0].keys() == nodes[1].keys()
        for path in nodes[0]:
            assert nodes[0][path].to_dataset(inherit=False).equals(nodes[1][path].to_dataset(inherit=False)), path
    kept = [{k: v for k, v in dict(tree.attrs).items() if k != "schema_version"} for tree in trees]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--to datasets --out {out} --pooling mean", "--pooling: expected some of the store's max, got 'mean'"),
        ("--to datasets --out {out} --modules nothing.*", "matches none of the 2 modules of the store"),
        ("--to datasets --out s3://bucket/x", "--out: expected a local directory, got the URL"),
        ("--to store --out {out} --modules *.up", "--modules: expected none with --to store, which takes all"),
        ("--to parquet --out {out}", "--to: expected one of datasets, saelens, safetensors, store, got 'parquet'"),
        ("--to datasets --out {here}", "expected a directory that does not exist yet"),
    ],
)  # fmt: skip
def test_refused(words, expected, store, tmp_path, capsys):
    given = words.format(out=tmp_path / "no", here=tmp_path).split()
    assert main(["convert", "--store", str(store), *given]) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_store_that_cannot_be_read(tmp_path, capsys):
    store = make_store(tmp_path / "s.zarr", 150, [40])
    shard = next(f for f in (store / "activations" / "layers.0.up" / "max").rglob("*") if f.name == "0" and f.is_file())
    shard.write_bytes(shard.read_bytes()[:-9])
    assert main(["convert", "--store", str(store), "--to", "datasets", "--out", str(tmp_path / "d")]) == 2
    assert str(shard) in capsys.readouterr().err
    unfinished = make_store(tmp_path / "u.zarr", 150, [40], num_unfinished=1)
    assert main(["convert", "--store", str(unfinished), "--to", "datasets", "--out", str(tmp_path / "d")]) == 2
    assert "tasks are missing; run the same `collect` to finish it" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.zarr", "u.zarr"]


def test_unfinished_store_is_renewed_as_one(tmp_path):
    """What is collected is kept, and `collect` may finish the rest."""
    old, new = make_store(tmp_path / "u.zarr", 400, [40], num_unfinished=2), tmp_path / "new.zarr"
    assert main(["convert", "--store", str(old), "--to", "store", "--out", str(new)]) == 0
    groups = [open_group(str(store)) for store in (old, new)]
    left = [unfinished(group) for group in groups]
    assert left[0] == left[1]
    assert len(left[0]) == 2
    found = [read_array(group, "activations/layers.0.up/max") for group in groups]
    np.testing.assert_array_equal(*found)
    assert np.isnan(found[1][-1]).all()


def test_concept_with_the_name_of_a_column_is_refused(tmp_path, capsys):
    store = make_store(tmp_path / "s.zarr", 150, [40], ["row"])
    assert main(["convert", "--store", str(store), "--to", "datasets", "--out", str(tmp_path / "d")]) == 2
    assert "expected no concept of the name of a column, got 'row'" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
