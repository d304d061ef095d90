"""Scores that are missing or damaged are named, never read as fill values; `score --overwrite` makes them again."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

import aura_dist
from aura_dist.cli import main
from aura_dist.errors import StoreError
from aura_dist.scoring import cluster, columns, scores, statistics
from aura_dist.scoring.scores import ROOM
from aura_dist.scoring.statistics import STATISTICS
from tests.scoring.test_score import score, score_files
from tests.stores import make_store

ARRAY = "scores/layers.1.up/max"
FILE = f"{ARRAY}/c/0/0/0"


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


def flip_first(path: Path) -> None:
    """A bit of the bit masks, which every verb reads."""
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (FILE, cut),
        (FILE, flip_first),
        (f"{ARRAY}/zarr.json", cut),
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
        assert f"expected an array '{Path(name).parent if name.startswith('scores/zarr') else ARRAY}'" in error, verb
        assert error.endswith("score again with --overwrite"), verb
    with pytest.raises(StoreError, match="score again with --overwrite"):
        aura_dist.top_neurons(store, "toxic", 3)
    with pytest.raises(StoreError, match="score again with --overwrite"):
        aura_dist.open_store(store)
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


def test_lost_file_of_scores_is_made_again(store, scored):
    """It says itself what is in it: q-values are made again too, and none is taken for one that is there."""
    (store / FILE).unlink()
    with pytest.raises(StoreError, match=r"layers\.1\.up has not been scored"):
        aura_dist.top_neurons(store, "toxic", 3)
    assert score(store, "--statistics", "auroc") == 0
    assert "q_value" not in aura_dist.open_store(store)["scores"]["layers.1.up"]["max"]
    assert aura_dist.top_neurons(store, "toxic", 3)["q_value"].isna().all()
    assert score(store) == 0
    assert score_files(store) == score_files(scored)


def test_damage_of_one_statistic_is_named_where_it_is_read(store):
    content = bytearray((store / FILE).read_bytes())
    (made, size), (auroc, _) = np.frombuffer(content[-ROOM * 16 - 4 : -4], "<u8").reshape(-1, 2)[:2].tolist()
    assert auroc == made + size
    content[auroc + 30] ^= 1
    (store / FILE).write_bytes(content)
    found = aura_dist.open_store(store)[ARRAY]
    assert np.isfinite(found["p_value"].values).all()
    with pytest.raises(StoreError, match=f"{FILE}' is damaged: the checksum of a chunk.*score again with --overwrite"):
        found["auroc"].values.sum()


def test_statistics_that_are_new_in_the_table_find_room(store, scored, monkeypatch):
    """As a later version has them: what an earlier one made is kept."""
    new = replace(STATISTICS["mean_positive"], name="new")
    before = aura_dist.open_store(store)["scores"]["layers.1.up"]["max"].to_dataset().load()
    for module in (statistics, scores, columns):
        monkeypatch.setattr(module, "STATISTICS", {**STATISTICS, "new": new})
    monkeypatch.setattr(scores, "BITS", {**scores.BITS, "new": 1 << len(STATISTICS)})
    assert score(store, "--dask", "threads") == 0
    after = aura_dist.open_store(store)["scores"]["layers.1.up"]["max"].to_dataset().load()
    np.testing.assert_array_equal(after["new"], after["mean_positive"])
    assert after.drop_vars("new").equals(before)


def test_removal_that_is_cut_off_leaves_nothing_that_counts(store, scored, monkeypatch, capsys):
    remove = zarr.Group.__delitem__

    def cut_off(group, name):
        if name != "scores":
            return remove(group, name)
        for array in store.glob("scores/layers.0.up"):
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
