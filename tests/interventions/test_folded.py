"""A checkpoint says which interventions `export` folded into it, and refuses them."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

import aura_dist
from aura_dist.cli import main
from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.folded import folded_into
from aura_dist.models.fingerprints import FOLDED
from aura_dist.models.identity import fingerprint
from aura_dist.models.load import ModelSource
from tests.models import LLAMA_LIKE, save_tiny

SITES = {"llama": ("model.layers.1.mlp.up_proj", 80), "gpt2": ("transformer.h.1.mlp.c_fc", 192)}


def halves(name, seed):
    """An intervention without a model's fingerprint, so that names and widths alone decide where it fits."""
    site, width = SITES[name]
    scale = np.random.default_rng(seed).uniform(0, 1, width).astype(np.float32)
    return Intervention({site: scale}, meta={"method": f"random {seed}"})


def run(*arguments):
    return main([str(a) for a in arguments])


def export(model, intervention, out, strength=1):
    return run("export", "--model", model, "--intervention", intervention, "--out", out, "--strength", strength)


def of(directory):
    return fingerprint(ModelSource(str(directory), None, "float32"), AutoConfig.from_pretrained(directory))


@pytest.fixture(scope="module", params=SITES)
def exported(request, tmp_path_factory):
    """Directory with a model `m`, interventions `x` and `y`, and `e`, the model with `x` at half strength."""
    directory = tmp_path_factory.mktemp("exported")
    save_tiny(request.param, directory / "m")
    for seed, name in enumerate("xy"):
        halves(request.param, seed).save(directory / name)
    assert export(directory / "m", directory / "x", directory / "e", 0.5) == 0
    return directory


CARRIED = r"--intervention .*x' \(random 0, digest .*\): expected a model without it, got .* at strength 0\.5; leave"


def test_every_verb_refuses_what_the_model_carries(exported, sentences_csv, tmp_path, refused):
    what = ["--model", exported / "e", "--intervention", exported / "x"]
    refused(["generate", *what, "--prompt", "the cat"], CARRIED)
    refused(["evaluate", *what, "--perplexity-texts", sentences_csv, "--out", tmp_path / "r.json"], CARRIED)
    refused(["export", *what, "--out", tmp_path / "out"], CARRIED)
    refused(["collect", *what, "--data", sentences_csv, "--concepts", "toxic", "--store", tmp_path / "s.zarr"], CARRIED)
    assert not list(tmp_path.iterdir())


def test_a_model_in_memory_refuses_it_too(exported):
    x, y = (Intervention.load(exported / name) for name in "xy")
    model = AutoModelForCausalLM.from_pretrained(exported / "e")
    message = "expected a model without it, got one whose weights carry it"
    with pytest.raises(ModelError, match=message), aura_dist.intervene(model, x):
        pass
    with aura_dist.intervene(model, y), aura_dist.intervene(AutoModelForCausalLM.from_pretrained(exported / "m"), x):
        pass


def test_a_second_export_adds_to_the_record(exported, tmp_path, refused):
    assert export(exported / "e", exported / "y", tmp_path / "both", 2) == 0
    records = folded_into(AutoConfig.from_pretrained(tmp_path / "both"))
    digests = [Intervention.load(exported / name).digest for name in "xy"]
    assert [(r["digest"], r["method"], r["strength"]) for r in records] == [
        (digests[0], "random 0", 0.5), (digests[1], "random 1", 2),
    ]  # fmt: skip
    for name in "xy":
        refused(
            ["export", "--model", tmp_path / "both", "--intervention", exported / name, "--out", tmp_path / "o"],
            "expected a model without it",
        )
    assert json.loads((tmp_path / "both" / "aura_dist.json").read_text())[FOLDED] == records


def test_the_record_survives_transformers_and_is_no_part_of_the_identity(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported / "e").save_pretrained(tmp_path / "again")
    record = folded_into(AutoConfig.from_pretrained(tmp_path / "again"))
    assert record == folded_into(AutoConfig.from_pretrained(exported / "e")) != []
    shutil.copytree(exported / "e", tmp_path / "without")
    config = json.loads((exported / "e" / "config.json").read_text())
    assert config.pop(FOLDED) == record
    (tmp_path / "without" / "config.json").write_text(json.dumps(config))
    assert of(tmp_path / "without") == of(exported / "e") != of(exported / "m")


def test_an_export_of_an_earlier_version_is_known_by_its_description(exported, tmp_path, refused):
    shutil.copytree(exported / "e", tmp_path / "old")
    for file in ("config.json", "aura_dist.json"):
        document = json.loads((tmp_path / "old" / file).read_text())
        del document[FOLDED]
        (tmp_path / "old" / file).write_text(json.dumps(document))
    what = ["--model", tmp_path / "old", "--intervention", exported / "x"]
    refused(["generate", *what, "--prompt", "the cat"], CARRIED)
    assert export(tmp_path / "old", exported / "y", tmp_path / "both") == 0
    assert len(folded_into(AutoConfig.from_pretrained(tmp_path / "both"))) == 2


def test_nothing_is_recorded_at_strength_0(exported, tmp_path):
    assert export(exported / "m", exported / "x", tmp_path / "none", 0) == 0
    assert folded_into(AutoConfig.from_pretrained(tmp_path / "none"), str(tmp_path / "nowhere")) == []
    assert of(tmp_path / "none") == of(exported / "m")


@pytest.mark.parametrize("record", [3, "x", [], [1], [{"strength": 1}], {"digest": "x"}])
def test_a_record_that_no_export_wrote_is_left_out(record, exported):
    config = AutoConfig.from_pretrained(exported / "m")
    setattr(config, FOLDED, record)
    assert folded_into(config) == []


def test_the_record_is_in_the_language_models_part(tmp_path):
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config={**LLAMA_LIKE, "head_dim": 12}, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "m")
    site = next(n for n, _ in model.named_modules() if n.endswith("layers.1.mlp.up_proj"))
    Intervention({site: np.full(80, 0.5, np.float32)}).save(tmp_path / "x")
    assert export(tmp_path / "m", tmp_path / "x", tmp_path / "e") == 0
    assert len(AutoConfig.from_pretrained(tmp_path / "e").text_config.to_dict()[FOLDED]) == 1
    model, intervention = AutoModelForCausalLM.from_pretrained(tmp_path / "e"), Intervention.load(tmp_path / "x")
    with pytest.raises(ModelError, match="weights carry it"), aura_dist.intervene(model, intervention):
        pass
