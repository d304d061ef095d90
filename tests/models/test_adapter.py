"""A LoRA adapter: merged on load where it is asked for, refused where nobody asked, and part of what a model is."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Conv1D, GenerationConfig

import aura_dist
from aura_dist.cli import main
from aura_dist.errors import ModelError, RunInterruptedError
from aura_dist.models.adapter import Adapter, adapter_digest, check_adapter
from aura_dist.models.load import ModelSource, load_base, load_causal
from aura_dist.ranks.layout import Layout
from aura_dist.ranks.signals import interruption
from aura_dist.ranks.world import World
from aura_dist.store.access import open_group
from tests.distributed.launch import run_ranks
from tests.models import save_tiny

TARGETS = {
    "llama": {"model.layers.{}.mlp.gate_proj": (48, 80), "model.layers.{}.self_attn.q_proj": (48, 48)},
    "gpt2": {"transformer.h.{}.mlp.c_fc": (48, 192), "transformer.h.{}.attn.c_attn": (48, 144)},
    "falcon-40b-style": {"transformer.h.{}.mlp.dense_h_to_4h": (64, 256)},
}
IDS = torch.arange(5, 29).reshape(2, 12)


def save_adapter(directory, name="llama", seed=0, extra=None, **config):
    """A random adapter as peft saves it."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(3):
        for module, (inputs, outputs) in TARGETS[name].items():
            key = f"base_model.model.{module.format(layer)}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, inputs, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator) / 10
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "somewhere/base", "r": 4,
        "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["gate_proj", "q_proj"], "bias": "none",
        "inference_mode": True, "init_lora_weights": True, "use_dora": False, "modules_to_save": None,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    save_file({**tensors, **(extra or {})}, directory / "adapter_model.safetensors")
    return directory


