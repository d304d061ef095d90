"""The main job end to end on a tiny model: what one stage writes is what the next one reads."""

import json
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

import aura_dist
from aura_dist.cli import main
from aura_dist.interventions.artifact import Intervention

NUM_POSITIVE, NUM_NEGATIVE = 40, 60


def collect(tiny, data, store, *more):
    arguments = ["--num-positive", str(NUM_POSITIVE), "--num-negative", str(NUM_NEGATIVE), "--tokens-per-batch", "256"]
    return main(
        [
            "collect",
            "--model",
            str(tiny),
            "--data",
            data,
            "--concepts",
            "toxic",
            "--store",
            str(store),
            *arguments,
            *more,
        ]
    )


@pytest.fixture(scope="module")
def run_dir(tiny_dir, sentences_csv, tmp_path_factory):
    """A run directory after collect, score and fit."""
    out = tmp_path_factory.mktemp("run")
    assert collect(tiny_dir("llama"), sentences_csv, out / "store.zarr", "--pooling", "max", "mean") == 0
    assert main(["score", "--store", str(out / "store.zarr")]) == 0
    fit = [
        "fit",
        "--store",
        str(out / "store.zarr"),
        "--concept",
        "toxic",
        "--out",
        str(out / "interventions" / "aura"),
    ]
    assert main(fit) == 0
    return out


def test_open_store_gives_labelled_lazy_arrays(run_dir):
    store = aura_dist.open_store(run_dir / "store.zarr")
    assert isinstance(store, xr.DataTree)
    tokens = store["samples"]["num_tokens"].values
    assert len(tokens) == NUM_POSITIVE + NUM_NEGATIVE
    assert (np.diff(tokens) >= 0).all()
    label = store["samples"]["label"].sel(concept="toxic").values
    assert (label == 1).sum() == NUM_POSITIVE
    site = store["activations"]["model.layers.1.mlp.gate_proj"]
    assert site["max"].dims == ("sample", "neuron")
    assert site["max"].chunks is not None
    assert not np.isnan(site["max"].values).any()
    assert site["row"].values.tolist() == store["samples"]["row"].values.tolist()
    assert site.attrs == {"kind": "mlp", "layer": 1}
    assert store.attrs["model"]["class"] == "LlamaForCausalLM"
    assert store.attrs["config"]["num_positive"] == NUM_POSITIVE
    assert set(store.attrs["versions"]) >= {"torch", "transformers", "zarr", "aura_dist"}


def test_scores_are_those_of_scikit_learn(run_dir):
    store = aura_dist.open_store(run_dir / "store.zarr")
    label = store["samples"]["label"].sel(concept="toxic").values
    for site in store["activations"]:
        for pooling in ("max", "mean"):
            values = store["activations"][site][pooling].values
            ours = store["scores"][site][pooling]["auroc"].sel(concept="toxic").values
            theirs = [roc_auc_score(label, column) for column in values.T]
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_threads_and_processes_give_the_same_scores(run_dir, tmp_path):
    import shutil

    copy = tmp_path / "store.zarr"
    shutil.copytree(run_dir / "store.zarr", copy)
    shutil.rmtree(copy / "scores")
    assert main(["score", "--store", str(copy), "--dask", "processes", "--num-workers", "2"]) == 0
    first, second = aura_dist.open_store(run_dir / "store.zarr"), aura_dist.open_store(copy)
    for site in first["scores"]:
        xr.testing.assert_identical(
            first["scores"][site]["max"].to_dataset().compute(), second["scores"][site]["max"].to_dataset().compute()
        )


def test_top_neurons_are_the_best_in_order(run_dir):
    top = aura_dist.top_neurons(run_dir / "store.zarr", "toxic", 5)
    store = aura_dist.open_store(run_dir / "store.zarr")
    everything = np.concatenate([store["scores"][s]["max"]["auroc"].values[0] for s in store["scores"]])
    np.testing.assert_array_equal(top["auroc"], np.sort(everything)[::-1][:5])
    assert aura_dist.top_neurons(store, "toxic", 5).equals(top), "the opened store will do"
    with pytest.raises(ValueError, match="k: expected an integer of at least 1, got -1"):
        aura_dist.top_neurons(store, "toxic", -1)
    best = top.iloc[0]
    assert store["scores"][best.site]["max"]["auroc"].values[0, best.unit] == best.auroc


