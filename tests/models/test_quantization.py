"""Weights that a library quantises as they are read: the numbers of transformers alone, and an identity of their own.

Tests with a library skip where it is not installed.
"""

import json
import re
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, Gemma3TextConfig, GPT2Config, LlamaConfig

import aura_dist
from aura_dist.cli import main
from aura_dist.errors import ModelError, StoreError
from aura_dist.models import quantization
from aura_dist.models.load import ModelSource, load_base, load_causal
from aura_dist.models.quantization import LIBRARIES, configuration_of, settled, spellings
from aura_dist.ranks.world import World
from aura_dist.store.access import open_group
from tests.models import COMMON, DEMO_SENTENCES, LLAMA_LIKE, TINY_CONFIGS, save_tiny

pytestmark = pytest.mark.filterwarnings("default")  # the libraries use what Python and torch warn of

IMPORTED = {"bitsandbytes": "bitsandbytes", "quanto": "optimum", "torchao": "torchao"}
# what needs no compiler and no GPU; 8bit, whose outliers are those of a batch, is apart
REAL = ("bitsandbytes:8bit-rows", "bitsandbytes:nf4", "bitsandbytes:fp4", "quanto:int8", "torchao:int8wo")
TEXTS = [f"a text of some words number {i} {'and more ' * (i % 5)}" for i in range(12)]
LABELS = [i % 2 for i in range(12)]
SITES = [f"model.layers.{n}.{m}" for n in (0, 1) for m in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")]
IDS = torch.arange(5, 29).reshape(2, 12)


def needs(spelled):
    """Skip unless the library is there; returns what was given."""
    name = spelled.partition(":")[0]
    if find_spec(IMPORTED[name]) is None:
        pytest.skip(f"{LIBRARIES[name].package} is not installed (extra `quantization`)")
    return spelled


# in blocks of 32 rows and 64 columns, as bitsandbytes packs 4-bit weights on CPUs with bfloat16 products
WIDE = {"hidden_size": 64, "intermediate_size": 128}
WIDE_CONFIGS = {
    "llama": LlamaConfig(**{**LLAMA_LIKE, **WIDE}),
    "gemma3": Gemma3TextConfig(**{**LLAMA_LIKE, **WIDE}, head_dim=16, sliding_window=32, sliding_window_pattern=2),
    "bloom": BloomConfig(**COMMON, hidden_size=64, n_layer=3, n_head=4),
    "gpt2": GPT2Config(**COMMON, n_embd=64, n_layer=3, n_head=4, n_positions=256),
}


def save_wide(name, directory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(TINY_CONFIGS, name, lambda: WIDE_CONFIGS[name])
        return str(save_tiny(name, directory))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_wide("llama", tmp_path_factory.mktemp("llama"))


def plain(directory, spelled=None, **more):
    """The model as transformers alone loads it."""
    how = {} if spelled is None else {"quantization_config": configuration_of(spelled, "float32")}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **how, **more).eval()


@torch.no_grad()
def maxima(model, directory, rows):
    """Site → the maximum over each text's tokens, by ordinary hooks, text by text."""
    tokenizer, seen = AutoTokenizer.from_pretrained(directory), {name: [] for name in SITES}
    for name in SITES:
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out, n=name: seen[n].append(out[0].amax(dim=0)))
    for row in rows:
        model(**tokenizer(TEXTS[row], return_tensors="pt"))
    return {name: torch.stack(values).float().numpy() for name, values in seen.items()}


def stored(store):
    group = open_group(str(store))
    values = {name: np.asarray(group[f"activations/{name}/max"]) for name in SITES}
    return values, np.asarray(group["samples/row"]), dict(group.attrs)["model"]