@torch.no_grad()
def by_hand(model, adapter, scaling):
    """Logits of a model whose linear layers add s B A x to what they compute."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key in [k for k in tensors if k.endswith("lora_A.weight")]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        layer = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        assert isinstance(layer, (nn.Linear, Conv1D))
        layer.register_forward_hook(lambda m, args, out, a=a, b=b: out + scaling * (args[0] @ a.T @ b.T))
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("name", "config", "scaling"),
    [
        ("llama", {}, 2.0),
        ("gpt2", {"fan_in_fan_out": True}, 2.0),
        ("falcon-40b-style", {"use_rslora": True}, 4.0),
        ("llama", {"lora_alpha": 32, "alpha_pattern": {"gate_proj": 4, "q_proj": 4}}, 1.0),
    ],
)
def test_merged_model_computes_what_the_adapter_adds(name, config, scaling, tmp_path):
    directory = save_tiny(name, tmp_path / "M")
    adapter = save_adapter(tmp_path / "A", name, **config)
    source = ModelSource(str(directory), None, "float32", str(adapter))
    merged, plain = load_causal(source, World()), AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        assert not torch.allclose(merged(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-2)
        torch.testing.assert_close(merged(input_ids=IDS).logits, by_hand(plain, adapter, scaling), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"lora_alpha": "much"}, "numbers as lora_alpha"),
        ({"lora_alpha": None}, "numbers as lora_alpha"),
        ({"lora_alpha": float("nan")}, "numbers as lora_alpha"),
        ({"alpha_pattern": {"[": 16}}, "numbers as lora_alpha and alpha_pattern"),
        ({"alpha_pattern": ["gate_proj"]}, "numbers as lora_alpha and alpha_pattern"),
        ({"rank_pattern": {"gate_proj": "x"}}, "numbers as r and rank_pattern"),
        ({"r": 8}, "expected the rank of its adapter_config.json, 8, at .*, got 4"),
        ({"r": 4, "rank_pattern": {"gate_proj": 2}}, "expected the rank of its adapter_config.json, 2, at .*, got 4"),
    ],
)
def test_configuration_that_does_not_fit_its_weights_is_refused(config, error, tmp_path):
    with pytest.raises(ModelError, match=error):
        Adapter.load(str(save_adapter(tmp_path / "A", **config)))


@pytest.mark.parametrize("look", [lambda name: check_adapter(name, None, None), adapter_digest])
def test_a_signal_while_the_hub_is_asked_ends_the_command(look, monkeypatch):
    def stopped(*_):
        raise interruption(signal.SIGTERM)

    monkeypatch.setattr("aura_dist.models.adapter.find_file", stopped)
    with pytest.raises(RunInterruptedError):
        look("owner/name")


def test_rank_of_a_pattern(tmp_path):
    adapter = Adapter.load(str(save_adapter(tmp_path / "A", r=8, rank_pattern={"(gate|q)_proj": 4})))
    assert {scaling for _, _, scaling in adapter.parts.values()} == {2.0}


def test_merged_in_float32_and_rounded_once(tmp_path):
    directory = save_tiny("llama", tmp_path / "M", max_shard_size="60KB")
    adapter = save_adapter(tmp_path / "A")
    assert len(list(directory.glob("*.safetensors"))) > 1
    GenerationConfig(eos_token_id=[7, 9]).save_pretrained(directory)
    weights, tensors = AutoModelForCausalLM.from_pretrained(directory), load_file(adapter / "adapter_model.safetensors")
    key = "model.layers.1.mlp.gate_proj"
    a, b = (tensors[f"base_model.model.{key}.lora_{part}.weight"] for part in "AB")
    wanted = weights.get_submodule(key).weight.detach() + (b @ a) * 2.0
    for dtype in ("float32", "bfloat16"):
        model = load_causal(ModelSource(str(directory), None, dtype, str(adapter)), World())
        assert torch.equal(model.get_submodule(key).weight, wanted.to(model.dtype))
        assert model.generation_config.eos_token_id == [7, 9]
    base = load_base(ModelSource(str(directory), None, "float32", str(adapter)), World(), num_layers=2)
    assert torch.equal(base.layers[1].mlp.gate_proj.weight, wanted)


def test_merged_where_accelerate_spreads_the_layers(tmp_path):
    source = ModelSource(str(save_tiny("llama", tmp_path / "M")), None, "float32", str(save_adapter(tmp_path / "A")))
    whole = load_causal(source, World())
    spread = load_causal(source, World(layout=Layout("dispatch")), {"max_memory": {"cpu": 2**30}})
    with torch.no_grad():
        assert torch.equal(spread(input_ids=IDS).logits, whole(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"peft_type": "IA3"}, "expected peft_type LORA, got 'IA3'"),
        ({"use_dora": True}, "got use_dora = True"),
        ({"bias": "lora_only"}, "got bias = lora_only"),
        ({"modules_to_save": ["lm_head"]}, "got modules_to_save = "),
        ({"init_lora_weights": "pissa"}, "got init_lora_weights = pissa"),
        ({"a_setting_of_tomorrow": 3}, "got a_setting_of_tomorrow = 3"),
        ({"extra": {"base_model.model.lm_head.weight": torch.zeros(384, 48)}}, "got 'base_model.model.lm_head.weight'"),
        (
            {"extra": {f"base_model.model.model.embed_tokens.lora_{k}.weight": torch.zeros(4, 4) for k in "AB"}},
            "got 'model.embed_tokens'",
        ),
        (
            {
                "extra": {
                    f"base_model.model.model.layers.2.mlp.up_proj.lora_{k}.weight": torch.zeros(4, 4) for k in "AB"
                }
            },
            r"expected \(80, 48\) at 'model.layers.2.mlp.up_proj', got \(4, 4\)",
        ),
        (
            {"extra": {"base_model.model.model.layers.2.mlp.up_proj.lora_A.weight": torch.zeros(2, 48)}},
            "expected A and B of one rank at 'model.layers.2.mlp.up_proj'",
        ),
    ],
)
def test_adapter_that_is_no_plain_lora_of_this_model_is_refused(spoil, message, tiny_dir, tmp_path):
    adapter = save_adapter(tmp_path / "A", **spoil)
    with pytest.raises(ModelError, match=message):
        load_causal(ModelSource(str(tiny_dir("llama")), None, "float32", str(adapter)), World())


def test_adapter_that_lies_with_the_model_is_refused_everywhere_unless_it_is_named(tmp_path, capsys):
    directory = save_tiny("llama", tmp_path / "D")
    save_adapter(directory)
    (tmp_path / "t.csv").write_text("text,toxic\n" + "".join(f"a text {i},{i % 2}\n" for i in range(8)))
    data = ["--data", str(tmp_path / "t.csv"), "--concepts", "toxic", "--store", str(tmp_path / "S.zarr")]
    out = ["--out", str(tmp_path / "out")]
    verbs = [
        ["collect", *data], ["plan", *data], ["generate", "--prompt", "the"],
        ["evaluate", "--perplexity-texts", str(tmp_path / "t.csv"), *out],
        ["export", "--intervention", str(tmp_path / "X"), *out],
    ]  # fmt: skip
    for verb in verbs:
        assert main([*verb, "--model", str(directory)]) == 2
        error = capsys.readouterr().err
        assert "has an adapter beside its weights (adapter_config.json)" in error
        assert f"add --adapter {directory}, where the verb takes it; or merge the adapter with peft" in error
    other = save_adapter(tmp_path / "A")
    assert main(["generate", "--prompt", "the", "--model", str(directory), "--adapter", str(other)]) == 2
    assert "has an adapter beside" in capsys.readouterr().err
    assert not (tmp_path / "S.zarr").exists()
    assert main(["generate", "--prompt", "the", "--model", str(directory), "--adapter", str(directory / ".")]) == 0


def test_adapter_without_a_model_names_its_base(tmp_path, capsys):
    adapter = save_adapter(tmp_path / "O")
    for model in ([str(adapter)], [str(adapter), "--adapter", str(adapter)]):
        assert main(["generate", "--prompt", "the", "--model", *model]) == 2
        error = capsys.readouterr().err
        assert "is an adapter without a model: expected the model that it belongs to, 'somewhere/base'" in error
        assert f"with --adapter {adapter}" in error
    assert main(["generate", "--prompt", "the", "--model", str(tmp_path), "--adapter", str(tmp_path)]) == 2
    assert "found none" in capsys.readouterr().err


def test_adapter_is_part_of_a_stores_identity(tmp_path):
    directory = save_tiny("llama", tmp_path / "M")
    first, second = save_adapter(tmp_path / "A"), save_adapter(tmp_path / "B", seed=1)
    copy = shutil.copytree(first, tmp_path / "C")
    texts, labels = [f"a text {i}" for i in range(8)], [i % 2 for i in range(8)]
    settings = {"store": tmp_path / "S.zarr", "modules": ["*.gate_proj"]}
    aura_dist.collect(str(directory), texts, labels, adapter=str(first), **settings)
    for other in (None, str(second)):
        with pytest.raises(aura_dist.errors.StoreError, match="model adapter"):
            aura_dist.collect(str(directory), texts, labels, adapter=other, **settings)
    aura_dist.collect(str(directory), texts, labels, adapter=str(copy), **settings)
    aura_dist.collect(str(directory), texts, labels, store=tmp_path / "P.zarr", modules=["*.gate_proj"])
    merged, plain = open_group(str(tmp_path / "S.zarr")), open_group(str(tmp_path / "P.zarr"))
    models = [dict(group.attrs["model"]) for group in (merged, plain)]
    assert models[0]["adapter"] == {"name": str(first), "sha256": adapter_digest(str(copy))}
    assert models[1]["adapter"] is None
    assert models[0]["fingerprint"] != models[1]["fingerprint"]
    values = [np.asarray(g["activations/model.layers.0.mlp.gate_proj/max"]) for g in (merged, plain)]
    assert not np.allclose(*values)


@pytest.mark.parametrize("sharding", ["fsdp", "tensor", "zero3"])
def test_merged_on_sharded_models(sharding, tmp_path):
    """The same responses as of one rank, up to the order in which two ranks sum."""
    directory, adapter = save_tiny("llama", tmp_path / "M"), save_adapter(tmp_path / "A")
    (tmp_path / "t.csv").write_text("text,toxic\n" + "".join(f"a text number {i},{i % 2}\n" for i in range(8)))
    verb = [
        "collect", "--model", str(directory), "--adapter", str(adapter), "--data", str(tmp_path / "t.csv"),
        "--concepts", "toxic", "--modules", "all", "--device", "cpu",
    ]  # fmt: skip
    assert main([*verb, "--store", str(tmp_path / "one.zarr")]) == 0
    run_ranks(2, [*verb, "--store", str(tmp_path / "two.zarr"), "--sharding", sharding])
    one, two = (open_group(str(tmp_path / f"{name}.zarr")) for name in ("one", "two"))
    for layer in range(3):
        for module in ("mlp.gate_proj", "self_attn.q_proj", "mlp.down_proj"):
            path = f"activations/model.layers.{layer}.{module}/max"
            np.testing.assert_allclose(np.asarray(two[path]), np.asarray(one[path]), rtol=1e-4, atol=1e-4)
