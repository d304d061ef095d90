"""lineas: its maps are those that its loss asks for, and an interrupted training goes on as if it had not been."""

import re

import numpy as np
import pytest
import torch

import aura_dist
from aura_dist.cli import main
from aura_dist.errors import RunInterruptedError
from aura_dist.interventions import lineas
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.methods import METHODS
from aura_dist.text.table import read_table
from aura_dist.text.tokenizer import load_tokenizer
from tests.models import tiny_causal

SITES = ("model.layers.0.mlp.up_proj", "model.layers.1.input_layernorm", "model.layers.2")
NUM_TEXTS = 8


@pytest.fixture(scope="module")
def store(tiny_dir, sentences_csv, tmp_path_factory):
    """A linear layer, a norm and a residual site; lineas needs no pooling and no scores of it."""
    place = tmp_path_factory.mktemp("lineas") / "store.zarr"
    words = ["collect", "--model", str(tiny_dir("llama")), "--data", sentences_csv, "--concepts", "toxic"]
    words += ["--num-positive", "12", "--num-negative", "14", "--modules", *SITES, "--store", str(place)]
    assert main(words) == 0
    return place


def fit(store, out, *more):
    words = ["fit", "--store", str(store), "--concept", "toxic", "--method", "lineas", "--out", str(out)]
    return main([*words, "--num-texts", str(NUM_TEXTS), *map(str, more)])


def test_the_loss_falls_and_no_steps_are_the_identity(store, tmp_path, capsys):
    assert fit(store, tmp_path / "out", "--num-steps", 40) == 0
    shown = capsys.readouterr().err
    losses = [float(found[1]) for found in re.finditer(r"mean squared distance ([0-9.]+)", shown)]
    assert len(losses) >= 10
    assert losses[-1] < 0.7 * losses[0]
    made = Intervention.load(tmp_path / "out")
    assert made.sites == list(SITES)
    assert made.num_changed > 0.9 * made.num_neurons
    assert not (tmp_path / ".out.unfinished").exists()
    assert fit(store, tmp_path / "none", "--num-steps", 0) == 0
    assert Intervention.load(tmp_path / "none").num_changed == 0


def test_one_step_is_a_gradient_step_by_hand(store, tiny_dir, sentences_csv, tmp_path):
    """Of one map in plain torch, with the texts that the seed draws."""
    site = SITES[0]
    assert fit(store, tmp_path / "out", "--modules", site, "--num-steps", 1, "--learning-rate", 0.5) == 0
    made = Intervention.load(tmp_path / "out")
    samples = aura_dist.open_store(store)["samples"]
    texts = read_table(sentences_csv, ["text"]).columns["text"]
    tokenizer, model = load_tokenizer(str(tiny_dir("llama"))), tiny_causal("llama")
    rng, means = np.random.default_rng(0), []
    seen = []
    model.get_submodule(site).register_forward_hook(lambda _m, _a, z: seen.append(z[0].detach()))
    for label in (1, 0):
        rows = np.flatnonzero(samples["label"].values[:, 0] == label)
        for row in samples["row"].values[np.sort(rng.choice(rows, NUM_TEXTS, replace=False))]:
            model(input_ids=tokenizer(texts[int(row)], return_tensors="pt")["input_ids"][:, :128])
        means.append(torch.stack([z.mean(dim=0) for z in seen]).double())
        seen.clear()
    source, target = means
    mean, spread = target.mean(dim=0), target.std(dim=0, correction=0)
    source, target = ((values - mean) / spread for values in (source, target))
    order, width = source.argsort(dim=0), source.shape[1]
    gaps = source.gather(0, order) - target.sort(dim=0).values
    u = -0.5 * (2 * gaps * source.gather(0, order)).mean(dim=0) / width
    c = -0.5 * (2 * gaps).mean(dim=0) / width
    np.testing.assert_allclose(made.scale[site], 1 + u, rtol=1e-4)
    np.testing.assert_allclose(made.shift[site], spread * c - u * mean, atol=1e-5)


