"""What earlier versions wrote is accepted with a warning where their rule agrees, and refused where it does not."""

import json
import logging
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import aura_dist
from aura_dist.cli import main
from aura_dist.errors import InputError, StoreError
from aura_dist.evaluation.compare import against_plain
from aura_dist.evaluation.engines import InProcess
from aura_dist.evaluation.journal import fixing_settings
from aura_dist.evaluation.prompts import PromptFile, tokenize_prompts
from aura_dist.evaluation.sampling import Decoding
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.use import load_for_use
from aura_dist.models.fingerprints import RULE, comparable, is_earlier
from aura_dist.models.identity import earlier_fingerprint, fingerprint
from aura_dist.models.in_memory import InMemory
from aura_dist.models.load import ModelSource
from aura_dist.ranks.signals import StopFlag
from aura_dist.ranks.team import Team
from tests.models import save_tiny, tiny_causal, tiny_tokenizer

ARCHIVE = Path(__file__).parents[1] / "store" / "made_before.tar.gz"
COVERS_LESS = "fingerprint of the model is of an earlier version. It agrees, but"
UP = "model.layers.1.mlp.up_proj"


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.fixture
def before(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    save_tiny("llama", tmp_path / "tiny-llama")
    return tmp_path


def edit(model, at):
    """Change one value of a tensor; large tensors of a tiny model are shorter than the ends that were read."""
    weights = load_file(model / "model.safetensors")
    weights[f"{UP}.weight"].view(-1)[at] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def collect(before):
    return run(
        "collect", "--model", before / "tiny-llama", "--data", before / "labelled.csv", "--store",
        before / "run" / "store.zarr", "--concepts", "toxic", "question", "--pooling", "max", "mean", "--max-tokens",
        "32", "--modules", "*.1.mlp.up_proj", "*.2.mlp.down_proj", "--tokens-per-batch", "256",
    )  # fmt: skip


def test_a_store_is_accepted_with_a_warning(before, capsys):
    assert collect(before) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if COVERS_LESS in line)
    assert "--store" in line
    edit(before / "tiny-llama", 0)
    assert collect(before) == 2
    assert "collected under another model fingerprint" in capsys.readouterr().err


def test_an_intervention_is_accepted_with_a_warning(before, capsys):
    what = ["--model", before / "tiny-llama", "--intervention", before / "run" / "interventions" / "aura"]
    assert run("generate", *what, "--prompt", "the cat", "--max-new-tokens", 2) == 0
    assert run("export", *what, "--out", before / "out") == 0
    assert [COVERS_LESS in line for line in capsys.readouterr().err.splitlines() if "--intervention" in line] == [
        True
    ] * 2
    edit(before / "tiny-llama", -1)
    assert run("generate", *what, "--prompt", "the cat") == 2
    assert "was made for" in capsys.readouterr().err


def test_the_earlier_rule_is_the_one_that_was_written(before):
    model = json.loads((before / "run" / "store.zarr" / "zarr.json").read_text())["attributes"]["model"]
    source, config = (
        ModelSource(str(before / "tiny-llama"), None, "float32"),
        AutoConfig.from_pretrained(before / "tiny-llama"),
    )
    assert earlier_fingerprint(source, config) == model["fingerprint"]
    assert is_earlier(model["fingerprint"])
    assert not is_earlier(fingerprint(source, config))
    assert not is_earlier(None)


def test_no_warning_where_the_rule_is_ours(caplog):
    fail = pytest.fail
    assert comparable(RULE + "1", RULE + "2", lambda: fail("computed"), "x") == RULE + "2"
    assert comparable(None, RULE + "2", lambda: fail("computed"), "x") == RULE + "2"
    assert comparable("1", RULE + "2", lambda: "3", "x") == "3"
    assert not caplog.records


