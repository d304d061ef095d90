"""Texts without labels are collected and converted; nothing is scored or fitted from them."""

import json

import numpy as np
import pytest
from safetensors import safe_open

import aura_dist
from aura_dist.cli import main
from aura_dist.errors import ConfigError
from aura_dist.interventions.artifact import Intervention

SITES = ["model.layers.0", "model.layers.1"]
TEXTS = [f"text {i} has {'a few words and ' * (i % 7)}an end" for i in range(75)]


@pytest.fixture(scope="module")
def given(tiny_dir, tmp_path_factory):
    place = tmp_path_factory.mktemp("unlabelled")
    lines = [json.dumps({"text": text, "score": i % 2}) for i, text in enumerate(TEXTS)]
    (place / "texts.jsonl").write_text("\n".join(lines))
    return ["--model", str(tiny_dir("llama")), "--data", str(place / "texts.jsonl"), "--modules", *SITES]


@pytest.fixture(scope="module")
def store(given, tmp_path_factory):
    place = tmp_path_factory.mktemp("stores") / "store.zarr"
    assert main(["collect", *given, "--unlabelled", "--pooling", "mean", "tokens", "--store", str(place)]) == 0
    return place


def test_all_texts_are_run_as_with_labels(given, store, tmp_path):
    labelled = tmp_path / "l.zarr"
    options = ["--concepts", "score", "--pooling", "mean", "tokens", "--store", str(labelled)]
    assert main(["collect", *given, *options]) == 0
    with_labels, without = aura_dist.open_store(labelled), aura_dist.open_store(store)
    assert sorted(without["samples"]["row"].values) == list(range(len(TEXTS)))
    assert without["samples"]["label"].shape == (len(TEXTS), 0)
    for site in SITES:
        for kept in ("mean", "tokens"):
            got, expected = (tree["activations"][site][kept].values for tree in (without, with_labels))
            np.testing.assert_array_equal(got, expected)


def test_api_takes_no_labels(given, tmp_path):
    store = aura_dist.collect(given[1], TEXTS, None, store=tmp_path / "s.zarr", modules=SITES)
    tree = aura_dist.open_store(store)
    assert tree["activations"][SITES[0]]["max"].shape == (len(TEXTS), 48)
    assert tree["samples"]["label"].shape == (len(TEXTS), 0)
    with pytest.raises(ConfigError, match=r"^num_positive: expected it without unlabelled"):
        aura_dist.collect(given[1], TEXTS, None, store=tmp_path / "t.zarr", num_positive=3)


def test_the_same_command_finds_it_finished(given, store, capsys):
    assert main(["collect", *given, "--unlabelled", "--pooling", "mean", "tokens", "--store", str(store)]) == 0
    assert "is finished: 75 rows" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["datasets", "safetensors", "store"])
def test_converted(store, tmp_path, to):
    out = tmp_path / "out"
    assert main(["convert", "--store", str(store), "--to", to, "--out", str(out)]) == 0
    expected = aura_dist.open_store(store)["activations"][SITES[0]]["mean"].values
    if to == "datasets":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(out / "data")
        assert "score" not in table.column_names
        got = np.stack(table[f"{SITES[0]}/mean"].to_numpy())
    elif to == "safetensors":
        files = json.loads((out / "index.json").read_text())
        assert files["metadata"]["concepts"] == []
        with safe_open(out / files["weight_map"][f"{SITES[0]}/mean"], "np") as file:
            got = file.get_tensor(f"{SITES[0]}/mean")
    else:
        got = aura_dist.open_store(out)["activations"][SITES[0]]["mean"].values
    np.testing.assert_array_equal(got, expected)


def test_they_are_controls_of_a_gate(given, tmp_path):
    labelled, control, out = tmp_path / "l.zarr", tmp_path / "c.zarr", tmp_path / "out"
    assert main(["collect", *given, "--concepts", "score", "--pooling", "mean", "--store", str(labelled)]) == 0
    assert main(["score", "--store", str(labelled)]) == 0
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": f"{text}, other"}) for text in TEXTS[:50]))
    others = [*given[:3], str(tmp_path / "c.jsonl"), *given[4:]]
    assert main(["collect", *others, "--unlabelled", "--pooling", "mean", "--store", str(control)]) == 0
    fit = ["fit", "--store", str(labelled), "--concept", "score", "--method", "mean-act", "--pooling", "mean"]
    assert main([*fit, "--gate", "tokens", "--control", str(control), "--out", str(out)]) == 0
    assert Intervention.load(out).meta["gate"]["control"]["num_texts"] == 50


def test_planned(given, capsys):
    assert main(["plan", *given, "--unlabelled", "--pooling", "mean", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["store"]["num_rows"] == len(TEXTS)
    assert not found["gate_bytes"], "gates need texts of both classes"


def test_reported(store, tmp_path, capsys):
    assert main(["status", str(store.parent)]) == 0
    assert "texts without labels" in capsys.readouterr().out
    assert main(["report", str(store.parent), "--out", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ("score",),
        ("score", "--pooling", "max"),
        ("fit", "--concept", "score", "--out", "x"),
        ("fit", "--concept", "score", "--out", "x", "--method", "mean-act", "--pooling", "mean", "--gate", "tokens"),
        ("fit", "--concept", "score", "--out", "x", "--method", "lineas"),
    ],
)
def test_nothing_is_scored_or_fitted(refused, store, words):
    refused([*words, "--store", store], "expected texts with labels, got a collection of --unlabelled")


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        ((), "--concepts: expected at least one value, got none.* with --unlabelled"),
        (("--unlabelled", "--concepts", "score"), "--concepts: expected it without --unlabelled"),
        (("--unlabelled", "--match-length"), "--match-length: expected it without --unlabelled"),
        (("--unlabelled", "--seed", "1"), "--seed: expected it without --unlabelled"),
    ],
)
def test_refused(refused, given, tmp_path, words, pattern):
    refused(["collect", *given, *words, "--store", tmp_path / "s.zarr"], pattern)
    assert not (tmp_path / "s.zarr").exists()