@pytest.mark.parametrize("spelled", REAL)
def test_stores_hold_what_transformers_computes(spelled, llama, tmp_path):
    store = tmp_path / "S.zarr"
    aura_dist.collect(llama, TEXTS, LABELS, store=store, modules=SITES, quantization=needs(spelled))
    ours, rows, model = stored(store)
    theirs, floats = maxima(plain(llama, spelled), llama, rows), maxima(plain(llama), llama, rows)
    for name in SITES:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
        assert not np.allclose(ours[name], floats[name], rtol=1e-3, atol=1e-3)
    assert model["quantization"] == spelled


def test_every_verb_runs_with_outliers_in_16_bits(llama, tmp_path, capsys):
    needs("bitsandbytes:8bit")
    how = ["--model", llama, "--quantization", "bitsandbytes:8bit"]
    store, fitted = str(tmp_path / "S.zarr"), str(tmp_path / "aura")
    data = ["--data", str(DEMO_SENTENCES), "--concepts", "toxic", "--num-positive", "24", "--num-negative", "24"]
    assert main(["collect", *how, *data, "--modules", "mlp", "norm", "--store", store]) == 0
    assert "numbers depend a little on which texts share a batch" in capsys.readouterr().err
    assert main(["score", "--store", store, "--statistics", "auroc"]) == 0
    assert main(["fit", "--store", store, "--concept", "toxic", "--modules", "mlp", "--out", fitted]) == 0
    acting = [*how, "--intervention", fitted]
    assert main(["generate", *acting, "--prompt", "the", "--max-new-tokens", "4"]) == 0
    (tmp_path / "t.csv").write_text("text\n" + "\n".join(TEXTS))
    assert main(["evaluate", *acting, "--perplexity-texts", str(tmp_path / "t.csv"), "--out", f"{store}.json"]) == 0
    assert json.loads((tmp_path / "S.zarr.json").read_text())["model"]["quantization"] == "bitsandbytes:8bit"
    assert "MatMul8bitLt" not in capsys.readouterr().err
    # an intervention belongs to the weights as they were used, in both directions
    for wrong, then in ([], "with --quantization bitsandbytes:8bit"), (["--quantization", "bitsandbytes:nf4"], "nf4"):
        assert main(["generate", "--model", llama, *wrong, "--intervention", fitted, "--prompt", "the"]) == 2
        assert then in capsys.readouterr().err.splitlines()[-1]
    assert main(["export", "--model", llama, "--intervention", fitted, "--out", str(tmp_path / "E")]) == 2
    assert "with --quantization bitsandbytes:8bit), but" in capsys.readouterr().err


@pytest.mark.parametrize("spelled", ["bitsandbytes:8bit-rows", "quanto:int8", "torchao:int8wo"])
def test_hooks_change_quantised_layers_and_leave_no_trace(spelled, llama):
    model = load_causal(ModelSource(llama, None, "float32", quantization=needs(spelled)), World())
    scale = {name: np.linspace(0.2, 1, model.get_submodule(name).out_features, dtype=np.float32) for name in SITES}
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        with aura_dist.intervene(model, aura_dist.Intervention(scale)):
            ours = model(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, before)
        for name, values in scale.items():
            factor = torch.tensor(values)
            model.get_submodule(name).register_forward_hook(lambda _m, _a, out, w=factor: out * w)
        torch.testing.assert_close(ours, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-2)


@torch.no_grad()
def test_a_part_of_the_model_is_quantised_as_the_whole_is(tmp_path):
    """Of architectures without and with tied embeddings, and one whose linear layers are no `nn.Linear`."""
    needs("bitsandbytes:nf4")
    for name in ("bloom", "gpt2", "gemma3"):
        source = ModelSource(save_wide(name, tmp_path / name), None, "float32", quantization="bitsandbytes:nf4")
        whole, part = load_causal(source, World()), load_base(source, World(), num_layers=2)
        hidden = whole.base_model(input_ids=IDS, output_hidden_states=True).hidden_states[1]
        assert torch.equal(part(input_ids=IDS, output_hidden_states=True).hidden_states[1], hidden)
        assert type(part) is type(whole.base_model)


