"""Exported checkpoints: plain transformers gives the hooked model's logits, or the refusal names the site."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3Config

import aura_dist
from aura_dist.cli import main
from aura_dist.interventions.artifact import Intervention
from aura_dist.models.load import skeleton
from aura_dist.sites.find import find_sites
from tests.models import LLAMA_LIKE, TINY_CONFIGS, save_tiny

IDS = torch.arange(5, 29).reshape(2, 12)
ARCHITECTURES = [
    "llama", "falcon-rotary", "falcon-alibi", "falcon-40b-style", "mpt", "gpt2", "opt", "gemma3", "bloom", "qwen3",
    "phi3", "mistral", "qwen3-moe",
]  # fmt: skip
# modules whose outputs can be shifted: they have a bias, or a setting that gives them one
SHIFTABLE = {
    "gpt2": ("all", "norm"), "opt": ("all", "norm"), "bloom": ("all", "norm"), "falcon-alibi": ("all", "norm"),
    "falcon-rotary": ("all",), "falcon-40b-style": ("mlp",), "llama": ("all",), "gemma3": ("attention",),
    "qwen3": ("attention",),
}  # fmt: skip


def random_intervention(directory, modules=("all", "norm"), shift=False, seed=0):
    """Scales from 0 to 1.2, a fifth of them exactly 1, and shifts, for a checkpoint's model."""
    rng = np.random.default_rng(seed)
    sites = find_sites(skeleton(AutoConfig.from_pretrained(directory))).select(modules)
    scale = {s.name: np.where(rng.random(s.width) < 0.2, 1, rng.uniform(0, 1.2, s.width)) for s in sites}
    moved = {s.name: rng.normal(size=s.width).astype(np.float32) * 0.3 for s in sites} if shift else {}
    return Intervention({s: v.astype(np.float32) for s, v in scale.items()}, moved, {"method": "random"})


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


def load(directory, dtype=torch.float32):
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


def export(directory, intervention, out, *more):
    intervention.save(out.parent / f"{out.name}.intervention")
    return main(
        ["export", "--model", str(directory), "--intervention", str(out.parent / f"{out.name}.intervention"),
         "--out", str(out), *more]
    )  # fmt: skip


def hooked(directory, intervention, strength=1.0):
    model = load(directory)
    with aura_dist.intervene(model, intervention, strength):
        return logits(model)


def assert_close(ours, theirs, relative=1e-5):
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exported_is_hooked(name, tiny_dir, tmp_path, capsys):
    intervention = random_intervention(tiny_dir(name))
    assert export(tiny_dir(name), intervention, tmp_path / "out") == 0
    expected = hooked(tiny_dir(name), intervention)
    assert_close(logits(load(tmp_path / "out")), expected)
    assert not torch.allclose(expected, logits(load(tiny_dir(name))), rtol=1e-2), "the intervention shows"
    number = len(intervention.sites)
    assert f"folded {number} of {number} modules" in capsys.readouterr().out


@pytest.mark.parametrize("name", SHIFTABLE)
def test_exported_is_hooked_with_shifts(name, tiny_dir, tmp_path):
    """Biases that are missing are added, and zeros where the configuration's switch adds more of them."""
    intervention = random_intervention(tiny_dir(name), SHIFTABLE[name], shift=True)
    assert export(tiny_dir(name), intervention, tmp_path / "out", "--strength", "0.7") == 0
    assert_close(logits(load(tmp_path / "out")), hooked(tiny_dir(name), intervention, 0.7))


