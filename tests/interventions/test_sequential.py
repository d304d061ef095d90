"""`fit --sequential` gives, in one pass, the maps of one collection a layer, each under the maps before it."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import aura_dist
from aura_dist.cli import main
from aura_dist.config.verbs import CollectConfig, FitConfig, ScoreConfig
from aura_dist.errors import ConfigError, RunInterruptedError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.methods import METHODS, FromModel
from aura_dist.models.layerwise import Layerwise
from aura_dist.stages import collect, fit, score
from aura_dist.store.access import open_group
from tests.models import COMMON, tiny_causal, tiny_tokenizer

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


def test_an_earlier_intervention_may_change_later_layers(tiny_dir, sentences_csv, tmp_path):
    """Layers after the last fitted one are not even read."""
    half = np.full(80, 0.5, np.float32)
    onto = str(tmp_path / "onto")
    Intervention({f"model.layers.{layer}.mlp.up_proj": half for layer in range(3)}).save(onto)
    names, store = ["model.layers.1.mlp.*"], str(tmp_path / "store")
    model = {"model": str(tiny_dir("llama")), "data": sentences_csv, "modules": names, **DATA}
    ours = aura_dist.fit(concept="toxic", sequential=True, onto=onto, **model)
    collect.run(CollectConfig(store=store, concepts=["toxic"], intervention=onto, **model))
    score.run(ScoreConfig(store=store))
    assert_close(ours, fit.fit(FitConfig(store=store, concept="toxic", onto=onto, out="")))


def save_dbrx(directory):
    """A mixture whose experts are not captured."""
    config = hf.DbrxConfig(
        **COMMON, d_model=32, n_heads=4, n_layers=1, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
    )  # fmt: skip
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def test_responses_are_described_as_those_of_a_store(sentences_csv, tmp_path, monkeypatch):
    settings = {"model": save_dbrx(tmp_path / "model"), "data": sentences_csv, "modules": ["attention"], **DATA}
    collect.run(CollectConfig(store=str(tmp_path / "store"), concepts=["toxic"], **settings))
    specs = []
    fitted = lambda model, executor, spec, *more: (specs.append(spec), Intervention({}))[1]  # noqa: E731
    monkeypatch.setattr("aura_dist.stages.sequential.fit_by_layer", fitted)
    aura_dist.fit(concept="toxic", sequential=True, **settings)
    found, recorded = specs[0].to_attributes(), open_group(str(tmp_path / "store")).attrs
    assert found["uncaptured"]
    assert found == {name: recorded[name] for name in found}


def test_a_signal_ends_it_and_nothing_is_written(tiny_dir, sentences_csv, tmp_path, monkeypatch):
    monkeypatch.setattr(Layerwise, "run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunInterruptedError, match="SIGTERM received; nothing is written: run the same command again"):
        at_once(tiny_dir("llama"), sentences_csv, ["model.layers.{}.mlp.*"], "aura", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_device_without_room_is_an_error_of_one_line(tiny_dir, sentences_csv, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Layerwise, "run", fails)
    assert command(tiny_dir("llama"), sentences_csv, tmp_path / "out", "--tokens-per-batch", 512) == 2
    assert "expected room for --tokens-per-batch 512; try --tokens-per-batch 256" in capsys.readouterr().err


def test_a_model_without_numbers_is_refused(tiny_dir, sentences_csv, tmp_path, capsys):
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].fill_(float("nan"))
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert command(tmp_path / "model", sentences_csv, tmp_path / "out") == 2
    assert "5 of 9 modules and 336 of 624 units have no finite value in any text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_refused_first(sentences_csv, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command("nowhere", sentences_csv, tmp_path / "file" / "out") == 2
    assert f"cannot be written, because '{tmp_path}/file' is a file" in capsys.readouterr().err


def test_an_intervention_of_another_model_is_named_by_its_flag(tiny_dir, sentences_csv, tmp_path, capsys):
    scale = {"model.layers.0.mlp.up_proj": np.zeros(80, np.float32)}
    Intervention(scale, meta={"model": {"name": "another", "fingerprint": "0" * 64}}).save(tmp_path / "another")
    assert command(tiny_dir("llama"), sentences_csv, tmp_path / "out", "--onto", tmp_path / "another") == 2
    assert f"--onto '{tmp_path}/another' was made for 'another'" in capsys.readouterr().err


def test_a_quoted_switch_of_a_file_is_read_as_it_says(tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text(f"fit: {{sequential: 'false', store: {tmp_path}/s.zarr, concept: toxic, out: o}}\n")
    assert main(["fit", "--config", str(file)]) == 2
    assert "expected a store that `collect` wrote, found none" in capsys.readouterr().err


def test_a_model_in_memory_is_refused_by_its_class():
    with pytest.raises(ConfigError, match=r"model: expected a name .* got LlamaForCausalLM$"):
        aura_dist.fit(concept="toxic", sequential=True, model=tiny_causal("llama"), data="comments.csv")


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
        (["--quantization", "quanto:int8"], "--quantization: expected it without --sequential"),
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