@pytest.mark.parametrize(
    ("spelled", "name"), [("quanto:int8", "gpt2"), ("bitsandbytes:8bit", "falcon-40b-style"), ("torchao:int8", "gpt2")]
)
def test_library_that_finds_nothing_to_quantise_is_refused(spelled, name, tmp_path, refused):
    """By `plan` too, which needs no library."""
    directory = str(save_tiny(name, tmp_path / "M"))
    why = rf"{settled(spelled)}: expected linear layers that .* found none in (GPT2LMHead|FalconForCausalLM)"
    refused(["plan", "--model", directory, "--quantization", spelled, "--num-positive", "4"], why)
    source = ModelSource(directory, None, "float32", quantization=settled(needs(spelled)))
    with pytest.raises(ModelError, match=why):
        load_causal(source, World())


def test_weights_that_stay_floats_are_counted_and_named(tmp_path, capsys):
    """A mixture's experts are no linear layers."""
    directory, rows = str(save_tiny("mixtral", tmp_path / "M")), ["--num-positive", "4", "--num-negative", "4"]
    figures = []
    for more in ([], ["--quantization", "quanto:int8"]):
        assert main(["plan", "--model", directory, *rows, "--modules", "heads", "--json", *more]) == 0
        written = capsys.readouterr()
        figures.append(json.loads(written.out[written.out.index("{") :])["weights_bytes"])
    assert figures[0] - figures[1] == 3 * 3 * (2 * 48 * 48 + 2 * 48 * 24), "attention's alone"
    assert re.search(r"8\d% of the layers' weights stay floats, because optimum-quanto converts linear", written.err)


