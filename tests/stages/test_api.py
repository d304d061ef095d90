"""The stages as functions: they equal the command line bit for bit, and leave a loaded model as it was."""

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
import zarr
from torch import nn

import aura_dist
from aura_dist.cli import main
from aura_dist.config.verbs import CollectConfig
from aura_dist.errors import ConfigError, InputError, ModelError, StoreError
from aura_dist.models.in_memory import InMemory
from aura_dist.text.table import read_table
from tests.models import TINY_CONFIGS, tiny_causal, tiny_tokenizer

SETTINGS = {"pooling": ["max", "mean"], "num_positive": 30, "num_negative": 30, "tokens_per_batch": 256}
FLAGS = ["--pooling", "max", "mean", "--num-positive", "30", "--num-negative", "30", "--tokens-per-batch", "256"]


@pytest.fixture(scope="module")
def labelled(sentences_csv):
    columns = read_table(sentences_csv, ["text", "toxic"]).columns
    return columns["text"], np.array([int(v) for v in columns["toxic"]])


@pytest.fixture(scope="module")
def plain(tiny_dir, sentences_csv, tmp_path_factory):
    """A store, its scores and an intervention, by the command line."""
    out = tmp_path_factory.mktemp("plain")
    store = ["--store", str(out / "s.zarr")]
    model = ["--model", str(tiny_dir("llama")), "--data", sentences_csv, "--concepts", "toxic"]
    assert main(["collect", *model, *FLAGS, "--modules", "*.layers.1.*", *store]) == 0
    assert main(["score", *store]) == 0
    assert main(["fit", *store, "--concept", "toxic", "--out", str(out / "aura")]) == 0
    return out


def loaded(directory):
    return hf.AutoModelForCausalLM.from_pretrained(directory), hf.AutoTokenizer.from_pretrained(directory)


def arrays(store, group):
    return {name: a[...] for name, a in zarr.open_group(store, mode="r")[group].members(None) if hasattr(a, "shape")}