def test_resumed_is_uninterrupted(store, tmp_path, monkeypatch):
    assert fit(store, tmp_path / "whole", "--num-steps", 12) == 0
    log = lineas._log

    def stops(step, num_steps, loss):
        log(step, num_steps, loss)
        if step == 6:
            raise RunInterruptedError("stopped", 15)

    monkeypatch.setattr(lineas, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(lineas, "_log", stops)
    assert fit(store, tmp_path / "parts", "--num-steps", 12) not in (0, 2)
    assert (tmp_path / ".parts.unfinished").exists()
    assert not (tmp_path / "parts").exists()
    ran = []
    monkeypatch.setattr(lineas, "_log", lambda step, *_: ran.append(step))
    assert fit(store, tmp_path / "parts", "--num-steps", 12) == 0
    assert ran == list(range(6, 12))
    whole, parts = (Intervention.load(tmp_path / name) for name in ("whole", "parts"))
    assert parts.digest == whole.digest
    assert not (tmp_path / ".parts.unfinished").exists()


def test_a_state_of_other_settings_is_not_gone_on_with(store, tmp_path, monkeypatch, capsys):
    (tmp_path / ".out.unfinished").write_text("no state")
    assert fit(store, tmp_path / "out", "--num-steps", 1) == 2
    assert "is no state of a training" in capsys.readouterr().err
    (tmp_path / ".out.unfinished").unlink()
    monkeypatch.setattr(lineas, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(lineas._State, "remove", lambda self: None)
    assert fit(store, tmp_path / "out", "--num-steps", 3) == 0
    ran = []
    monkeypatch.setattr(lineas, "_log", lambda step, *_: ran.append(step))
    assert fit(store, tmp_path / "out", "--num-steps", 3, "--training-seed", 1) == 0
    assert ran == [0, 1, 2]


def test_penalties_leave_units_and_modules_unmoved(store, tmp_path):
    steps = ["--num-steps", 10]
    assert fit(store, tmp_path / "l1", *steps, "--l1", 0.01) == 0
    units = Intervention.load(tmp_path / "l1")
    assert 0 < units.num_changed < 0.9 * units.num_neurons
    assert fit(store, tmp_path / "group", *steps, "--group-lasso", 0.5) == 0
    assert Intervention.load(tmp_path / "group").num_changed == 0


def test_the_maps_by_hand_give_the_same_logits(store, tiny_dir, tmp_path):
    modules = ["--modules", SITES[0]]
    assert fit(store, tmp_path / "out", "--num-steps", 5, *modules) == 0
    made, model, ids = Intervention.load(tmp_path / "out"), tiny_causal("llama"), torch.arange(5, 29).reshape(2, 12)
    with torch.no_grad():
        with aura_dist.intervene(model, made):
            ours = model(input_ids=ids).logits
        scale, shift = torch.tensor(made.scale[SITES[0]]), torch.tensor(made.shift[SITES[0]])
        model.get_submodule(SITES[0]).register_forward_hook(lambda _m, _a, z: z * scale + shift)
        torch.testing.assert_close(model(input_ids=ids).logits, ours, rtol=1e-5, atol=1e-5)


def test_experts_learn_too(tiny_dir, sentences_csv, tmp_path, capsys):
    words = ["collect", "--model", str(tiny_dir("qwen3-moe")), "--data", sentences_csv, "--concepts", "toxic"]
    words += ["--num-positive", "9", "--num-negative", "9", "--modules", "*.1.mlp.experts", "*.2.mlp.experts"]
    assert main([*words, "--store", str(tmp_path / "store.zarr")]) == 0
    capsys.readouterr()
    assert fit(tmp_path / "store.zarr", tmp_path / "out", "--num-steps", 10, "--learning-rate", 1) == 0
    losses = [float(found[1]) for found in re.finditer(r"mean squared distance ([0-9.]+)", capsys.readouterr().err)]
    assert losses[-1] < losses[0]
    assert Intervention.load(tmp_path / "out").num_changed > 0


def test_odd_input_is_refused(store, tmp_path, capsys):
    assert (
        main(["fit", "--store", str(store), "--concept", "toxic", "--method", "lineas", "--out", str(tmp_path / "o")])
        == 2
    )
    assert "--num-texts: expected at most 12, the texts with the concept, got 32" in capsys.readouterr().err
    assert fit(store, tmp_path / "o", "--top-k", 3) == 2
    assert "--top-k: expected it with" in capsys.readouterr().err
    assert fit(store, tmp_path / "o", "--num-steps", 20, "--learning-rate", 1e9) == 2
    assert "expected a finite loss" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert METHODS["lineas"].options["num_texts"] == 32
