"""A run made by the code of before the rooms (commit 1e18f84) is read, and made again bit for bit.

`made_before.tar.gz` holds 26 labelled texts, the store of a tiny Llama's responses to them (two sites, two poolings,
two concepts, some labels missing), its scores, an AurA and a Linear-AcT intervention, and two evaluations.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

import aura_dist
from aura_dist.cli import main
from aura_dist.interventions.artifact import META_FILE, WEIGHTS_FILE, Intervention
from aura_dist.scoring.statistics import STATISTICS
from tests.models import save_tiny

ARCHIVE = Path(__file__).with_name("made_before.tar.gz")
FITTED = {"aura": ("toxic", "aura"), "linear-act": ("question", "linear-act")}


@pytest.fixture(scope="module")
def made_before(tmp_path_factory):
    directory = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.fixture
def copy(made_before, tmp_path):
    return Path(shutil.copytree(made_before, tmp_path / "copy"))


def files(store: Path, pattern: str) -> dict[str, bytes]:
    return {str(f.relative_to(store)): f.read_bytes() for f in sorted(store.glob(pattern)) if f.is_file()}


def test_store_is_read(made_before):
    store = made_before / "run" / "store.zarr"
    tree = aura_dist.open_store(store)
    assert set(np.unique(tree["samples"]["label"].values)) == {-1, 0, 1}
    scores = tree["scores"]
    assert not scores.attrs["partial"]
    for site in tree["activations"]:
        assert set(tree["activations"][site].data_vars) == {"max", "mean"}
        for pooling in scores[site]:
            assert set(scores[site][pooling].data_vars) == set(STATISTICS)
    top = aura_dist.top_neurons(store, "question", 5, pooling="mean")
    assert top["auroc"].is_monotonic_decreasing
    assert not top.isna().any(axis=None)


def test_scores_are_made_again_bit_for_bit(copy):
    store = copy / "run" / "store.zarr"
    before = {
        name: files(store, pattern) for name, pattern in (("chunks", "scores/**/c/**/*"), ("arrays", "**/zarr.json"))
    }
    before["arrays"].pop("scores/zarr.json")  # holds how long it took
    assert main(["score", "--store", str(store), "--overwrite"]) == 0
    assert files(store, "scores/**/c/**/*") == before["chunks"]
    assert {k: v for k, v in files(store, "**/zarr.json").items() if k != "scores/zarr.json"} == before["arrays"]
    assert main(["score", "--store", str(store)]) == 0
    assert files(store, "scores/**/c/**/*") == before["chunks"]


@pytest.mark.parametrize("name", FITTED)
def test_interventions_are_fitted_again_bit_for_bit(made_before, tmp_path, name):
    concept, method = FITTED[name]
    store, before = made_before / "run" / "store.zarr", made_before / "run" / "interventions" / name
    out = tmp_path / name
    assert main(["fit", "--store", str(store), "--concept", concept, "--method", method, "--out", str(out)]) == 0
    assert (out / WEIGHTS_FILE).read_bytes() == (before / WEIGHTS_FILE).read_bytes()
    assert json.loads((out / META_FILE).read_text()).items() >= json.loads((before / META_FILE).read_text()).items()
    assert Intervention.load(out).digest == Intervention.load(before).digest


def test_collect_takes_the_store_for_its_own(copy):
    """The identities of model, tokenizer and data are those of before, so that a store can be finished."""
    model, store = save_tiny("llama", copy / "tiny-llama"), copy / "run" / "store.zarr"
    before = files(store, "**/*")
    flags = ["--model", str(model), "--data", str(copy / "labelled.csv"), "--store", str(store)]
    flags += ["--concepts", "toxic", "question", "--pooling", "max", "mean", "--max-tokens", "32"]
    flags += ["--modules", "*.1.mlp.up_proj", "*.2.mlp.down_proj", "--tokens-per-batch", "256"]
    assert main(["collect", *flags]) == 0
    assert files(store, "**/*") == before


def test_results_are_read_by_report(made_before, tmp_path):
    pytest.importorskip("jinja2", reason="the extra `report` is not installed")
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    page, results = tmp_path / "page.html", made_before / "run" / "results"
    assert main(["report", str(made_before / "run"), "--out", str(page)]) == 0
    text = page.read_text()
    for name in ("aura", "base"):
        perplexity = json.loads((results / f"{name}.json").read_text())["perplexity"]["token_weighted"]
        assert f"{perplexity:,.1f}" in text, name