@pytest.mark.parametrize("first_is_old", [True, False])
def test_interventions_of_both_rules_compose_with_a_warning(first_is_old, caplog):
    maps = {UP: np.full(4, 0.5, np.float32)}
    old, new = (Intervention(maps, meta={"model": {"name": "m", "fingerprint": f}}) for f in ("1", RULE + "2"))
    whole = old @ new if first_is_old else new @ old
    assert whole.meta["model"]["fingerprint"] == RULE + "2"
    assert "an earlier version made one of the interventions" in caplog.text
    with pytest.raises(InputError, match="two interventions of one model"):
        new @ Intervention(maps, meta={"model": {"name": "m", "fingerprint": RULE + "3"}})


def test_figures_of_both_rules_are_not_compared_in_silence(caplog):
    assert against_plain({"model_fingerprint": "1"}, {"model_fingerprint": RULE + "2"}) == {}
    assert "evaluated by an earlier version" in caplog.text
    caplog.clear()
    assert against_plain({"model_fingerprint": RULE + "1"}, {"model_fingerprint": RULE + "2"}) == {}
    assert not caplog.records


@pytest.mark.parametrize("at", [None, 5])
def test_a_store_of_a_model_in_memory(at, tmp_path, monkeypatch, caplog):
    model, store = tiny_causal("llama"), tmp_path / "s.zarr"
    given = {"tokenizer": tiny_tokenizer(), "store": store, "modules": ["*.0.mlp.up_proj"]}
    texts, labels = [f"the cat {i}" for i in range(8)], [i % 2 for i in range(8)]
    with monkeypatch.context() as patch:
        patch.setattr(InMemory, "fingerprint", InMemory.earlier_fingerprint)
        aura_dist.collect(model, texts, labels, **given)
    if at is None:
        aura_dist.collect(model, texts, labels, **given)
        return
    with torch.no_grad():
        model.get_parameter(f"{UP}.weight").view(-1)[at] += 1
    with pytest.raises(StoreError, match="another model fingerprint"):
        aura_dist.collect(model, texts, labels, **given)


def test_continuations_depend_on_where_texts_end(tmp_path):
    """generation_config.json may name other ends than config.json."""
    directory, keys = save_tiny("llama", tmp_path / "m"), []
    prompts, how = PromptFile(str(tmp_path), "text", ["a"], np.array([np.nan])), Decoding(1, 2, 0.0, 1.0, 0)
    for ends in (1, [1, 7]):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        loaded = load_for_use(ModelSource(str(directory), None, "float32"), Team.alone(), None)
        tokenized = tokenize_prompts(["a"], loaded.tokenizer, loaded.model.config, how)
        engine = InProcess(loaded, "float32", 1.0, Team.alone(), StopFlag(), 1, 1)
        keys.append(fixing_settings(engine.fixing(), None, prompts, tokenized, how))
    assert keys[0]["model"] == keys[1]["model"]
    assert (keys[0]["stop_ids"], keys[1]["stop_ids"]) == ([1], [1, 7])


def test_a_journal_of_other_settings_is_made_again_with_a_warning(tmp_path, caplog):
    from aura_dist.evaluation.journal import Journal
    from aura_dist.stages.evaluate import _fold

    line = {"settings": "earlier", "prompt": 0, "sample": 0, "text": "x"}
    (tmp_path / "r.continuations.jsonl").write_text(json.dumps(line) + "\n")
    with caplog.at_level(logging.WARNING):
        assert _fold(Journal(str(tmp_path / "r.json"), "now")) == 0
    assert "1 lines of other settings, of an earlier version, or incomplete, are made again" in caplog.text


def test_a_middle_that_earlier_versions_did_not_read(tmp_path):
    """Their rule agrees on two models that ours tells apart."""
    directory = save_tiny("llama", tmp_path / "a")
    prints = []
    for at in (None, 20_000):
        large = torch.zeros(50_000)
        if at is not None:
            large[at] = 1
        shutil.copytree(directory, tmp_path / str(at))
        save_file({"w": large}, tmp_path / str(at) / "model.safetensors", metadata={"format": "pt"})
        source, config = ModelSource(str(tmp_path / str(at)), None, "float32"), AutoConfig.from_pretrained(directory)
        prints.append((earlier_fingerprint(source, config), fingerprint(source, config)))
    (earlier_a, ours_a), (earlier_b, ours_b) = prints
    assert earlier_a == earlier_b
    assert ours_a != ours_b
