"""fit --gate end to end: the regression, thresholds of single tokens, controls, and what is refused."""

import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM

import aura_dist
from aura_dist.cli import main
from aura_dist.errors import ConfigError, StoreError
from aura_dist.interventions import gate_fitting
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.gates import Gate, settle_gate, settled
from aura_dist.interventions.separation import separate
from aura_dist.sites.site import Site
from aura_dist.text.table import read_table
from aura_dist.text.tokenizer import load_tokenizer
from tests.distributed.launch import run_ranks
from tests.models import tiny_causal

SITE = "model.layers.1.mlp.up_proj"
MODULES = ("*.mlp.up_proj", "*.1.input_layernorm")


@pytest.fixture(scope="module")
def place(tiny_dir, sentences_csv, tmp_path_factory):
    """A store with the moments of tokens that was scored, one of other texts (`control`), and one that lacks them."""
    place = tmp_path_factory.mktemp("gates")
    collect = ["collect", "--model", str(tiny_dir("llama")), "--data", sentences_csv, "--concepts", "toxic"]
    collect += ["--tokens-per-batch", "512", "--modules", *MODULES]
    moments = ["--pooling", "max", "mean", "mean_square", "--skip-first-tokens", "1"]
    some = ["--num-positive", "30", "--num-negative", "40"]
    assert main([*collect, *some, *moments, "--store", str(place / "store.zarr")]) == 0
    others = ["--num-positive", "12", "--num-negative", "20", "--seed", "3", *moments]
    assert main([*collect, *others, "--store", str(place / "control.zarr")]) == 0
    assert main([*collect, "--num-positive", "9", "--num-negative", "9", "--store", str(place / "bare.zarr")]) == 0
    assert main(["score", "--store", str(place / "store.zarr")]) == 0
    return place


def fit(place, out, *more, method="mean-act", store="store.zarr"):
    words = ["fit", "--store", str(place / store), "--concept", "toxic", "--method", method, "--out", str(out)]
    if "tokens" in more and "--gate-min-accuracy" not in more:
        more += ("--gate-min-accuracy", 0)  # a random model's values tell hardly anything apart
    return main([*words, *map(str, more)])


def responses(place, site, pooling, store="store.zarr"):
    view = aura_dist.open_store(place / store)
    return view["activations"][site][pooling].values, view["samples"]["label"].values[:, 0] == 1