def same(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.parametrize("by_name", [True, False])
def test_the_stages_equal_the_command_line(by_name, plain, labelled, tiny_dir, tmp_path, capsys):
    texts, toxic = labelled
    model, tokenizer = (tiny_dir("llama"), None) if by_name else loaded(tiny_dir("llama"))
    store = aura_dist.collect(
        model,
        texts,
        {"toxic": toxic},
        tokenizer=tokenizer,
        modules="*.layers.1.*",
        store=tmp_path / "s.zarr",
        **SETTINGS,
    )
    assert store == str(tmp_path / "s.zarr")

    async def scored():  # in a notebook, an event loop is running
        return aura_dist.score(store, top=3)

    table = asyncio.run(scored())
    fitted = aura_dist.fit(store, "toxic")
    assert capsys.readouterr().out == ""
    for group in ("samples", "activations", "progress", "scores"):
        assert same(arrays(store, group), arrays(plain / "s.zarr", group)), group
    written = aura_dist.Intervention.load(plain / "aura")
    assert fitted.digest == written.digest
    assert fitted.meta["parameters"] == written.meta["parameters"]
    there, here = (dict(zarr.open_group(s, mode="r").attrs) for s in (plain / "s.zarr", store))
    for name in ("tokenizer", "dtype", "sites", "poolings", "concepts"):
        assert there[name] == here[name]
    assert (there["model"] == here["model"]) is by_name
    assert table.groupby(["pooling"]).size().to_dict() == {"max": 3, "mean": 3}
    best = aura_dist.top_neurons(store, "toxic", 3, "mean")
    pd.testing.assert_frame_equal(table.loc[3:, best.columns].reset_index(drop=True), best)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_loaded_model_is_left_as_it_was(name, labelled, tmp_path):
    texts, toxic = labelled
    model, tokenizer = tiny_causal(name), tiny_tokenizer()
    model.train()
    next(module for module in model.modules() if not list(module.children())).eval()
    ids = torch.tensor([[5, 6, 7]])
    ran = []
    last = next(m for _, m in model.named_modules() if isinstance(m, nn.ModuleList))[-1]
    seen = last.register_forward_hook(lambda *_: ran.append(1))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    modes, names = [m.training for m in model.modules()], [n for n, _ in model.named_modules()]
    torch.set_float32_matmul_precision("medium")
    try:
        aura_dist.collect(
            model,
            texts[:20],
            toxic[:20],
            tokenizer=tokenizer,
            store=tmp_path / "s.zarr",
            modules="*.0.*",
            pooling="last",
        )
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not ran, "layers after the last captured one do not run"
    assert [n for n, _ in model.named_modules()] == names
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1
    model(ids).logits.sum().backward()
    assert ran
    seen.remove()


def test_a_failure_leaves_a_loaded_model_as_it_was(labelled, tmp_path, monkeypatch):
    model = tiny_causal("llama")
    monkeypatch.setattr("aura_dist.stages.collect.stream", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        aura_dist.collect(
            model, *(v[:20] for v in labelled), tokenizer=tiny_tokenizer(), store=tmp_path / "s", modules="*.0.*"
        )
    assert len(model.base_model.layers) == 3


def test_a_loaded_model_is_what_its_weights_are(labelled, tmp_path):
    model, tokenizer = tiny_causal("llama"), tiny_tokenizer()
    given = {"tokenizer": tokenizer, "store": tmp_path / "s.zarr", "modules": "*.1.mlp.*"}
    texts, toxic = (v[:20] for v in labelled)
    aura_dist.collect(model, texts, toxic, **given)
    aura_dist.collect(tiny_causal("llama"), tuple(texts), pd.Series(toxic == 1), **given)  # continues, as all is equal
    model.lm_head.weight.data[7, 7] += 1
    with pytest.raises(StoreError, match=r"^store .* collected under another model fingerprint.* with overwrite$"):
        aura_dist.collect(model, texts, toxic, **given)
    with pytest.raises(StoreError, match=r"another model fingerprint"):
        aura_dist.collect(tiny_causal("llama").bfloat16(), texts, toxic, **given)
    with pytest.raises(StoreError, match=r"another data sha256"):
        aura_dist.collect(tiny_causal("llama"), texts, 1 - toxic, **given)
    with pytest.raises(StoreError, match=r"another max_tokens"):
        aura_dist.collect(tiny_causal("llama"), texts, toxic, max_tokens=127, **given)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", lambda model: model.model.rotary_emb.inv_freq.mul_(1.5)),  # buffers that are not saved
        ("gemma3", lambda model: model.model.embed_tokens.embed_scale.mul_(1.5)),
        ("llama", lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.ReLU())),
    ],
)
@torch.no_grad()
def test_a_loaded_model_is_more_than_its_saved_weights(name, change):
    model, tokenizer, ids = tiny_causal(name), tiny_tokenizer(), torch.arange(40, 60)[None]
    before, logits = InMemory(model, tokenizer), model(ids).logits
    fingerprint, earlier = before.fingerprint(), before.earlier_fingerprint()
    assert InMemory(tiny_causal(name), tokenizer).fingerprint() == fingerprint
    change(model)
    assert not torch.allclose(model(ids).logits, logits)
    assert InMemory(model, tokenizer).fingerprint() != fingerprint
    assert InMemory(model, tokenizer).earlier_fingerprint() == earlier, "stores of earlier versions hold this one"


def test_hooks_of_the_caller_are_told(labelled, tmp_path, caplog):
    model = tiny_causal("llama")
    model.base_model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    texts, toxic = (v[:20] for v in labelled)
    aura_dist.collect(model, texts, toxic, tokenizer=tiny_tokenizer(), store=tmp_path / "s.zarr", modules="*.0.*")
    assert "module 'layers.0.mlp.up_proj' has a forward hook" in caplog.text


def test_a_notebook_may_run_it_in_a_thread(labelled, tmp_path):
    texts, toxic = (v[:20] for v in labelled)
    given = {"tokenizer": tiny_tokenizer(), "store": tmp_path / "s.zarr", "modules": "*.0.*"}
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(aura_dist.collect, tiny_causal("llama"), texts, toxic, **given).result(60)


