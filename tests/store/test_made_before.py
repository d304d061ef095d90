"""A run made by the code of before the rooms (commit 1e18f84) is read, and made again bit for bit.

Its store is of schema 3, in which every chunk is a file: it is read and never written.

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
from aura_dist.errors import StoreError
from aura_dist.interventions.artifact import META_FILE, WEIGHTS_FILE, Intervention
from aura_dist.scoring.statistics import STATISTICS
from aura_dist.store.access import get_array, open_group, read_array
from aura_dist.store.record import commit, response_names, unfinished
from aura_dist.store.schema import Samples, StoreSpec, create_store
from tests.models import save_tiny
from tests.stores import write_responses

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


def test_scores_are_made_again_bit_for_bit(made_before, tmp_path):
    """In a store of this schema that holds the same responses."""
    group = open_group(str(made_before / "run" / "store.zarr"))
    samples = Samples(*(read_array(group, f"samples/{name}") for name in ("row", "num_tokens", "label")))
    store, spec = str(tmp_path / "s.zarr"), StoreSpec.of(group)
    create_store(store, spec, samples, {})
    new = open_group(store)
    for name in response_names(group):
        write_responses(get_array(new, name), read_array(group, name, complete=True))
    for task in unfinished(new):
        commit(new, task, {})
    assert main(["score", "--store", store]) == 0
    before, after = (aura_dist.open_store(path)["scores"] for path in (made_before / "run" / "store.zarr", store))
    for site in spec.sites:
        for pooling in spec.poolings:
            assert before[site.name][pooling].identical(after[site.name][pooling])


def refused(capsys, *command: str) -> None:
    assert main(list(command)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "expected schema version 4 to write into, got 3, which is only read; renew it with" in error
    assert f"`aura-dist convert --store {command[-1]} --to store --out NEW`" in error


def test_score_shows_what_is_there_and_writes_nothing(copy, capsys):
    store = copy / "run" / "store.zarr"
    before = files(store, "**/*")
    assert main(["score", "--store", str(store)]) == 0
    assert "question, mean pooling" in capsys.readouterr().out
    refused(capsys, "score", "--overwrite", "--store", str(store))
    assert main(["status", str(copy / "run")]) == 0
    assert "16 statistics" in capsys.readouterr().out
    assert files(store, "**/*") == before
    next((store / "scores").glob("*/max/scored/c/0")).unlink()
    refused(capsys, "score", "--store", str(store))


def test_damage_is_named(copy):
    (chunk, *_) = sorted(f for f in (copy / "run" / "store.zarr" / "scores").glob("*/max/auroc/c/0/0"))
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(StoreError, match=r"max/auroc', found it missing or damaged.*score again with --overwrite"):
        aura_dist.top_neurons(copy / "run" / "store.zarr", "toxic", 3)
    chunk.unlink()
    with pytest.raises(StoreError, match="max/auroc/c/0/0' is missing"):
        aura_dist.top_neurons(copy / "run" / "store.zarr", "toxic", 3)


@pytest.mark.parametrize("name", FITTED)
def test_interventions_are_fitted_again_bit_for_bit(made_before, tmp_path, name):
    concept, method = FITTED[name]
    store, before = made_before / "run" / "store.zarr", made_before / "run" / "interventions" / name
    out = tmp_path / name
    assert main(["fit", "--store", str(store), "--concept", concept, "--method", method, "--out", str(out)]) == 0
    assert (out / WEIGHTS_FILE).read_bytes() == (before / WEIGHTS_FILE).read_bytes()
    assert json.loads((out / META_FILE).read_text()).items() >= json.loads((before / META_FILE).read_text()).items()
    assert Intervention.load(out).digest == Intervention.load(before).digest


def test_collect_takes_the_store_for_its_own(copy, capsys):
    """The identities of model, tokenizer and data are those of before. A store that is not finished is refused."""
    model, store = save_tiny("llama", copy / "tiny-llama"), copy / "run" / "store.zarr"
    before = files(store, "**/*")
    flags = ["--model", str(model), "--data", str(copy / "labelled.csv")]
    flags += ["--concepts", "toxic", "question", "--pooling", "max", "mean", "--max-tokens", "32"]
    flags += ["--modules", "*.1.mlp.up_proj", "*.2.mlp.down_proj", "--tokens-per-batch", "256"]
    flags += ["--store", str(store)]
    assert main(["collect", *flags]) == 0
    assert files(store, "**/*") == before
    (store / "progress" / "done" / "c" / "0").unlink()
    before.pop("progress/done/c/0")
    refused(capsys, "collect", *flags)
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
