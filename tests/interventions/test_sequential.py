"""`fit --sequential` gives, in one pass, the maps of one collection a layer, each under the maps before it."""

import numpy as np
import pytest

import aura_dist
from aura_dist.cli import main
from aura_dist.config.verbs import CollectConfig, FitConfig, ScoreConfig
from aura_dist.errors import ConfigError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.methods import METHODS, FromModel
from aura_dist.models.layerwise import Layerwise
from aura_dist.stages import collect, fit, score

pytestmark = pytest.mark.timeout(240)

DATA = {"num_positive": 25, "num_negative": 35, "tokens_per_batch": 256, "max_tokens": 32}


def one_by_one(model, data, place, modules, method, *, pooling, collected=None, **fitted):
    """A collection a layer: what `configs/sequential.sh` did. The {} in `modules` becomes the layer."""
    before, onto = {}, {}
    for layer in range(3):
        store, out = str(place / f"{layer}.zarr"), str(place / f"map-{layer}")
        names = [name.replace("{}", str(layer)) for name in modules]
        collect.run(
            CollectConfig(
                model=str(model), data=data, store=store, concepts=["toxic"], modules=names, pooling=[pooling], **DATA,
                **before, **(collected or {}),
            )
        )  # fmt: skip
        score.run(ScoreConfig(store=store))
        fit.run(FitConfig(store=store, concept="toxic", method=method, out=out, **onto, **fitted))
        before, onto = {"intervention": out}, {"onto": out}
    return Intervention.load(out)


def at_once(model, data, modules, method, **settings):
    names = [name.replace("{}", str(layer)) for layer in range(3) for name in modules]
    return aura_dist.fit(
        concept="toxic", method=method, sequential=True, model=model, data=data, modules=names, **{**DATA, **settings}
    )


def assert_close(ours, theirs):
    assert sorted(ours.sites) == sorted(theirs.sites)
    assert ours.num_changed == theirs.num_changed > 0
    for site in theirs.sites:
        for mine, other in zip(ours.map_of(site), theirs.map_of(site), strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5, err_msg=site)


CASES = {
    "linear-act": ("llama", ["model.layers.{}.*_layernorm"], "linear-act", "mean", {}, {}),
    "mean-act, strength, bfloat16": (
        "gemma3", ["model.layers.{}.mlp.*"], "mean-act", "mean", {"dtype": "bfloat16"}, {"strength": 0.5},
    ),
    "the best of each layer": (
        "qwen3-moe", ["model.layers.{}.self_attn.o_proj"], "damp", "max", {}, {"top_k": 5, "alpha": 0.25},
    ),
    "significant units": ("gpt2", ["transformer.h.{}.*.c_proj:input"], "aura", "max", {}, {"max_q": 0.9}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_maps_are_those_of_a_collection_a_layer(case, tiny_dir, sentences_csv, tmp_path, monkeypatch):
    model, modules, method, pooling, collected, fitted = CASES[case]
    theirs = one_by_one(
        tiny_dir(model), sentences_csv, tmp_path, modules, method, pooling=pooling, collected=collected, **fitted
    )
    runs, run = [], Layerwise.run
    monkeypatch.setattr(Layerwise, "run", lambda self, layer, key: (runs.append((layer, key)), run(self, layer, key)))
    ours = at_once(tiny_dir(model), sentences_csv, modules, method, **collected, **fitted)
    assert_close(ours, theirs)
    assert len(runs) == len(set(runs)), "each text goes through each layer once, beside the run for its responses"
    assert ours.meta["parameters"]["sequential"] is True
    composed = theirs.meta["composed"][0]
    for name in ("model", "data", "concept", "method"):
        assert ours.meta[name] == composed[name]


def command(model, data, out, *more):
    words = ["fit", "--sequential", "--model", model, "--data", data, "--concept", "toxic", "--out", out, *more]
    return main(list(map(str, words)))


def test_command_and_call_with_an_earlier_intervention(tiny_dir, sentences_csv, tmp_path):
    model, site = tiny_dir("llama"), "model.layers.0.mlp.up_proj"
    assert command(model, sentences_csv, tmp_path / "first", "--modules", site, "--strength", 0.5) == 0
    onto = ["--onto", tmp_path / "first", "--method", "mean-act", "--modules", "norm"]
    assert command(model, sentences_csv, tmp_path / "both", *onto) == 0
    same = {"model": model, "data": sentences_csv, "sequential": True, "method": "mean-act", "modules": ["norm"]}
    called = aura_dist.fit(concept="toxic", onto=tmp_path / "first", **same)
    written = Intervention.load(tmp_path / "both")
    assert written.digest == called.digest != aura_dist.fit(concept="toxic", **same).digest
    assert site in written.sites


def test_settings_of_a_file_come_from_the_section_of_collect(tiny_dir, sentences_csv, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(
        f"model: {tiny_dir('llama')}\nconcept: toxic\n"
        f"collect: {{data: {sentences_csv}, concepts: [toxic], pooling: [max, mean],"
        " num_positive: 20, strength: 0.1}\n"
        "fit: {method: linear-act, modules: [norm], sequential: true}\n"
    )
    assert main(["fit", "--config", str(file), "--out", str(tmp_path / "out")]) == 0
    made = Intervention.load(tmp_path / "out")
    assert made.meta["data"]["sampling"]["num_positive"] == 20
    assert (made.meta["parameters"]["pooling"], made.meta["parameters"]["strength"]) == ("mean", 1.0)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--store", "s.zarr"], "--store: expected it without --sequential, got it with"),
        (["--sharding", "replicate"], "--sharding: expected --sharding layers"),
        (["--wave-tokens", "5"], "--wave-tokens: expected --sharding layers with all texts in one wave"),
        (["--method", "nudge"], "--method nudge: expected one whose maps of a layer need that layer's responses alone"),
        (["--alpha", "0.1"], "--alpha: expected it with --method damp"),
        (["--top-k", "1000"], "--top-k: expected at most 208, the units of layer 0"),
        (["--modules", "nothing"], "matches no"),
        (["--out", "s3://bucket/out"], "--out: expected a local directory"),
    ],
)
def test_what_cannot_be_sequential_is_refused(more, error, tiny_dir, sentences_csv, tmp_path, monkeypatch, capsys):
    row = FromModel(summary="one step", train="tests.interventions.trained:train", options={"step": 0.1})
    monkeypatch.setitem(METHODS, "nudge", row)
    out = [] if more[0] == "--out" else ["--out", str(tmp_path / "out")]
    words = ["--model", str(tiny_dir("llama")), "--data", sentences_csv, "--concept", "toxic", *out, *more]
    assert main(["fit", "--sequential", *words]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_of_a_sequential_fit_are_refused_without_it(capsys):
    assert main(["fit", "--store", "s", "--concept", "toxic", "--out", "o", "--model", "m"]) == 2
    assert "--model: expected it with --sequential, got it without; leave it out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="data: expected it with sequential, got it without"):
        aura_dist.fit("s.zarr", "toxic", data="comments.csv")
    with pytest.raises(ConfigError, match="expected it with a model and its data, got it with a store"):
        FitConfig(store="s.zarr", concept="toxic", out="o", sequential=True)  # as a sweep makes it