def test_a_base_model_gives_the_same(labelled, tmp_path):
    texts, toxic = (v[:20] for v in labelled)
    model = tiny_causal("gpt2")
    given = {"tokenizer": tiny_tokenizer(), "modules": ["mlp", "norm"]}
    for place, form in (("whole", model), ("base", model.base_model)):
        aura_dist.collect(form, texts, toxic, store=tmp_path / place, **given)
    assert same(*(arrays(tmp_path / place, "activations") for place in ("whole", "base")))


def test_labels_take_every_usual_form(labelled, tmp_path):
    texts, toxic = (list(v[:20]) for v in labelled)
    toxic[0] = toxic[1] = 1
    scores = [0.2 + 0.5 * v for v in toxic]
    forms = {
        "list": toxic, "bool": np.array(toxic, bool), "tensor": torch.tensor(toxic), "float": np.float32(toxic),
    }  # fmt: skip
    model, tokenizer = tiny_causal("llama"), tiny_tokenizer()
    given = {"tokenizer": tokenizer, "store": tmp_path / "s.zarr", "modules": "*.0.mlp.up_proj"}
    for form in forms.values():
        aura_dist.collect(model, np.array(texts), form, **given)
    tree = aura_dist.open_store(tmp_path / "s.zarr")
    assert tree["samples"]["concept"].values.tolist() == ["concept"]
    assert tree["samples"]["label"].values[:, 0].tolist() == [toxic[r] for r in tree["samples"]["row"].values]
    other = [1, 0, None, -1, float("nan"), *[0] * 15]
    two = {"a": np.array(scores, np.float32), "b": pd.Series([0.9, 0.1, None, *[0.2] * 17])}
    aura_dist.collect(model, texts, two, threshold=0.7, **{**given, "store": tmp_path / "two"})
    aura_dist.collect(model, texts, {"a": toxic, "b": other}, **{**given, "store": tmp_path / "missing"})
    samples = aura_dist.open_store(tmp_path / "missing")["samples"]
    by_row = dict(zip(samples["row"].values, samples["label"].values[:, 1], strict=True))
    assert [by_row[r] for r in range(5)] == [1, 0, -1, -1, -1]