def test_only_one_of_the_modules_shifted_adds_zeros_elsewhere(tiny_dir, tmp_path):
    site = "model.layers.1.mlp.up_proj"
    intervention = random_intervention(tiny_dir("llama"), (site,), shift=True)
    assert export(tiny_dir("llama"), intervention, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mlp_bias"], config["attention_bias"]) == (True, False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    biases = {n: t for n, t in tensors.items() if n.endswith(".bias")}
    assert len(biases) == 9
    assert {n for n, t in biases.items() if t.any()} == {f"{site}.bias"}
    assert_close(logits(load(tmp_path / "out")), hooked(tiny_dir("llama"), intervention))


@pytest.mark.parametrize(
    ("name", "modules", "named"),
    [
        ("mpt", ("mlp",), "transformer.blocks.0.ffn.up_proj"),
        ("llama", ("norm",), "model.layers.0.input_layernorm"),
        ("gemma3", ("mlp",), "model.layers.0.mlp.gate_proj"),
        ("phi3", ("*.2.mlp.gate_up_proj",), "model.layers.2.mlp.gate_up_proj"),
        ("mistral", ("attention",), "model.layers.0.self_attn.q_proj"),
    ],
)
def test_shift_without_a_bias_to_take_it_is_refused_by_name(name, modules, named, tiny_dir, tmp_path, capsys):
    intervention = random_intervention(tiny_dir(name), modules, shift=True)
    assert export(tiny_dir(name), intervention, tmp_path / "out") == 2
    assert f"'{named}' has no bias to take the shift" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_of_ours_is_needed_to_load(tiny_dir, tmp_path):
    intervention = random_intervention(tiny_dir("falcon-rotary"))
    export(tiny_dir("falcon-rotary"), intervention, tmp_path / "out")
    script = (
        "import sys, torch, transformers as hf\n"
        "m = hf.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "hf.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "torch.save(m(input_ids=torch.arange(5, 29).reshape(2, 12)).logits.detach(), sys.argv[2])\n"
        "assert not [n for n in sys.modules if n.startswith('aura')]\n"
    )
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", script, tmp_path / "out", tmp_path / "l.pt"], check=True, env=clean, cwd="/")
    assert_close(torch.load(tmp_path / "l.pt"), hooked(tiny_dir("falcon-rotary"), intervention))


def test_sharded_checkpoint_keeps_its_files_and_order(tmp_path):
    directory = save_tiny("llama", tmp_path / "model", max_shard_size="60KB")
    files = sorted(p.name for p in directory.glob("*.safetensors"))
    assert len(files) > 3
    intervention = random_intervention(directory, ("mlp",), shift=True)
    assert export(directory, intervention, tmp_path / "out") == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == files
    for file in files:
        old, new = (list(header_of(d / file)) for d in (directory, tmp_path / "out"))
        assert [n for n in new if n in old] == old
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {n: f for f in files for n in load_file(tmp_path / "out" / f)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for f in files for t in load_file(tmp_path / "out" / f).values()
    )
    assert_close(logits(load(tmp_path / "out")), hooked(directory, intervention))


def header_of(file: Path):
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__")
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


def rename_tensors(directory, rename):
    tensors = load_file(directory / "model.safetensors")
    save_file({rename(n): t for n, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon-40b-style"])
def test_names_without_the_prefix_as_on_the_hub(name, tmp_path):
    directory = save_tiny(name, tmp_path / "model")
    rename_tensors(directory, lambda n: n.removeprefix("transformer."))
    shift = name in SHIFTABLE
    intervention = random_intervention(directory, SHIFTABLE[name], shift)
    assert export(directory, intervention, tmp_path / "out") == 0
    assert_close(logits(load(tmp_path / "out")), hooked(directory, intervention))
    assert not any(n.startswith("transformer.") for n in load_file(tmp_path / "out" / "model.safetensors"))


def test_text_model_within_another_has_names_and_settings_of_its_own(tmp_path):
    """Gemma 3 with vision: transformers renames all keys at load, and the bias's setting is the text part's."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config={**LLAMA_LIKE, "head_dim": 12}, vision_config=vision, mm_tokens_per_image=4, image_token_index=2,
        boi_token_index=3, eoi_token_index=4,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    intervention = random_intervention(tmp_path / "model", ("attention",), shift=True)
    assert not set(stored) & {f"{s}.weight" for s in intervention.sites}, "the checkpoint has names of its own"
    assert export(tmp_path / "model", intervention, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["attention_bias"] is True
    assert_close(logits(load(tmp_path / "out")), hooked(tmp_path / "model", intervention))


def test_tensors_that_no_module_has_are_carried_over(tmp_path):
    directory = save_tiny("gpt2", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert export(directory, random_intervention(directory), tmp_path / "out") == 0
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["h.0.attn.bias"], tensors["h.0.attn.bias"])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_each_weight_once(name, dtype, tmp_path):
    directory = save_tiny(name, tmp_path / "model")
    load(directory, dtype).save_pretrained(directory)
    intervention = random_intervention(directory)
    assert export(directory, intervention, tmp_path / "keep") == 0
    assert export(directory, intervention, tmp_path / "wide", "--dtype", "float32") == 0
    before, keep, wide = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "keep", tmp_path / "wide"))
    assert list(before) == list(keep) == list(wide)
    assert {t.dtype for t in keep.values()} == {dtype}
    assert {t.dtype for t in wide.values()} == {torch.float32}
    changed = 0
    for tensor, old in before.items():
        exact = old.double()
        site, kind = tensor.rpartition(".")[0], tensor.rpartition(".")[2]
        if site in intervention.sites:
            scale = torch.tensor(intervention.scale[site]).double()
            across = scale[:, None] if old.ndim == 2 and name != "gpt2" else scale
            offset = 1 if name == "gemma3" and kind == "weight" and old.ndim == 1 else 0
            exact = (exact + offset) * across - offset
            changed += 1
        assert torch.equal(keep[tensor], wide[tensor].to(dtype)), "one rounding more, and no other difference"
        torch.testing.assert_close(wide[tensor].double(), exact, rtol=1e-7, atol=1e-9)
    assert changed >= len(intervention.sites)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert model.dtype == torch.float32, "the configuration says so too"
    assert_close(logits(model.eval()), hooked(directory, intervention))


def test_float16_overflow_is_refused(tmp_path, capsys):
    directory = save_tiny("llama", tmp_path / "model")
    load(directory, torch.float16).save_pretrained(directory)
    site = "model.layers.0.mlp.up_proj"
    intervention = Intervention({site: np.full(80, 1e6, np.float32)})
    assert export(directory, intervention, tmp_path / "out") == 2
    assert f"'{site}.weight' overflows float16 when folded; export with --dtype float32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export(directory, intervention, tmp_path / "out", "--dtype", "float32") == 0


def test_float16_overflow_of_an_added_bias_is_refused(tmp_path, capsys):
    directory = save_tiny("llama", tmp_path / "model")
    load(directory, torch.float16).save_pretrained(directory)
    site = "model.layers.0.mlp.up_proj"
    intervention = Intervention({}, {site: np.full(80, 1e5, np.float32)})
    assert export(directory, intervention, tmp_path / "out") == 2
    assert f"'{site}.bias' overflows float16 when folded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_biases_that_the_model_never_used_give_way_to_the_added_ones(tmp_path):
    """A checkpoint may hold biases that its configuration turns off: with the setting on they would be loaded."""
    directory = save_tiny("llama", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    stray = {f"model.layers.1.mlp.{name}_proj.bias": torch.ones(80) for name in ("up", "gate")}
    save_file(tensors | stray, directory / "model.safetensors", {"format": "pt"})
    intervention = random_intervention(directory, ("model.layers.1.mlp.up_proj",), shift=True)
    assert export(directory, intervention, tmp_path / "out") == 0
    assert_close(logits(load(tmp_path / "out")), hooked(directory, intervention))


def test_target_at_a_url_is_refused(tiny_dir, tmp_path, monkeypatch, capsys):
    random_intervention(tiny_dir("llama")).save(tmp_path / "map")
    monkeypatch.chdir(tmp_path)
    for out in ("s3://bucket/checkpoint", f"file://{tmp_path}/checkpoint"):
        known = ["export", "--model", str(tiny_dir("llama")), "--intervention", str(tmp_path / "map")]
        assert main([*known, "--out", out]) == 2
        assert "expected a local directory, got the URL" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["map"]


def test_what_is_not_folded_is_the_same_bytes(tiny_dir, tmp_path, capsys):
    site = "model.layers.1.mlp.down_proj"
    intervention = random_intervention(tiny_dir("llama"), (site,))
    export(tiny_dir("llama"), intervention, tmp_path / "out")
    capsys.readouterr()
    export(tiny_dir("llama"), intervention, tmp_path / "zero", "--strength", "0")
    said = capsys.readouterr().out
    assert "folded 0 of 1 modules" in said
    assert "leaves 1 modules as they are" in said
    places = tiny_dir("llama"), tmp_path / "out", tmp_path / "zero"
    before, after, zero = (load_file(d / "model.safetensors") for d in places)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {f"{site}.weight"}
    assert all(torch.equal(before[n], zero[n]) for n in before)


def test_files_beside_the_weights_and_provenance(tmp_path):
    directory = save_tiny("llama", tmp_path / "model")
    (directory / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    (directory / "LICENSE").write_text("free")
    (directory / "pytorch_model.h5").write_bytes(b"the old weights")
    (directory / "README.md").write_text("of the plain model")
    intervention = random_intervention(directory)
    assert export(directory, intervention, tmp_path / "out", "--strength", "0.5") == 0
    made, given = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", directory))
    assert made.pop("aura_dist_folded")
    assert made == given
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes(), name
    assert not (tmp_path / "out" / "pytorch_model.h5").exists()
    assert not (tmp_path / "out" / "README.md").exists()
    told = json.loads((tmp_path / "out" / "aura_dist.json").read_text())
    assert told["strength"] == 0.5
    assert told["intervention"]["method"] == "random"
    assert told["modules"] == intervention.sites
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert json.loads(weights.metadata()["aura_dist"]) == told
        assert weights.metadata()["format"] == "pt"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("You are")["input_ids"]


def test_export_of_an_export_composes(tiny_dir, tmp_path):
    first, second = (random_intervention(tiny_dir("gpt2"), shift=True, seed=s) for s in (1, 2))
    assert export(tiny_dir("gpt2"), first, tmp_path / "one") == 0
    assert export(tmp_path / "one", second, tmp_path / "two") == 0
    assert_close(logits(load(tmp_path / "two")), hooked(tiny_dir("gpt2"), second @ first))


def test_old_format_is_read_and_becomes_safetensors(tmp_path):
    directory = save_tiny("gpt2", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    weight = "transformer.h.1.mlp.c_fc.weight"
    tensors[weight] = tensors[weight].t().contiguous().t()  # not contiguous, as pickles may be
    names = sorted(tensors)
    halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in halves.items():
        torch.save({n: tensors[n] for n in part}, directory / file)
    index = {"metadata": {}, "weight_map": {n: f for f, part in halves.items() for n in part}}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    intervention = random_intervention(directory, shift=True)
    expected = hooked(directory, intervention)
    (directory / "model.safetensors").unlink()
    assert export(directory, intervention, tmp_path / "out") == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*00002*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert not list((tmp_path / "out").glob("pytorch*"))
    assert_close(logits(load(tmp_path / "out")), expected)


def spoil(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def without(directory, name):
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def retyped(directory, name, dtype):
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
REFUSED = {
    "a quantised checkpoint": (
        lambda d: spoil(d, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "the checkpoint is quantised",
    ),
    "a missing weight": (lambda d: without(d, UP), f"expected one tensor of the checkpoint for '{UP}', found 0"),
    "another name": (
        lambda d: rename_tensors(d, lambda n: n.replace("up_proj", "upper")),
        "expected one tensor of the checkpoint for 'model.layers.0.mlp.up_proj.weight', found 0",
    ),
    "eight-bit weights": (
        lambda d: retyped(d, UP, torch.float8_e4m3fn),
        f"tensor '{UP}' of the checkpoint: expected one of F64, F32, F16, BF16, got F8_E4M3",
    ),
    "another shape": (
        lambda d: (
            without(d, UP),
            save_file({UP: torch.zeros(3, 48), **load_file(d / "model.safetensors")}, d / "model.safetensors"),
        ),
        f"tensor '{UP}' of the checkpoint: expected shape (80, 48), got (3, 48)",
    ),
    "an adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "merge the adapter"),
    "cut weights": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
        "weight file",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_folded_is_refused_and_nothing_is_left(what, tmp_path, capsys):
    directory = save_tiny("llama", tmp_path / "model")
    intervention = random_intervention(directory, ("mlp",))
    spoiler, message = REFUSED[what]
    spoiler(directory)
    assert export(directory, intervention, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out.intervention"]


def test_tied_weight_is_refused_by_name(tiny_dir, tmp_path, capsys, monkeypatch):
    from transformers import LlamaForCausalLM

    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", {second: first})
    directory = tmp_path / "model"
    save_tiny("llama", directory)
    spoil(directory, tie_word_embeddings=True)
    assert export(directory, random_intervention(directory, ("mlp",)), tmp_path / "out") == 2
    assert f"'{first}' is tied to {second}" in capsys.readouterr().err
    assert export(directory, random_intervention(directory, ("*down_proj",)), tmp_path / "out") == 0


def test_norm_that_is_not_what_it_seems_is_refused(tiny_dir, tmp_path, capsys, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    plain = LlamaRMSNorm.forward
    intervention = random_intervention(tiny_dir("llama"), ("norm",))
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: plain(self, x) + 0.1)
    assert export(tiny_dir("llama"), intervention, tmp_path / "out") == 2
    assert "'model.layers.0.input_layernorm' (LlamaRMSNorm) is not linear in its weight" in capsys.readouterr().err


def test_intervention_of_another_model_is_refused(tiny_dir, tmp_path, capsys):
    fitted = random_intervention(tiny_dir("llama"))
    other = Intervention(fitted.scale, meta={"model": {"name": "another", "fingerprint": "0" * 64}})
    assert export(tiny_dir("llama"), other, tmp_path / "out") == 2
    assert "was made for 'another'" in capsys.readouterr().err
    assert export(tiny_dir("gpt2"), fitted, tmp_path / "out") == 2
    assert "it has no module 'model.layers.0" in capsys.readouterr().err


@pytest.mark.parametrize("model", [None, {}, {"name": None, "fingerprint": None}])
def test_intervention_that_states_no_model_is_judged_by_names_and_widths(model, tiny_dir, tmp_path, capsys):
    fitted = random_intervention(tiny_dir("llama"))
    unstated = Intervention(fitted.scale, meta={"model": model})
    assert export(tiny_dir("llama"), unstated, tmp_path / "out") == 0
    assert export(tiny_dir("gpt2"), unstated, tmp_path / "other") == 2
    assert "it has no module 'model.layers.0" in capsys.readouterr().err


@pytest.mark.parametrize("there", ["directory", "file"])
def test_existing_target_is_refused_untouched(there, tiny_dir, tmp_path, capsys):
    out = tmp_path / "out"
    (out.mkdir if there == "directory" else out.touch)()
    assert export(tiny_dir("llama"), random_intervention(tiny_dir("llama")), out) == 2
    assert "expected a directory that does not exist yet" in capsys.readouterr().err
    assert out.is_dir() == (there == "directory")
    assert not out.is_dir() or not list(out.iterdir())


@pytest.mark.parametrize("failing", ["pwrite", "copy_file_range"])
def test_full_disk_leaves_nothing(failing, tiny_dir, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    intervention = random_intervention(tiny_dir("llama"), ("mlp",))
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        assert export(tiny_dir("llama"), intervention, tmp_path / "out") == 2
    assert "cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["out.intervention"]


def test_where_the_kernel_cannot_copy_it_is_read_and_written(tiny_dir, tmp_path, monkeypatch):
    def cannot(*args):
        raise OSError(18, "Invalid cross-device link")

    intervention = random_intervention(tiny_dir("llama"), ("attention",))
    monkeypatch.setattr(os, "copy_file_range", cannot)
    assert export(tiny_dir("llama"), intervention, tmp_path / "out") == 0
    assert_close(logits(load(tmp_path / "out")), hooked(tiny_dir("llama"), intervention))


def test_killed_half_way_leaves_no_target(tmp_path):
    """Killed at moments over the whole run: the target is not there, or it is whole. What can clean up, does."""
    directory = save_tiny("llama", tmp_path / "model", max_shard_size="60KB")
    intervention = random_intervention(directory)
    intervention.save(tmp_path / "intervention")
    slowed = (
        "import sys, time\nfrom aura_dist.interventions.export import rewrite\nplain = rewrite.write_all\n"
        "def slow(*a):\n    time.sleep(0.02)\n    plain(*a)\n"
        "rewrite.write_all = slow\nfrom aura_dist.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    seen = set()
    for delay, number in ((0.0, signal.SIGKILL), (0.1, signal.SIGKILL), (0.3, signal.SIGKILL), (0.0, signal.SIGTERM)):
        out = tmp_path / f"out-{delay}-{number}"
        arguments = ["export", "--model", directory, "--intervention", tmp_path / "intervention", "--out", out]
        command = [sys.executable, "-c", slowed, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not list(tmp_path.glob(f".{out.name}.export-*/*/*.safetensors")):
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        if number == signal.SIGTERM:
            assert process.returncode == 128 + number
            assert "SIGTERM received; nothing is left of it" in said
            assert not list(tmp_path.glob(f".{out.name}.export-*"))
        seen.add(out.exists())
        if out.exists():
            assert_close(logits(load(out)), hooked(directory, intervention))
    assert False in seen


def test_weights_under_the_name_that_the_config_gives_are_those_that_are_folded(tmp_path):
    directory = save_tiny("llama", tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    save_file({"nothing": torch.ones(1)}, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "transformers_weights": "weights.safetensors"}))
    intervention = random_intervention(directory)
    assert export(directory, intervention, tmp_path / "out") == 0
    assert_close(logits(load(tmp_path / "out")), hooked(directory, intervention))


def test_tensors_of_less_than_a_byte_an_element_are_carried_whole(tmp_path):
    directory = save_tiny("llama", tmp_path / "model")
    with (directory / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        rest = file.read()
    header["extra"] = {"dtype": "F4", "shape": [4], "data_offsets": [len(rest), len(rest) + 2]}
    text = json.dumps(header).encode()
    packed = len(text).to_bytes(8, "little") + text + rest + b"\x12\x34"
    (directory / "model.safetensors").write_bytes(packed)
    assert export(directory, random_intervention(directory), tmp_path / "out") == 0
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(written[:8], "little")
    begin, end = json.loads(written[8:start])["extra"]["data_offsets"]
    assert written[start + begin : start + end] == b"\x12\x34"
    load(tmp_path / "out")


@pytest.mark.realmodel
@pytest.mark.parametrize("spread", [(0.0, 0.08), (0.08, 0.08)], ids=["like-aura", "like-linear-act"])
def test_gemma_270m_exported_is_hooked(spread, gemma_dir, tmp_path):
    """Scales as AurA and Linear-AcT give them; with wilder ones float32 itself is no better than 1e-5 here."""
    above, below = spread
    rng = np.random.default_rng(1)
    sites = random_intervention(gemma_dir).scale
    noise = {s: rng.normal(size=len(v)) for s, v in sites.items()}
    scale = {s: np.clip(1 + np.where(n > 0, above, 2 * below) * n, 0, None) for s, n in noise.items()}
    intervention = Intervention({s: v.astype(np.float32) for s, v in scale.items()})
    assert export(gemma_dir, intervention, tmp_path / "out") == 0
    assert_close(logits(load(tmp_path / "out")), hooked(gemma_dir, intervention))


def test_all_tiny_models_are_covered():
    assert set(ARCHITECTURES) == set(TINY_CONFIGS)


def test_what_describes_weights_in_another_format_stays_behind_and_is_named(tmp_path, capsys):
    directory = save_tiny("llama", tmp_path / "model", max_shard_size="60KB")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    others = [
        "params.json", "consolidated.00.pth", "consolidated.safetensors.index.json", "model.gguf", "tf_model.h5",
        "flax_model.msgpack", "pytorch_model.bin", "pytorch_model.bin.index.json", "onnx/config.json",
        "original/params.json", "adapter_model.safetensors", "openvino_config.json", "genai_config.json",
    ]  # fmt: skip
    kept = ["LICENSE", "tekken.json", "special_tokens_map.json", "chat_template.jinja", "modeling_own.py"]
    for name in [*others, *kept]:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")
    intervention = random_intervention(directory)
    assert export(directory, intervention, tmp_path / "out") == 0
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if "left out" in line)
    names = sorted({name.partition("/")[0] + "/" * ("/" in name) for name in others})
    assert line.endswith(": " + ", ".join(names))
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert not made & {name.rstrip("/") for name in names}
    assert made > {*kept, "additional_chat_templates", "model.safetensors.index.json", "tokenizer.json"}
    assert_close(logits(load(tmp_path / "out")), hooked(directory, intervention))
    assert export(directory, intervention, tmp_path / "again", "--strength", "0.5") == 0
    plain = save_tiny("llama", tmp_path / "plain")
    capsys.readouterr()
    assert export(plain, intervention, tmp_path / "third") == 0
    assert "left out" not in capsys.readouterr().err