def test_adapter_is_merged_before_weights_are_quantised(llama, tmp_path):
    needs("bitsandbytes:8bit-rows")
    a, b = torch.randn(4, 64) / 4, torch.randn(128, 4) / 4
    place = "model.layers.1.mlp.gate_proj"
    names = [f"base_model.model.{place}.lora_{part}.weight" for part in "AB"]
    save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    source = ModelSource(llama, None, "float32", str(tmp_path), quantization="bitsandbytes:8bit-rows")
    merged = plain(llama)
    with torch.no_grad():
        merged.get_submodule(place).weight += b @ a
        merged.save_pretrained(tmp_path / "merged")
        ours = load_causal(source, World())(input_ids=IDS).logits
        theirs = plain(tmp_path / "merged", "bitsandbytes:8bit-rows")(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelled", ["bitsandbytes:8bit-rows", "bitsandbytes:nf4", "torchao:int8wo"])
def test_checkpoint_that_is_quantised_already(spelled, llama, tmp_path, refused, capsys):
    """It loads without the flag, as another model than the float checkpoint, and computes as quantised on load."""
    saved = tmp_path / "Q"
    plain(llama, needs(spelled)).save_pretrained(saved)
    AutoTokenizer.from_pretrained(llama).save_pretrained(saved)
    stores = [tmp_path / "one.zarr", tmp_path / "two.zarr"]
    aura_dist.collect(str(saved), TEXTS, LABELS, store=stores[0], modules=SITES)
    aura_dist.collect(llama, TEXTS, LABELS, store=stores[1], modules=SITES, quantization=spelled)
    (ours, _, model), (theirs, _, other) = map(stored, stores)
    for name in SITES:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    assert model["quantization"] is None
    assert model["fingerprint"] != other["fingerprint"]
    aura_dist.score(stores[0])
    aura_dist.fit(stores[0], "concept", "aura", out=tmp_path / "aura")
    generate = ["generate", "--model", str(saved), "--prompt", "the", "--max-new-tokens", "2"]
    assert main(generate) == 0
    capsys.readouterr()
    refused([*generate, "--quantization", "quanto:int8"], "expected a checkpoint of float weights.* quantised already")
    refused([*generate, "--sharding", "fsdp"], "--sharding fsdp: expected float weights to spread.*replicate or disp")
    export = ["export", "--model", str(saved), "--intervention", str(tmp_path / "aura"), "--out", str(tmp_path / "E")]
    refused(export, "the checkpoint is quantised .*: a scale cannot be folded.* quantise the result")


def test_a_store_belongs_to_one_quantisation(llama, tmp_path):
    needs("bitsandbytes:nf4")
    settings = {"store": tmp_path / "S.zarr", "modules": SITES}
    aura_dist.collect(llama, TEXTS, LABELS, **settings, quantization="bitsandbytes:4bit")
    aura_dist.collect(llama, TEXTS, LABELS, **settings, quantization="bitsandbytes:nf4")
    for other in (None, "bitsandbytes:fp4"):
        with pytest.raises(StoreError, match="under another model quantization: expected bitsandbytes:nf4, got"):
            aura_dist.collect(llama, TEXTS, LABELS, **settings, quantization=other)


def test_plan_counts_the_stored_bytes(tmp_path, capsys):
    """As many as the loaded weights take; and strategies that cannot hold them are not offered."""
    directory = str(save_tiny("llama", tmp_path / "M"))
    weights = {}
    for spelled in (None, "quanto:int8", "bitsandbytes:nf4"):
        how = [] if spelled is None else ["--quantization", spelled]
        rows = ["--num-positive", "40", "--num-negative", "40", "--world-size", "2", "--json"]
        assert main(["plan", "--model", directory, *how, *rows]) == 0
        report = json.loads(capsys.readouterr().out)
        weights[spelled], offered = report["weights_bytes"], {name for name, *_ in report["fits"]}
        assert (spelled or "float32") in report["model"]
        assert ("fsdp=2" in offered) == (spelled is None)
    linear = sum(3 * 48 * 80 + 2 * 48 * 48 + 2 * 48 * 24 for _ in range(3))
    assert weights[None] - weights["quanto:int8"] == 3 * linear
    assert weights[None] - weights["bitsandbytes:nf4"] == (4 - 4.5 / 8) * linear
    assert main(["plan", "--model", directory, "--quantization", "quanto", *rows, "--sharding", "tensor"]) == 2


def test_bad_values_are_refused_before_anything_is_read(llama, tmp_path, refused, monkeypatch):
    start = ["generate", "--prompt", "the", "--model"]
    for value in ("gptq", "bitsandbytes:", "bitsandbytes:3bit", ":8bit", "quanto:int8:int8", "BITSANDBYTES"):
        refused([*start, "nowhere", "--quantization", value], f"--quantization: expected one of .*, got '{value}'")
    for sharding in ("fsdp", "tensor", "fsdp=2,tensor=2", "zero3"):
        options = ["nowhere", "--quantization", "quanto:int8", "--sharding", sharding]
        refused([*start, *options], "--sharding .*: expected float weights to spread, got --quantization quanto:int8")

    def missing(name):
        raise quantization.PackageNotFoundError(name)

    monkeypatch.setattr(quantization, "version", missing)
    empty = shutil.copytree(llama, tmp_path / "M")
    (empty / "model.safetensors").write_bytes(b"")
    what = "--quantization torchao:int8wo needs torchao: pip install 'aura-dist.quantization.'"
    refused([*start, str(empty), "--quantization", "torchao"], what)
    collect = ["collect", "--model", str(empty), "--data", str(DEMO_SENTENCES), "--concepts", "toxic", "--store"]
    refused([*collect, str(tmp_path / "S"), "--quantization", "torchao"], what)
    assert not (tmp_path / "S").exists()


def test_spellings():
    assert {settled(one) for one in spellings()} == set(spellings())
    others = {
        "bitsandbytes": "8bit",
        "bitsandbytes:4bit": "nf4",
        "optimum-quanto:int4": "int4",
        "torchao:int8": "int8wo",
    }
    for spelled, option in others.items():
        assert settled(spelled).partition(":")[2] == option