TEXTS = ["one text", "another", "a third"]
WRONG = {
    "a text": (TEXTS[0], [1, 0, 1], {}, InputError, "^texts: expected a list of texts, got str$"),
    "no texts": ([], [], {}, InputError, "expected rows of both classes, got 0 positive and 0 negative"),
    "numbers": ([*TEXTS[:2], 3], [1, 0, 1], {}, InputError, "row 2: expected a text in 'text', got 3"),
    "lengths": (TEXTS, [1, 0], {}, InputError, r"^labels: expected one value for each of 3 texts, got shape \(2,\)"),
    "two dims": (TEXTS, np.eye(3), {}, InputError, r"got shape \(3, 3\) for 'concept'"),
    "name": (TEXTS, {"text": [1, 0, 1]}, {}, InputError, "for 'text'"),
    "labels": (
        TEXTS,
        {"rude": [1, 0, 2]},
        {},
        InputError,
        "row 2: expected 0, 1.* in 'rude', got 2; .* give threshold$",
    ),
    "threshold": (TEXTS, [1, 0, 1], {"threshold": "x"}, ConfigError, r"^threshold: expected a number, got 'x'"),
    "no concept": (TEXTS, {}, {}, ConfigError, "^concepts: expected at least one value, got none"),
    "one class": (TEXTS, [1, 1, 1], {}, InputError, "expected rows of both classes, got 3 positive and 0 negative"),
    "range": (
        TEXTS,
        [1, 0, 1],
        {"max_tokens": 0},
        ConfigError,
        "^max_tokens: expected an integer of at least 1, got 0",
    ),
    "few tokens": (TEXTS, [1, 0, 1], {"max_tokens": 1}, ConfigError, "^max_tokens: expected more than 1"),
    "unknown": (
        TEXTS,
        [1, 0, 1],
        {"poolings": "max"},
        ConfigError,
        "^poolings: expected one of .*pooling.*; leave it out",
    ),
    "data": (TEXTS, [1, 0, 1], {"data": "d.csv"}, ConfigError, "^data: expected one of"),
    "modules": (TEXTS, [1, 0, 1], {"modules": "mpl"}, ModelError, "^modules 'mpl' matches nothing"),
    "too many": (TEXTS, [1, 0, 1], {"num_positive": 3}, InputError, "^num_positive: expected at most 2"),
    "dtype": (TEXTS, [1, 0, 1], {"dtype": "bfloat16"}, ConfigError, "^dtype: expected it with a model's name"),
    "device": (TEXTS, [1, 0, 1], {"device": "cpu"}, ConfigError, "^device: expected it with a model's name"),
    "no tokenizer": (TEXTS, [1, 0, 1], {"tokenizer": None}, ConfigError, "^tokenizer: expected .*, got NoneType$"),
    "tokenizer": (TEXTS, [1, 0, 1], {"tokenizer": "gpt2"}, ConfigError, "^tokenizer: expected .*, got str$"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_named(case, tmp_path):
    texts, labels, settings, kind, message = WRONG[case]
    model = tiny_causal("llama")
    with pytest.raises(kind, match=message):
        aura_dist.collect(model, texts, labels, store=tmp_path / "s", **{"tokenizer": tiny_tokenizer(), **settings})
    assert not (tmp_path / "s").exists()


def test_models_that_cannot_be_used_are_named(tiny_dir, tmp_path, monkeypatch):
    given = {"texts": TEXTS, "labels": [1, 0, 1], "store": tmp_path / "s"}
    with pytest.raises(ConfigError, match=r"^tokenizer: expected it with a model in memory, got it with a name"):
        aura_dist.collect(tiny_dir("llama"), **given, tokenizer=tiny_tokenizer())
    with pytest.raises(ModelError, match=r"^model 'nowhere': expected a local directory or a hub name"):
        aura_dist.collect("nowhere", **given)
    given["tokenizer"] = tiny_tokenizer()
    with pytest.raises(ModelError, match=r"expected a name or a PreTrainedModel of transformers, got DataParallel"):
        aura_dist.collect(nn.DataParallel(tiny_causal("llama")), **given)
    with pytest.raises(ModelError, match=r"expected weights in float32, bfloat16, float16, got torch\.float64"):
        aura_dist.collect(tiny_causal("llama").double(), **given)
    with pytest.raises(ModelError, match=r"'lm_head.weight' cannot be read: .*; give the model's name instead"):
        aura_dist.collect(tiny_causal("llama").to("meta"), **given)
    adapted = tiny_causal("llama")
    adapted._hf_peft_config_loaded = True  # as `load_adapter` leaves it
    with pytest.raises(ModelError, match=r"expected one without adapters of peft in its layers"):
        aura_dist.collect(adapted, **given)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"expected a name in a launch of 2 processes, got one in memory"):
        aura_dist.collect(tiny_causal("llama"), **given)


def test_scoring_and_fitting_name_what_is_wrong(plain):
    store = plain / "s.zarr"
    assert aura_dist.score(aura_dist.open_store(store), statistics="mean_positive").empty
    with pytest.raises(StoreError, match=r"^store .*: expected a store that `collect` wrote"):
        aura_dist.score(plain / "nowhere")
    with pytest.raises(ConfigError, match=r"^statistics: expected"):
        aura_dist.score(store, statistics=["aurok"])
    with pytest.raises(InputError, match=r"concept"):
        aura_dist.fit(store, "rude")
    with pytest.raises(ConfigError, match=r"^alpha: expected it with method damp"):
        aura_dist.fit(store, "toxic", alpha=0.3)


def test_fit_writes_only_where_it_is_told(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted = aura_dist.fit(aura_dist.open_store(plain / "s.zarr"), "toxic", "damp", top_k=5, alpha=0.25)
    assert not list(tmp_path.iterdir())
    assert fitted.num_changed == 5
    assert aura_dist.fit(plain / "s.zarr", "toxic", "damp", top_k=5, alpha=0.25, out="damp").digest == fitted.digest
    assert aura_dist.Intervention.load("damp").digest == fitted.digest


def test_signatures_show_the_settings_and_their_defaults():
    shown = inspect.signature(aura_dist.collect).parameters
    assert list(shown)[:5] == ["model", "texts", "labels", "store", "tokenizer"]
    assert not {"data", "concepts", "settings"} & set(shown)
    for field in fields(CollectConfig):
        if field.name in shown and field.name not in ("model", "store"):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            assert shown[field.name].default == default