def separated(rng, num_rows, width):
    is_positive = rng.random(num_rows) < 0.3
    values = rng.normal(size=(num_rows, width)) * rng.uniform(0.1, 10, width) + rng.normal(size=width) * 5
    values[:, : width // 4] += is_positive[:, None] * 0.5 * values.std(axis=0)[: width // 4]
    values[:, -1] = 3.0  # constant
    return values.astype(np.float32), is_positive


@pytest.mark.parametrize("width", [24, 300])
def test_the_regression_is_scikit_learns_on_standardised_units(width):
    """Wider than there are texts, too, where it runs in the texts' span."""
    values, is_positive = separated(np.random.default_rng(0), 120, width)
    found = separate(values, is_positive)
    spread = values.astype(np.float64).std(axis=0)
    standard = (values - values.mean(axis=0, dtype=np.float64)) / np.where(spread > 1e-9, spread, np.inf)
    plain = LogisticRegression(C=found.inverse_strength, class_weight="balanced", tol=1e-9, max_iter=10_000)
    expected = plain.fit(standard, is_positive).decision_function(standard)
    gate = found.gate.values(values)[:, 0]
    np.testing.assert_allclose(gate, 1 / (1 + np.exp(-expected)), atol=2e-3)
    assert found.gate.parts["weight"][-1] == 0
    assert 0.6 < found.accuracy <= 1
    right = (gate[is_positive] > 0.5).mean() + (gate[~is_positive] < 0.5).mean()
    assert found.accuracy <= right / 2 + 0.02, "held-out texts are no easier than those of the fit"


def test_texts_that_nothing_separates_are_told_as_well_as_by_chance():
    rng = np.random.default_rng(1)
    found = separate(rng.normal(size=(200, 30)).astype(np.float32), np.arange(200) % 4 == 0)
    assert 0.35 < found.accuracy < 0.65
    assert found.inverse_strength <= 1e-3
    values, is_positive = separated(rng, 50, 12)
    values[3, 4] = np.inf
    assert separate(values, is_positive) is None
    assert separate(np.full((50, 12), 2.5, np.float32), is_positive) is None
    assert separate(np.zeros((50, 80), np.float32), is_positive) is None, "more units than texts"


@pytest.mark.parametrize(("num_rows", "width"), [(400, 100), (100, 400), (60, 9000)])
def test_a_regression_stays_within_the_bytes_of_the_plan(num_rows, width):
    values, is_positive = separated(np.random.default_rng(2), num_rows, width)
    separate(values[:20, :8], is_positive[:20])  # imports
    tracemalloc.start()
    try:
        separate(values.copy(), is_positive)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    site = Site("mlp.up_proj", "mlp", 0, width)
    assert peak <= gate_fitting.fitting_bytes([site], ["mean"], num_rows)["tokens"] <= 5 * peak


def test_the_gate_of_tokens_is_the_regression_of_the_stored_means(place, tmp_path):
    assert fit(place, tmp_path / "out", "--gate", "tokens", "--gate-threshold", 0.25, "--gate-sharpness", 2) == 0
    made = Intervention.load(tmp_path / "out")
    assert fit(place, tmp_path / "plain") == 0
    plain = Intervention.load(tmp_path / "plain")
    assert made.sites == list(made.gate) == plain.sites
    for site in made.sites:
        np.testing.assert_array_equal(made.shift[site], plain.shift[site])
        found = separate(*responses(place, site, "mean"))
        expected = found.gate.moved(0.25, 2.0)
        for name, values in expected.parts.items():
            np.testing.assert_allclose(made.gate[site].parts[name], values, rtol=1e-5, atol=1e-7)
        assert made.meta["gate"]["sites"][site] == {
            "accuracy": found.accuracy, "inverse_strength": found.inverse_strength, "threshold": 0.25, "sharpness": 2.0,
        }  # fmt: skip
    parameters = made.meta["parameters"]
    assert (parameters["gate"], parameters["gate_threshold"], parameters["gate_sharpness"]) == ("tokens", 0.25, 2.0)
    assert made.meta["store_digest"] != plain.meta["store_digest"]


def test_the_gate_of_a_store_of_two_ranks_is_that_of_responses_in_memory(place, tiny_dir, sentences_csv, tmp_path):
    words = ["collect", "--model", tiny_dir("llama"), "--data", sentences_csv, "--concepts", "toxic", "--modules", SITE]
    words += ["--num-positive", "30", "--num-negative", "40", "--pooling", "mean", "--skip-first-tokens", "1"]
    run_ranks(2, [str(w) for w in (*words, "--tokens-per-batch", "256", "--store", tmp_path / "store.zarr")])
    assert (
        main(["score", "--store", str(tmp_path / "store.zarr"), "--statistics", "mean_positive", "mean_negative"]) == 0
    )
    assert fit(tmp_path, tmp_path / "out", "--gate", "tokens", "--gate-threshold", 0) == 0
    samples = aura_dist.open_store(tmp_path / "store.zarr")["samples"]
    texts, means = read_table(sentences_csv, ["text"]).columns["text"], []
    tokenizer, model = load_tokenizer(str(tiny_dir("llama"))), tiny_causal("llama")
    model.get_submodule(SITE).register_forward_hook(lambda _m, _a, z: means.append(z[0, 1:].mean(0).numpy()))
    for row in samples["row"].values:
        with torch.no_grad():
            model(input_ids=tokenizer(texts[int(row)], return_tensors="pt")["input_ids"][:, :128])
    expected = separate(np.stack(means), samples["label"].values[:, 0] == 1).gate.moved(0.0, 1.0)
    made = Intervention.load(tmp_path / "out").gate[SITE]
    for name, values in expected.parts.items():
        np.testing.assert_allclose(made.parts[name], values, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def by_tokens(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens") / "out"
    assert fit(place, out, "--gate", "tokens", "--control", place / "control.zarr") == 0
    return out


def logits_of_tokens(place, tiny, sentences_csv, store, gate, *, negatives):
    """The gate's logit at every counted token of the texts, by plain hooks."""
    view = aura_dist.open_store(place / store)
    keep = view["samples"]["label"].values[:, 0] == 0 if negatives else slice(None)
    texts, found = read_table(sentences_csv, ["text"]).columns["text"], []
    tokenizer, model = load_tokenizer(str(tiny)), tiny_causal("llama")
    weight, bias = (torch.tensor(gate.parts[name]) for name in ("weight", "bias"))
    model.get_submodule(SITE).register_forward_hook(lambda _m, _a, z: found.append((z @ weight + bias)[0, 1:].numpy()))
    for row in view["samples"]["row"].values[keep]:
        with torch.no_grad():
            model(input_ids=tokenizer(texts[int(row)], return_tensors="pt")["input_ids"][:, :128])
    return np.concatenate(found)


@pytest.mark.parametrize("controlled", [False, True])
def test_one_token_in_a_hundred_passes(controlled, place, by_tokens, tiny_dir, sentences_csv, tmp_path):
    """Of control texts, else of negatives."""
    out, store, rule = by_tokens, "control.zarr", "of the control texts"
    if not controlled:
        out, store, rule = tmp_path / "out", "store.zarr", "without the concept"
        assert fit(place, out, "--gate", "tokens") == 0
    made = Intervention.load(out)
    assert made.meta["gate"]["threshold"] == f"1% of tokens {rule}"
    logits = logits_of_tokens(place, tiny_dir("llama"), sentences_csv, store, made.gate[SITE], negatives=not controlled)
    allowed = int(0.01 * len(logits))
    assert allowed >= 5
    assert allowed - 1 <= (logits > 1e-5).sum() <= allowed, "the largest that may not pass is at the threshold"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_tokens_give_the_threshold_and_no_model_runs(dtype, tiny_dir, sentences_csv, tmp_path, monkeypatch):
    """Of many tokens of each store, some texts are read; special tokens and first ones do not count."""
    from aura_dist.interventions import token_thresholds

    monkeypatch.setattr(token_thresholds, "ENOUGH_TOKENS", 500)
    words = ["collect", "--model", str(tiny_dir("llama")), "--data", sentences_csv, "--concepts", "toxic"]
    words += ["--dtype", dtype, "--modules", *MODULES, "--num-positive", "40", "--num-negative", "60"]
    words += ["--skip-first-tokens", "1", "--skip-special-tokens"]
    words += ["--tokens-per-batch", "512", "--pooling", "max", "mean"]
    made = {}
    for name in ("means", "tokens"):
        assert main([*words, *(["tokens"] if name == "tokens" else []), "--store", str(tmp_path / name)]) == 0
        assert main(["score", "--store", str(tmp_path / name)]) == 0
        if name == "tokens":
            monkeypatch.setattr(token_thresholds, "as_collected", None)
        assert fit(tmp_path, tmp_path / f"{name}-out", "--gate", "tokens", store=name) == 0
        made[name] = Intervention.load(tmp_path / f"{name}-out").meta["gate"]
    plain, kept = (gate.pop("sites") for gate in (made["means"], made["tokens"]))
    assert made["tokens"] == made["means"]
    assert kept.keys() == plain.keys()
    thresholds = [about["threshold"] for about in kept.values()]
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    assert thresholds == pytest.approx([about["threshold"] for about in plain.values()], abs=tolerance)
    assert len(set(thresholds)) == len(thresholds)


def test_damaged_tokens_are_no_threshold(tiny_dir, sentences_csv, tmp_path, capsys):
    words = ["collect", "--model", str(tiny_dir("llama")), "--data", sentences_csv, "--concepts", "toxic"]
    words += ["--modules", SITE, "--num-positive", "20", "--num-negative", "20", "--pooling", "max", "mean", "tokens"]
    assert main([*words, "--store", str(tmp_path / "store")]) == 0
    assert main(["score", "--store", str(tmp_path / "store")]) == 0
    shards = [path for path in (tmp_path / "store" / "activations" / SITE / "tokens").rglob("c/*/*") if path.is_file()]
    for shard in shards:
        shard.unlink()
    capsys.readouterr()
    assert fit(tmp_path, tmp_path / "out", "--gate", "tokens", store="store") == 2
    shown = capsys.readouterr().err
    assert shards
    assert "missing" in shown
    assert "or give --gate-threshold" in shown


def test_control_texts_are_further_negatives(place, by_tokens):
    made = Intervention.load(by_tokens)
    ours, is_positive = responses(place, SITE, "mean")
    theirs, _ = responses(place, SITE, "mean", "control.zarr")
    found = separate(np.concatenate([ours, theirs]), np.concatenate([is_positive, np.zeros(len(theirs), bool)]))
    weight = found.gate.parts["weight"] * made.meta["gate"]["sites"][SITE]["sharpness"]
    np.testing.assert_allclose(made.gate[SITE].parts["weight"], weight, rtol=1e-5, atol=1e-7)
    control = made.meta["gate"]["control"]
    assert (control["store"], control["num_texts"]) == (str(place / "control.zarr"), len(theirs))
    assert control["data"]["token_ids"]


@pytest.mark.parametrize(("spread", "sharpness"), [(10.0, 1.0), (0.3, 16.0), (1e-3, 64.0)])
def test_tokens_that_must_stay_say_how_steep_a_gate_is(spread, sharpness):
    """The least that keeps their mean gate at 2 %, where 1 % may pass; the steepest where none does."""
    logits = np.random.default_rng(0).normal(-5, spread, 30_000).astype(np.float32)
    threshold, found, mean = settled(logits, 0.01)
    assert (logits > threshold).sum() == 300
    assert found == sharpness
    opened = Gate("tokens", {"weight": np.ones(1, np.float32), "bias": np.zeros(1, np.float32)}).moved(threshold, found)
    assert mean == pytest.approx(opened.values(logits[:, None]).mean(), rel=1e-5)
    assert (mean <= 0.02) == (sharpness < 64)


def test_a_gate_may_be_fitted_on_single_tokens(place, tiny_dir, sentences_csv, tmp_path, capsys):
    words = ["collect", "--model", tiny_dir("llama"), "--data", sentences_csv, "--concepts", "toxic", "--modules", SITE]
    words += ["--num-positive", 30, "--num-negative", 40, "--pooling", "mean", "drawn", "--store", tmp_path / "s"]
    assert main([str(word) for word in words]) == 0
    assert main(["score", "--store", str(tmp_path / "s"), "--pooling", "mean"]) == 0
    gate = ["--gate", "tokens", "--gate-threshold", 0, "--gate-pooling"]
    assert fit(tmp_path, tmp_path / "out", *gate, "drawn", store="s") == 0
    made = Intervention.load(tmp_path / "out")
    expected = separate(*responses(tmp_path, SITE, "drawn", "s")).gate.parts
    for name, values in made.gate[SITE].parts.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-7)
    assert made.meta["parameters"]["gate_pooling"] == "drawn"
    assert fit(tmp_path, tmp_path / "mean", *gate, "mean", store="s") == 0
    assert Intervention.load(tmp_path / "mean").digest != made.digest
    capsys.readouterr()
    assert fit(place, tmp_path / "no", *gate, "drawn") == 2
    assert "collect with `--pooling max mean mean_square drawn`" in capsys.readouterr().err
    assert fit(place, tmp_path / "no", "--gate", "tokens", "--gate-pooling", "absmax") == 2
    assert "expected one of mean, drawn, last, got 'absmax'" in capsys.readouterr().err
    assert fit(place, tmp_path / "no", "--gate", "units", "--gate-pooling", "mean") == 2
    assert "--gate-pooling: expected it with --gate tokens alone" in capsys.readouterr().err


def test_first_tokens_do_not_count_for_the_threshold(tiny_dir, sentences_csv, tmp_path):
    words = ["collect", "--model", tiny_dir("llama"), "--data", sentences_csv, "--concepts", "toxic", "--modules", SITE]
    words += ["--num-positive", 30, "--num-negative", 40, "--pooling", "mean", "--store", tmp_path / "store.zarr"]
    assert main([str(word) for word in words]) == 0
    assert main(["score", "--store", str(tmp_path / "store.zarr")]) == 0
    assert fit(tmp_path, tmp_path / "out", "--gate", "tokens") == 0
    made = Intervention.load(tmp_path / "out")
    place = tmp_path / "store.zarr"
    logits = logits_of_tokens(
        place.parent, tiny_dir("llama"), sentences_csv, place.name, made.gate[SITE], negatives=True
    )
    allowed = int(0.01 * len(logits))
    assert allowed - 1 <= (logits > 1e-5).sum() <= allowed


def test_any_number_of_workers_fits_the_same(place, tmp_path, monkeypatch):
    digests = []
    for cores in (1, 2):
        monkeypatch.setattr(gate_fitting, "available_cores", lambda cores=cores: cores)
        assert fit(place, tmp_path / str(cores), "--gate", "tokens", "--gate-threshold", 0) == 0
        digests.append(Intervention.load(tmp_path / str(cores)).digest)
    assert digests[0] == digests[1]


def test_modules_that_do_not_separate_are_not_moved(place, tmp_path, capsys):
    options = ["--gate", "tokens", "--gate-threshold", 0]
    assert fit(place, tmp_path / "all", *options) == 0
    whole = Intervention.load(tmp_path / "all")
    accuracy = {site: about["accuracy"] for site, about in whole.meta["gate"]["sites"].items()}
    least = sorted(accuracy.values())[len(accuracy) // 2]
    assert fit(place, tmp_path / "some", *options, "--gate-min-accuracy", least) == 0
    some = Intervention.load(tmp_path / "some")
    assert some.sites == [site for site in whole.sites if accuracy[site] >= least]
    assert 0 < len(some.sites) < len(whole.sites)
    assert fit(place, tmp_path / "none", *options, "--gate-min-accuracy", 1) == 2
    assert "--gate-min-accuracy: expected a share of held-out texts that some" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_modules_that_separate_no_better_than_chance_are_not_moved(place, tmp_path, monkeypatch, capsys):
    """Unless a limit is given: their gates would be half open at every token."""
    words = ["fit", "--store", str(place / "store.zarr"), "--concept", "toxic", "--method", "mean-act"]
    words += ["--gate", "tokens", "--gate-threshold", "0", "--out"]
    whole = gate_fitting.Texts.responses

    def responses(moved):
        def random(self, site, pooling):
            values = np.random.default_rng(len(site)).normal(size=whole(self, site, pooling).shape)
            return (values + 3 * (self.is_positive[:, None] & (site == moved))).astype(np.float32)

        return random

    monkeypatch.setattr(gate_fitting.Texts, "responses", responses(SITE))
    assert main([*words, str(tmp_path / "some")]) == 0
    made = Intervention.load(tmp_path / "some")
    assert made.sites == [SITE]
    assert (
        "3 of 4 modules tell held-out texts apart hardly better than by chance (under 0.68" in capsys.readouterr().err
    )
    monkeypatch.setattr(gate_fitting.Texts, "responses", responses("none"))
    assert main([*words, str(tmp_path / "none")]) == 2
    assert "three standard errors above chance, the best of 4 tells 0." in capsys.readouterr().err
    assert main([*words, str(tmp_path / "all"), "--gate-min-accuracy", "0"]) == 0
    assert len(Intervention.load(tmp_path / "all").sites) == 4


def test_numbers_that_float32_cannot_hold_are_refused(place, tmp_path, capsys):
    for gate, number in (("tokens", "1e39"), ("units", "-1e39")):
        assert fit(place, tmp_path / "out", "--gate", gate, "--gate-threshold", number) == 2
        assert "expected numbers with which a gate's logit fits into float32, got" in capsys.readouterr().err


def test_a_gate_that_is_lost_is_missed(place, by_tokens, tmp_path):
    """Its map would act at every token."""
    copy = Path(shutil.copytree(by_tokens, tmp_path / "copy"))
    tensors = load_file(copy / "intervention.safetensors")
    save_file({n: v for n, v in tensors.items() if SITE not in n or "gate" not in n}, copy / "intervention.safetensors")
    with pytest.raises(StoreError, match=f"says that maps have a gate, and .* has none for '{SITE}'"):
        Intervention.load(copy)
    made = Intervention.load(by_tokens)
    with pytest.raises(StoreError, match="says that maps have a gate"):
        Intervention(made.scale, made.shift, made.meta).save(tmp_path / "out")
    with pytest.raises(StoreError, match="has gate = 'tokens' where an object belongs"):
        Intervention(made.scale, made.shift, {"gate": "tokens"}).save(tmp_path / "out")
    assert fit(place, tmp_path / "units", "--gate", "units") == 0
    units = Intervention.load(tmp_path / "units")
    first, second = (Intervention({name: np.ones(3, np.float32)}, meta={"method": "none"}) for name in ("a", "b"))
    nested = first @ (second @ units)
    with pytest.raises(StoreError, match="says that maps have a gate"):
        Intervention(nested.scale, nested.shift, nested.meta).save(tmp_path / "out")
    other = Intervention({"lm_head": np.ones(3, np.float32)}, meta={"method": "none"})
    (made @ other).save(tmp_path / "both")
    both = Intervention.load(tmp_path / "both")
    assert list(both.gate) == list(made.gate)
    with pytest.raises(StoreError, match="says that maps have a gate"):
        Intervention(both.scale, both.shift, both.meta).save(tmp_path / "out")


def without(site_of, units, monkeypatch):
    """Responses of some units of some sites are NaN."""
    whole = gate_fitting.Texts.responses

    def responses(self, site, pooling):
        values = whole(self, site, pooling).copy()
        values[0, units if site_of(site) else []] = np.nan
        return values

    monkeypatch.setattr(gate_fitting.Texts, "responses", responses)


def test_units_without_finite_responses_are_left_as_they_are(place, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        without(lambda site: site == SITE, [2, 5], patch)
        assert fit(place, tmp_path / "some", "--gate", "units") == 0
    made = Intervention.load(tmp_path / "some")
    assert (made.shift[SITE][[2, 5]] == 0).all()
    assert made.shift[SITE].any()
    assert "2 neurons have NaN or infinite responses, so no gate" in capsys.readouterr().err
    for gate in ("units", "tokens"):
        with monkeypatch.context() as patch:
            without(lambda _site: True, slice(None), patch)
            assert fit(place, tmp_path / "none", "--gate", gate, "--gate-threshold", 0) == 2
        assert "--gate: expected a module with finite responses that differ, got none" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


def test_only_modules_that_change_get_gates(place, tmp_path):
    assert fit(place, tmp_path / "out", "--gate", "tokens", "--gate-threshold", 0, "--top-k", 2, method="det0") == 0
    made = Intervention.load(tmp_path / "out")
    assert 1 <= len(made.sites) <= 2
    assert made.num_changed == 2
    assert made.sites == list(made.gate)


def test_the_gate_of_units_is_of_single_tokens(place, tiny_dir, sentences_csv, tmp_path):
    assert fit(place, tmp_path / "out", "--gate", "units", method="linear-act") == 0
    gate = Intervention.load(tmp_path / "out").gate[SITE]
    view = aura_dist.open_store(place / "store.zarr")
    texts = read_table(sentences_csv, ["text"]).columns["text"]
    tokenizer, model, seen = load_tokenizer(str(tiny_dir("llama"))), tiny_causal("llama"), []
    model.get_submodule(SITE).register_forward_hook(lambda _m, _a, z: seen.append(z[0, 1:].numpy()))
    for row in view["samples"]["row"].values:
        with torch.no_grad():
            model(input_ids=tokenizer(texts[int(row)], return_tensors="pt")["input_ids"][:, :128])
    is_positive = view["samples"]["label"].values[:, 0] == 1
    with_concept, without = (
        np.concatenate([z for z, label in zip(seen, is_positive, strict=True) if label == of]) for of in (1, 0)
    )
    z = seen[0]
    densities = [np.exp(-0.5 * ((z - x.mean(0)) / x.std(0)) ** 2) / x.std(0) for x in (with_concept, without)]
    np.testing.assert_allclose(gate.values(z), densities[0] / sum(densities), atol=2e-3)


def test_a_gated_intervention_generates_and_is_collected_under(
    place, by_tokens, tiny_dir, sentences_csv, tmp_path, capsys
):
    model = ["--model", str(tiny_dir("llama")), "--intervention", str(by_tokens)]
    assert main(["generate", *model, "--prompt", "You are", "--max-new-tokens", "3"]) == 0
    assert "mean-act" in capsys.readouterr().out
    words = ["collect", *model, "--data", sentences_csv, "--concepts", "toxic", "--num-positive", "8"]
    words += ["--num-negative", "8", "--modules", SITE, "--store", str(tmp_path / "under.zarr")]
    assert main(words) == 0
    made = Intervention.load(by_tokens)
    assert aura_dist.open_store(tmp_path / "under.zarr").attrs["intervention"]["digest"] == made.digest
    assert main(["export", *model, "--out", str(tmp_path / "exported")]) == 2
    assert "a map with a gate of tokens cannot be folded into weights" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()
    out = tmp_path / "onto"
    assert fit(place, out, "--gate", "tokens", "--gate-threshold", 0, "--onto", by_tokens) == 2
    assert "expected maps without gates where two interventions act" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gate-threshold", 1], "--gate-threshold: expected it with --gate units or tokens alone, got it with none"),
        (["--control", "x"], "--control: expected it with --gate units or tokens alone, got it with none"),
        (["--gate", "units", "--gate-min-accuracy", 0.6], "--gate-min-accuracy: expected it with --gate tokens alone"),
        (["--gate", "tokens", "--gate-sharpness", 0], "--gate-sharpness: expected a number above 0"),
        (["--gate", "tokens", "--gate-threshold", "nan"], "--gate-threshold: expected a"),
        (["--gate", "texts"], "--gate: expected one of none, units, tokens, got 'texts'"),
        (["--gate", "tokens", "--control", "nowhere.zarr"], "expected a store that `collect` wrote"),
        (["--gate", "tokens", "--control", "STORE"], "expected another store than --store"),
        (
            ["--gate", "units", "--control", "BARE"],
            "expected a collection with --skip-first-tokens of --store (1), got 0",
        ),
    ],
)
def test_odd_options_are_refused(more, message, place, tmp_path, capsys):
    stores = {"STORE": place / "store.zarr", "BARE": place / "bare.zarr"}
    assert fit(place, tmp_path / "out", *(stores.get(word, word) for word in more)) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_stores_that_lack_what_a_gate_needs_are_refused(place, tmp_path, capsys):
    assert main(["score", "--store", str(place / "bare.zarr"), "--statistics", "auroc"]) == 0
    assert fit(place, tmp_path / "out", "--gate", "units", store="bare.zarr", method="aura") == 2
    assert "expected the pooling mean and mean_square in" in capsys.readouterr().err
    copy = shutil.copytree(place / "store.zarr", tmp_path / "store.zarr")
    document = json.loads((copy / "zarr.json").read_text())
    attributes = document["attributes"]
    for other, what in (
        ({"dtype": "bfloat16"}, "--dtype of --store (float32), got bfloat16"),
        ({"model": attributes["model"] | {"fingerprint": "0" * 64}}, "the model of --store"),
    ):
        (copy / "zarr.json").write_text(json.dumps(document | {"attributes": attributes | other}))
        assert fit(place, tmp_path / "out", "--gate", "tokens", "--control", copy) == 2
        assert f"expected a collection with {what}" in capsys.readouterr().err
    assert fit(tmp_path, tmp_path / "out", "--gate", "tokens") == 2
    assert "expected the weights that the store was collected from" in (shown := capsys.readouterr().err)
    assert "or give --gate-threshold" in shown
    sequential = ["fit", "--sequential", "--gate", "tokens", "--model", "x", "--data", "x", "--concept", "toxic"]
    assert main([*sequential, "--method", "mean-act", "--out", str(tmp_path / "o")]) == 2
    assert "--gate: expected it without --sequential" in capsys.readouterr().err


def test_with_a_threshold_nothing_imports_torch(place, tmp_path):
    words = ["fit", "--store", str(place / "store.zarr"), "--concept", "toxic", "--gate", "tokens"]
    words += [
        "--gate-threshold",
        "0",
        "--gate-min-accuracy",
        "0",
        "--method",
        "mean-act",
        "--out",
        str(tmp_path / "out"),
    ]
    code = f"import sys; from aura_dist.cli import main; main({words!r}); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert shown.stdout.strip() == "False"
    assert (tmp_path / "out" / "intervention.json").exists()


def test_options_of_gates_are_settled():
    assert settle_gate("none", {"control": None}) is None
    found = settle_gate("tokens", {"gate_threshold": 0.0, "control": "c.zarr", "gate_min_accuracy": None})
    assert (found.kind, found.threshold, found.settled_sharpness, found.control) == ("tokens", 0.0, 1.0, "c.zarr")
    with pytest.raises(
        ConfigError, match="--gate-min-accuracy: expected it with --gate tokens alone, got it with units"
    ):
        settle_gate("units", {"gate_min_accuracy": 0.5})


def test_a_sweep_over_gates_drops_what_a_cells_gate_does_not_read():
    from aura_dist.sweep.stage_specs import STAGE_SPECS

    settle, varied = STAGE_SPECS["fit"].settle, {"gate", "gate_threshold"}
    assert "gate_threshold" in settle({"fit": {"gate": "none", "gate_threshold": 1}, "collect": {}}, varied)
    left = settle({"fit": {"gate": "units", "gate_threshold": 1}, "collect": {}}, varied)
    assert "gate_threshold" not in left
    assert "gate_min_accuracy" in left
    assert settle({"fit": {"gate": "none", "gate_threshold": 1}, "collect": {}}, {"top_k"}) == set(), "refused as usual"


def test_pid_act_folds_into_biases(place, tiny_dir, tmp_path):
    assert fit(place, tmp_path / "pid", "--ki", 0.2, "--kd", 0.1, "--modules", "*.up_proj", method="pid-act") == 0
    model = str(tiny_dir("llama"))
    words = ["--model", model, "--intervention", str(tmp_path / "pid"), "--strength", "0.7"]
    assert main(["export", *words, "--out", str(tmp_path / "exported")]) == 0
    ids = torch.arange(5, 29).reshape(2, 12)
    hooked, exported, plain = (AutoModelForCausalLM.from_pretrained(m) for m in (model, tmp_path / "exported", model))
    with torch.no_grad(), aura_dist.intervene(hooked, Intervention.load(tmp_path / "pid"), 0.7):
        expected = hooked(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(exported(input_ids=ids).logits, expected, rtol=0, atol=1e-5 * float(expected.max()))
        assert (plain(input_ids=ids).logits - expected).abs().max() > 1e-2


def test_pid_act_sums_over_the_layers_before(place, tmp_path):
    assert fit(place, tmp_path / "out", "--kp", 0.7, "--ki", 0.2, "--kd", -0.3, method="pid-act") == 0
    assert fit(place, tmp_path / "mean") == 0
    assert fit(place, tmp_path / "p", "--ki", 0, "--kd", 0, method="pid-act") == 0
    made, mean, alone = (Intervention.load(tmp_path / name) for name in ("out", "mean", "p"))
    assert alone.digest == mean.digest
    errors = [mean.shift[f"model.layers.{layer}.mlp.up_proj"] for layer in range(3)]
    for layer, error in enumerate(errors):
        before = sum(errors[:layer], np.zeros_like(error))
        change = error - errors[layer - 1] if layer else 0
        expected = 0.7 * error + 0.2 * before - 0.3 * change
        np.testing.assert_allclose(made.shift[f"model.layers.{layer}.mlp.up_proj"], expected, rtol=1e-4, atol=1e-6)
    alone, norm = "model.layers.1.input_layernorm", mean.shift["model.layers.1.input_layernorm"]
    np.testing.assert_allclose(made.shift[alone], 0.7 * norm, rtol=1e-4, atol=1e-6)
    parameters = made.meta["parameters"]
    assert (parameters["kp"], parameters["ki"], parameters["kd"]) == (0.7, 0.2, -0.3)


def test_of_many_tokens_some_texts_are_read(place, monkeypatch, caplog, tmp_path):
    """Every so many, in the order of their lengths."""
    from aura_dist.interventions import token_thresholds

    read = []
    plain = token_thresholds.TokenizedTexts.batch

    def batch(tokens, rows):
        read.append([list(ids) for ids in tokens.ids])
        return plain(tokens, rows)

    monkeypatch.setattr(token_thresholds.TokenizedTexts, "batch", batch)
    assert fit(place, tmp_path / "all", "--gate", "tokens") == 0
    every = read[0]
    num_tokens = sum(map(len, every))
    monkeypatch.setattr(token_thresholds, "ENOUGH_TOKENS", num_tokens // 3)
    read.clear()
    assert fit(place, tmp_path / "some", "--gate", "tokens") == 0
    assert read[0] == every[::3]
    thresholds = [Intervention.load(tmp_path / name).gate[SITE].parts["bias"] for name in ("all", "some")]
    assert np.any(thresholds[0] != thresholds[1])