def test_scored_store_is_not_scored_again(run_dir, caplog):
    marker = run_dir / "store.zarr" / "scores" / "model.layers.0.mlp.gate_proj" / "max" / "c" / "0" / "0" / "0"
    before = marker.stat().st_mtime_ns
    assert main(["score", "--store", str(run_dir / "store.zarr")]) == 0
    assert marker.stat().st_mtime_ns == before


def test_fit_writes_the_scale_of_every_neuron(run_dir):
    store = aura_dist.open_store(run_dir / "store.zarr")
    intervention = aura_dist.Intervention.load(run_dir / "interventions" / "aura")
    assert list(intervention.scale) == list(store["activations"])
    for site, scale in intervention.scale.items():
        auroc = store["scores"][site]["max"]["auroc"].values[0]
        np.testing.assert_allclose(scale, np.where(auroc > 0.5, 1 - 2 * (auroc - 0.5), 1), atol=1e-7)
    assert intervention.meta["model"]["fingerprint"] == store.attrs["model"]["fingerprint"]


@pytest.mark.parametrize(("method", "value"), [("det0", 0.0), ("damp", 0.25)])
def test_top_k_methods_scale_exactly_k(run_dir, tmp_path, method, value):
    alpha = ["--alpha", "0.25"] if method == "damp" else []
    arguments = ["--top-k", "7", *alpha, "--out", str(tmp_path / method)]
    assert (
        main(["fit", "--store", str(run_dir / "store.zarr"), "--concept", "toxic", "--method", method, *arguments]) == 0
    )
    scales = np.concatenate(list(aura_dist.Intervention.load(tmp_path / method).scale.values()))
    assert (scales == value).sum() == 7
    assert (scales == 1).sum() == len(scales) - 7


