"""fit end to end: every method from a store's statistics, onto an earlier intervention, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import aura_dist
from aura_dist.cli import main
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.methods import METHODS, FromModel
from aura_dist.scoring.scores import read_statistic
from tests.models import tiny_causal

FIRST, LAST = "model.layers.0.mlp.gate_proj", "model.layers.2.mlp.gate_proj"


def collect(tiny, data, store, *more, poolings=("max", "mean")):
    arguments = [
        "--num-positive",
        "30",
        "--num-negative",
        "40",
        "--pooling",
        *poolings,
        "--tokens-per-batch",
        "512",
    ]
    known = ["--model", str(tiny), "--data", data, "--concepts", "toxic", "--store", str(store)]
    return main(["collect", *known, *arguments, *more])


@pytest.fixture(scope="module")
def store(tiny_dir, sentences_csv, tmp_path_factory):
    place = tmp_path_factory.mktemp("fit") / "store.zarr"
    assert collect(tiny_dir("llama"), sentences_csv, place, "--modules", "all", "norm") == 0
    assert main(["score", "--store", str(place)]) == 0
    return place


def fit(store, out, method, *more):
    return main(
        ["fit", "--store", str(store), "--concept", "toxic", "--method", method, "--out", str(out), *map(str, more)]
    )


def pooled(store, site, pooling="mean"):
    view = aura_dist.open_store(store)
    label = view["samples"]["label"].values[:, 0] == 1
    values = view["activations"][site][pooling].values
    return values[label], values[~label]


def test_act_maps_use_the_mean_pooling_and_carry_one_class_to_the_other(store, tmp_path):
    assert fit(store, tmp_path / "mean", "mean-act") == 0
    assert fit(store, tmp_path / "linear", "linear-act") == 0
    mean, linear = (Intervention.load(tmp_path / name) for name in ("mean", "linear"))
    for site in (FIRST, "model.layers.1.input_layernorm", "model.layers.2.self_attn.q_proj"):
        positive, negative = pooled(store, site)
        np.testing.assert_allclose((positive + mean.shift[site]).mean(0), negative.mean(0), atol=1e-5)
        mapped = positive * linear.scale[site] + linear.shift[site]
        np.testing.assert_allclose(mapped.mean(0), negative.mean(0), atol=1e-4)
        before, after = (abs(v.std(0) / negative.std(0) - 1).mean() for v in (positive, mapped))
        assert after < before, "the spread comes nearer to the other class's"
    assert linear.meta["parameters"]["pooling"] == "mean"


def test_pooling_that_the_store_lacks_names_collects_flag(tiny_dir, sentences_csv, tmp_path, capsys):
    place = tmp_path / "store.zarr"
    assert collect(tiny_dir("llama"), sentences_csv, place, "--modules", FIRST, poolings=("max",)) == 0
    assert main(["score", "--store", str(place)]) == 0
    assert fit(place, tmp_path / "out", "linear-act") == 2
    assert "got 'mean'; collect with `--pooling max mean` for it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_statistic_that_was_not_computed_is_named(store, tmp_path, capsys):
    copy = tmp_path / "store.zarr"
    shutil.copytree(store, copy)
    shutil.rmtree(copy / "scores" / FIRST / "mean")
    assert fit(copy, tmp_path / "out", "linear-act") == 2
    assert f"{FIRST} has not been scored (linear_act_scale); run `aura-dist score`" in capsys.readouterr().err
    assert fit(copy, tmp_path / "aura", "aura") == 0


@pytest.mark.parametrize("method", ["damp", "det0", "mean-act", "linear-act", "pid-act"])
def test_top_k_changes_exactly_k(method, store, tmp_path):
    assert fit(store, tmp_path / "out", method, "--top-k", 11) == 0
    assert Intervention.load(tmp_path / "out").num_changed == 11


@pytest.mark.parametrize(
    ("modules", "count"),
    [(["norm"], 6), (["mlp", "norm"], 15), (["*.1.mlp.*", "*input_layernorm"], 6), (["all"], 21)],
)
def test_only_some_modules(modules, count, store, tmp_path):
    assert fit(store, tmp_path / "out", "aura", "--modules", *modules) == 0
    chosen = Intervention.load(tmp_path / "out")
    everything = list(aura_dist.open_store(store)["activations"])
    assert len(chosen.sites) == count
    assert chosen.sites == [s for s in everything if s in set(chosen.sites)], "in model order"
    assert fit(store, tmp_path / "det0", "det0", "--top-k", 5, "--modules", *modules) == 0
    best = Intervention.load(tmp_path / "det0")
    aurocs = aura_dist.open_store(store)["scores"]
    threshold = sorted(np.concatenate([aurocs[s]["max"]["auroc"].values[0] for s in best.sites]))[-5]
    assert best.num_changed == 5
    for site in best.sites:
        taken = aurocs[site]["max"]["auroc"].values[0][best.scale[site] == 0]
        assert (taken >= threshold).all()


def test_only_units_with_a_low_q_value(store, tmp_path):
    assert fit(store, tmp_path / "out", "aura", "--max-q", 0.3) == 0
    scores = aura_dist.open_store(store)["scores"]
    group = zarr.open_group(store, mode="r")
    for site, scale in Intervention.load(tmp_path / "out").scale.items():
        auroc = scores[site]["max"]["auroc"].values[0]
        chosen = (auroc > 0.5) & (read_statistic(group, site, "max", "q_value")[0] <= 0.3)
        np.testing.assert_allclose(scale, np.where(chosen, 1 - 2 * (auroc - 0.5), 1), atol=1e-7)
    assert json.loads((tmp_path / "out" / "intervention.json").read_text())["parameters"]["max_q"] == 0.3


def test_modules_that_match_nothing_are_refused(store, tmp_path, capsys):
    assert fit(store, tmp_path / "out", "aura", "--modules", "*.fc1") == 2
    assert "--modules '*.fc1' matches none of the 27 modules" in capsys.readouterr().err


def test_strength_scales_shifts_too(store, tmp_path):
    assert fit(store, tmp_path / "whole", "linear-act") == 0
    assert fit(store, tmp_path / "half", "linear-act", "--strength", 0.5) == 0
    whole, half = (Intervention.load(tmp_path / n) for n in ("whole", "half"))
    for site in whole.sites:
        np.testing.assert_allclose(half.shift[site], 0.5 * whole.shift[site], rtol=1e-6)
        np.testing.assert_allclose(half.scale[site], 1 + 0.5 * (whole.scale[site] - 1), rtol=1e-6)


@pytest.fixture(scope="module")
def sequential(tiny_dir, sentences_csv, store, tmp_path_factory):
    """Layer 0 fitted, then all of layer 2 collected under that at half its strength."""
    place = tmp_path_factory.mktemp("sequential")
    assert fit(store, place / "first", "linear-act", "--modules", FIRST, LAST) == 0
    under = ["--intervention", str(place / "first"), "--strength", "0.5", "--modules", LAST, "*.1.mlp.up_proj"]
    assert collect(tiny_dir("llama"), sentences_csv, place / "store.zarr", *under) == 0
    assert main(["score", "--store", str(place / "store.zarr")]) == 0
    return place


def test_collected_under_an_intervention_is_what_hooks_give(sequential, tiny_dir, sentences_csv):
    from aura_dist.text.table import read_table
    from aura_dist.text.tokenizer import load_tokenizer

    store = aura_dist.open_store(sequential / "store.zarr")
    texts = read_table(sentences_csv, ["text"]).columns["text"]
    tokenizer, model = load_tokenizer(str(tiny_dir("llama"))), tiny_causal("llama")
    seen = {}
    first = Intervention.load(sequential / "first")
    with aura_dist.intervene(model, first, 0.5), torch.no_grad():
        model.get_submodule(LAST).register_forward_hook(lambda _m, _a, out: seen.__setitem__("out", out))
        for i in (0, 17, 42):
            row = int(store["samples"]["row"].values[i])
            model(**{k: v for k, v in tokenizer(texts[row], return_tensors="pt").items() if k != "token_type_ids"})
            ours = store["activations"][LAST]["max"].values[i]
            np.testing.assert_allclose(ours, seen["out"][0].amax(0), rtol=1e-4, atol=1e-5)
    assert store.attrs["intervention"]["digest"] == first.digest
    assert store.attrs["intervention"]["strength"] == 0.5
    assert store.attrs["intervention"]["method"] == "linear-act"


def test_onto_composes_as_strong_as_it_was_collected_under(sequential, tiny_dir, tmp_path, capsys):
    new = ["--modules", LAST]
    assert fit(sequential / "store.zarr", tmp_path / "both", "linear-act", "--onto", sequential / "first", *new) == 0
    assert fit(sequential / "store.zarr", tmp_path / "alone", "linear-act", *new) == 0
    both, alone, first = (Intervention.load(p) for p in (tmp_path / "both", tmp_path / "alone", sequential / "first"))
    expected = alone @ first.at_strength(0.5)
    assert both.sites == expected.sites == [FIRST, LAST]
    for site in both.sites:
        np.testing.assert_array_equal(both.scale[site], expected.scale[site])
        np.testing.assert_array_equal(both.shift[site], expected.shift[site])
    assert both.meta["composed"][1]["applied_strength"] == 0.5
    command = ["generate", "--model", str(tiny_dir("llama")), "--intervention", str(tmp_path / "both")]
    assert main([*command, "--prompt", "You are", "--num-samples", "1", "--max-new-tokens", "2"]) == 0
    assert "  linear-act in 2 steps |" in capsys.readouterr().out
    model, ids = tiny_causal("llama"), torch.arange(5, 29).reshape(2, 12)
    with torch.no_grad(), aura_dist.intervene(model, both):
        once = model(input_ids=ids).logits
    with torch.no_grad(), aura_dist.intervene(model, first, 0.5), aura_dist.intervene(model, alone):
        torch.testing.assert_close(model(input_ids=ids).logits, once, rtol=1e-4, atol=1e-4)


def test_onto_another_intervention_is_refused(sequential, store, tmp_path, capsys, caplog):
    assert fit(store, tmp_path / "other", "aura") == 0
    assert fit(sequential / "store.zarr", tmp_path / "out", "aura", "--onto", tmp_path / "other") == 2
    assert "expected the intervention that" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert fit(store, tmp_path / "other", "aura", "--onto", tmp_path / "other") == 2
    assert "another directory than --onto" in capsys.readouterr().err


def test_out_within_a_store_or_at_a_url_is_refused(store, tmp_path, monkeypatch, capsys):
    """Another store than the one read, too: making that one anew would remove the intervention."""
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.zarr"
    other.mkdir()
    shutil.copy(store / "zarr.json", other)
    (tmp_path / "link").symlink_to(other)
    for out in (store, store / "aura", other, other / "deep" / "aura", tmp_path / "link" / "aura"):
        assert fit(store, out, "aura") == 2
        assert "--out: expected a directory outside any store" in capsys.readouterr().err
    assert fit(store, f"file://{tmp_path}/aura", "aura") == 2
    assert "--out: expected a local directory, got the URL" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "other.zarr"]
    assert [p.name for p in other.iterdir()] == ["zarr.json"]


def test_resumed_under_another_intervention_or_strength_is_refused(
    sequential, tiny_dir, sentences_csv, tmp_path, capsys
):
    same = ["--modules", LAST, "*.1.mlp.up_proj"]
    again = lambda *more: collect(tiny_dir("llama"), sentences_csv, sequential / "store.zarr", *same, *more)  # noqa: E731
    assert again("--intervention", str(sequential / "first"), "--strength", "0.5") == 0
    assert again("--intervention", str(sequential / "first")) == 2
    assert "under another intervention strength: expected 0.5, got 1.0" in capsys.readouterr().err
    assert again() == 2
    assert "under another intervention" in capsys.readouterr().err
    shutil.copytree(sequential / "first", tmp_path / "moved")
    assert again("--intervention", str(tmp_path / "moved"), "--strength", "0.5") == 0


def test_intervention_of_another_model_is_refused_before_collecting(store, tiny_dir, sentences_csv, tmp_path, capsys):
    assert fit(store, tmp_path / "aura", "aura") == 0
    under = ["--intervention", str(tmp_path / "aura")]
    assert collect(tiny_dir("mistral"), sentences_csv, tmp_path / "s.zarr", *under) == 2
    assert "was made for" in capsys.readouterr().err
    assert not (tmp_path / "s.zarr").exists()


@pytest.fixture
def nudge(monkeypatch):
    """A trained method for one test: its module and this row are all that it takes."""
    row = FromModel(summary="one step", train="tests.interventions.trained:train", options={"step": 0.1, "top_k": None})
    monkeypatch.setitem(METHODS, "nudge", row)


def test_trained_method_is_a_module_and_a_row(nudge, store, tiny_dir, sentences_csv, tmp_path):
    from aura_dist.text.table import read_table
    from aura_dist.text.tokenizer import load_tokenizer

    assert fit(store, tmp_path / "out", "nudge", "--modules", "mlp", "--strength", 2) == 0
    assert fit(store, tmp_path / "aura", "aura") == 0
    made, aura = (Intervention.load(tmp_path / name) for name in ("out", "aura"))
    assert (len(made.sites), made.num_changed) == (9, made.num_neurons)
    assert {name: made.meta[name] for name in ("model", "data", "concept")} == {
        name: aura.meta[name] for name in ("model", "data", "concept")
    }
    assert made.meta["parameters"] == {"top_k": None, "strength": 2.0, "step": 0.1, "modules": ["mlp"]}
    samples = aura_dist.open_store(store)["samples"]
    row = int(samples["row"].values[samples["label"].values[:, 0] == 1][0])
    text = read_table(sentences_csv, ["text"]).columns["text"][row]
    ids = load_tokenizer(str(tiny_dir("llama")))(text, return_tensors="pt")["input_ids"]
    model = tiny_causal("llama")
    with torch.no_grad():
        before = model(input_ids=ids, labels=ids).loss
        with aura_dist.intervene(model, made):
            assert model(input_ids=ids, labels=ids).loss > before, "the text is less likely"


def test_trained_method_refuses_what_it_does_not_read(nudge, store, tmp_path, capsys):
    assert fit(store, tmp_path / "out", "nudge", "--max-q", 0.1) == 2
    takers = "aura or damp or det0 or mean-act or linear-act or pid-act"
    assert f"--max-q: expected it with --method {takers} alone, got it with nudge; leave" in capsys.readouterr().err
    assert (
        main(["fit", "--store", str(store), "--concept", "x", "--method", "nudge", "--out", str(tmp_path / "o")]) == 2
    )
    assert "--concept: expected one of toxic, got 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "key", "message"),
    [
        ("data", "token_ids", "expected the texts that the store was"),
        ("model", "fingerprint", "expected the weights that"),
    ],
)
def test_trained_method_refuses_a_changed_model_or_text(part, key, message, nudge, store, tmp_path, capsys):
    copy = shutil.copytree(store, tmp_path / "store.zarr")
    document = json.loads((copy / "zarr.json").read_text())
    document["attributes"][part][key] = "0" * 64
    (copy / "zarr.json").write_text(json.dumps(document))
    assert fit(copy, tmp_path / "out", "nudge") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0, 1, 30])
def test_trained_method_refuses_a_file_that_has_lost_rows(kept, nudge, store, sentences_csv, tmp_path, capsys):
    copy, data = shutil.copytree(store, tmp_path / "store.zarr"), tmp_path / "short.csv"
    data.write_text("".join(Path(sentences_csv).read_text().splitlines(keepends=True)[: 1 + kept]))
    document = json.loads((copy / "zarr.json").read_text())
    document["attributes"]["data"]["path"] = str(data)
    (copy / "zarr.json").write_text(json.dumps(document))
    assert fit(copy, tmp_path / "out", "nudge") == 2
    assert f"data {str(data)!r}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_empty_out_is_refused(capsys):
    assert fit("store.zarr", "", "aura") == 2
    assert "--out: expected the directory to write the intervention to, got ''" in capsys.readouterr().err


def test_trained_method_runs_the_model_under_the_earlier_intervention(nudge, sequential, tmp_path):
    collected = sequential / "store.zarr"
    assert fit(collected, tmp_path / "onto", "nudge", "--modules", LAST, "--onto", sequential / "first") == 0
    assert fit(collected, tmp_path / "alone", "nudge", "--modules", LAST) == 0
    onto, alone, first = (Intervention.load(p) for p in (tmp_path / "onto", tmp_path / "alone", sequential / "first"))
    assert onto.sites == [FIRST, LAST]
    assert not np.allclose(onto.shift[LAST], (alone @ first.at_strength(0.5)).shift[LAST], rtol=1e-3)


@pytest.mark.realmodel
def test_alpha_on_gemma_270m_is_that_of_scikit_learn(gemma_dir, sentences_csv, tmp_path):
    from sklearn.metrics import roc_auc_score

    modules = ["--modules", "model.layers.0.mlp.*", "model.layers.1.mlp.down_proj"]
    assert collect(gemma_dir, sentences_csv, tmp_path / "store.zarr", *modules) == 0
    assert main(["score", "--store", str(tmp_path / "store.zarr")]) == 0
    assert fit(tmp_path / "store.zarr", tmp_path / "aura", "aura") == 0
    labels = np.repeat([True, False], [30, 40])
    for site, scale in Intervention.load(tmp_path / "aura").scale.items():
        responses = np.concatenate(pooled(tmp_path / "store.zarr", site, "max"))
        auroc = np.array([roc_auc_score(labels, column) for column in responses.T])
        np.testing.assert_allclose(scale, np.where(auroc > 0.5, 1 - 2 * (auroc - 0.5), 1), rtol=0, atol=1e-7)
    for k in (1, 7, 100):
        assert fit(tmp_path / "store.zarr", tmp_path / str(k), "det0", "--top-k", k) == 0
        assert Intervention.load(tmp_path / str(k)).num_changed == k
