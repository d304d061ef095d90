"""Scores that are missing or damaged are named, never read as fill values; `score --overwrite` makes them again."""

import shutil
from pathlib import Path

import pytest
import zarr

import aura_dist
from aura_dist.cli import main
from aura_dist.errors import StoreError
from aura_dist.scoring import cluster
from tests.scoring.test_score import score, score_files
from tests.stores import make_store

ARRAY = "scores/layers.1.up/max/auroc"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("scored") / "store.zarr", 150, (320, 200), ("toxic", "insult"))
    assert score(store) == 0
    return store


@pytest.fixture
def store(scored, tmp_path):
    return Path(shutil.copytree(scored, tmp_path / "store.zarr"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (f"{ARRAY}/c/0/1", Path.unlink),
        (f"{ARRAY}/c/0/1", cut),
        (f"{ARRAY}/c/0/1", flip),
        (f"{ARRAY}/zarr.json", Path.unlink),
        (f"{ARRAY}/zarr.json", cut),
        ("scores/layers.1.up/max/scored/zarr.json", cut),
        ("scores/zarr.json", cut),
    ],
)
def test_damaged_scores_are_named_and_made_again(name, damage, store, scored, tmp_path, capsys):
    damage(store / name)
    commands = {
        "score": ["score", "--store", store],
        "fit": ["fit", "--store", store, "--concept", "toxic", "--out", tmp_path / "fitted"],
        "report": ["report", tmp_path, "--out", tmp_path / "page.html"],
    }
    for verb, command in commands.items():
        assert main([str(word) for word in command]) == 2, verb
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"expected an array '{Path(name).parent if 'zarr.json' in name else ARRAY}'" in error, verb
        assert error.endswith("score again with --overwrite"), verb
    with pytest.raises(StoreError, match="score again with --overwrite"):
        aura_dist.top_neurons(store, "toxic", 3)
    with pytest.raises(StoreError, match="score again with --overwrite"):
        aura_dist.open_store(store)[ARRAY].values.sum()
    assert score(store, "--overwrite") == 0
    assert score_files(store) == score_files(scored)


def test_lost_description_of_the_scores_brings_none_of_other_rows_back(tmp_path):
    part = make_store(tmp_path / "store.zarr", 150, (320, 200), num_unfinished=1)
    assert score(part, "--partial") == 0
    whole = make_store(tmp_path / "whole.zarr", 150, (320, 200))
    for name in ("activations", "progress"):
        shutil.rmtree(part / name)
        shutil.copytree(whole / name, part / name)
    (part / "scores" / "zarr.json").unlink()
    with pytest.raises(StoreError, match="has not been scored"):
        aura_dist.top_neurons(part, "toxic", 3)
    assert score(part) == 0
    assert score(whole) == 0
    assert score_files(part) == score_files(whole)


def test_q_values_are_not_made_from_missing_p_values(scored, store, capsys):
    adjusted = store / "scores" / "zarr.json"
    adjusted.write_text(adjusted.read_text().replace('"adjusted": [\n      "max"\n    ]', '"adjusted": []'))
    assert adjusted.read_text() != (scored / "scores" / "zarr.json").read_text()
    (store / "scores" / "layers.0.up" / "max" / "p_value" / "c" / "0" / "2").unlink()
    assert score(store) == 2
    assert "layers.0.up/max/p_value/c/0/2' is not there" in capsys.readouterr().err


def test_removal_that_is_cut_off_leaves_nothing_that_counts(store, scored, monkeypatch, capsys):
    remove = zarr.Group.__delitem__

    def cut_off(group, name):
        if name != "scores":
            return remove(group, name)
        for array in store.glob("scores/*/*/q_value"):
            shutil.rmtree(array)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(zarr.Group, "__delitem__", cut_off)
        assert score(store, "--overwrite") == 130
    with pytest.raises(StoreError, match="has not been scored"):
        aura_dist.top_neurons(store, "toxic", 3)
    assert score(store) == 0
    assert score_files(store) == score_files(scored)
    assert "on other rows" not in capsys.readouterr().err


def test_what_cannot_be_made_again_is_not_removed(store, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    before = score_files(store)
    assert before
    for refused in (["--memory-limit", "1MB"], ["--dask", "tcp://127.0.0.1:1"]):
        assert score(store, "--overwrite", *refused) == 2
        assert score_files(store) == before, refused