def test_generate_shows_both_side_by_side(run_dir, tiny_dir, capsys):
    arguments = [
        "--prompt",
        "You are",
        "--max-new-tokens",
        "4",
        "--intervention",
        str(run_dir / "interventions" / "aura"),
    ]
    assert main(["generate", "--model", str(tiny_dir("llama")), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "  plain |" in shown
    assert "  aura  |" in shown


def test_evaluate_writes_its_figures_and_settings(run_dir, tiny_dir, sentences_csv):
    out = run_dir / "results" / "aura.json"
    arguments = ["--perplexity-texts", sentences_csv, "--out", str(out)]
    intervention = ["--intervention", str(run_dir / "interventions" / "aura")]
    assert main(["evaluate", "--model", str(tiny_dir("llama")), *arguments, *intervention]) == 0
    results = json.loads(out.read_text())
    assert results["perplexity"]["token_weighted"] > 1
    assert results["perplexity"]["num_texts"] == 480
    assert results["intervention"]["method"] == "aura"
    assert results["model_fingerprint"] == results["intervention"]["model"]["fingerprint"]


def test_config_file_serves_every_verb(tiny_dir, sentences_csv, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {tiny_dir('gpt2')}\nstore: {tmp_path / 'store.zarr'}\nconcept: toxic\n"
        f"collect:\n  data: {sentences_csv}\n  concepts: [toxic]\n  modules: all\n"
        "  num_positive: 10\n  num_negative: 10\n"
        f"fit:\n  method: det0\n  top_k: 3\n  out: {tmp_path / 'det0'}\n"
    )
    for verb in ("collect", "score", "fit"):
        assert main([verb, "--config", str(config)]) == 0
    assert aura_dist.Intervention.load(tmp_path / "det0").num_changed == 3
    assert aura_dist.open_store(tmp_path / "store.zarr").attrs["config"]["modules"] == ["all"]


def test_several_concepts_with_missing_labels(tiny_dir, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"sentence number {i} of them", "a": i % 2, "b": [0, 1, None][i % 3]} for i in range(30)]
    data.write_text("\n".join(json.dumps(r) for r in rows))
    store = tmp_path / "store.zarr"
    arguments = ["--data", str(data), "--concepts", "a", "b", "--store", str(store)]
    assert main(["collect", "--model", str(tiny_dir("opt")), *arguments]) == 0
    assert main(["score", "--store", str(store)]) == 0
    view = aura_dist.open_store(store)
    label = view["samples"]["label"].sel(concept="b").values
    assert (label == -1).sum() == 10
    site = next(iter(view["activations"]))
    values = view["activations"][site]["max"].values[label >= 0]
    expected = [roc_auc_score(label[label >= 0], column) for column in values.T]
    np.testing.assert_allclose(view["scores"][site]["max"]["auroc"].sel(concept="b"), expected, atol=1e-12)


def test_demo_on_a_model_and_data_of_ones_own(tiny_dir, sentences_csv, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--model", str(tiny_dir("mpt")), "--data", sentences_csv, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    names = {"interventions": ("aura", "gated"), "results": ("plain.json", "aura.json", "gated.json")}
    made = [f"{part}/{name}" for part, found in names.items() for name in found]
    for written in ("config.yaml", "store.zarr", *made):
        assert (out / written).exists()
        assert str(out / written) in shown
    assert "AUROC from 0 to 1" in shown
    assert "perplexity on neutral passages" in shown
    variants = shown.partition("You are such a\n")[2].splitlines()[:3]
    assert [line.split("|")[0].strip() for line in variants] == ["plain", "aura", "mean-act"]
    aura, gated = (Intervention.load(out / "interventions" / name) for name in names["interventions"])
    assert set(gated.gate) == set(gated.sites)
    assert not set(aura.sites) & set(gated.sites)
    assert main(["collect", "--config", str(out / "config.yaml")]) == 0, "the written config runs the same again"


def test_demo_keeps_what_it_did_not_write(tiny_dir, sentences_csv, tmp_path, capsys):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "config.yaml").write_text("precious: 1\n")
    command = ["demo", "--model", str(tiny_dir("llama")), "--data", sentences_csv, "--out", str(out)]
    for more in ([], ["--overwrite"]):
        assert main([*command, *more]) == 2
        assert "expected no config.yaml, or one that an earlier demo wrote, found another" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["config.yaml"]
    assert (out / "config.yaml").read_text() == "precious: 1\n"


def test_demo_that_is_refused_leaves_the_earlier_runs_settings(tiny_dir, sentences_csv, tmp_path, capsys):
    """And `--overwrite`, which the refusal offers, is there."""
    command = ["demo", "--data", sentences_csv, "--out", str(tmp_path / "demo")]
    models = [["--model", str(tiny_dir(name))] for name in ("mpt", "llama")]
    assert main([*command, *models[0]]) == 0
    before = (tmp_path / "demo" / "config.yaml").read_text()
    assert main([*command, *models[1]]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "demo" / "config.yaml").read_text() == before
    assert main([*command, *models[1], "--overwrite"]) == 0
    after = (tmp_path / "demo" / "config.yaml").read_text()
    assert models[1][1] in after
    assert "overwrite" not in after


def test_first_version_of_torchs_format_is_collected(tiny_dir, sentences_csv, tmp_path):
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "model" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    weights.unlink()
    responses = []
    for model in (tiny_dir("llama"), tmp_path / "model"):
        store = tmp_path / f"{len(responses)}.zarr"
        data = ["--data", sentences_csv, "--concepts", "toxic", "--num-positive", "9", "--num-negative", "9"]
        assert main(["collect", "--model", str(model), *data, "--store", str(store)]) == 0
        responses.append(aura_dist.open_store(str(store))["activations"]["model.layers.2.mlp.down_proj"]["max"].values)
    np.testing.assert_array_equal(*responses)
