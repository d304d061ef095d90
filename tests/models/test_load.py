"""Loading: whole checkpoints of causal language models, or an error; never a weight made up."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, GPTNeoXConfig, T5Config

from aura_dist.errors import ConfigError, ModelError
from aura_dist.models.load import (
    ModelSource,
    check_positions,
    check_vocabulary,
    load_base,
    load_causal,
    load_config,
    skeleton,
)
from aura_dist.ranks.device import pick_device
from aura_dist.ranks.world import World
from aura_dist.sites.find import decoder_layers_name
from tests.models import TINY_CONFIGS, VOCAB, tiny_causal


def source(directory, dtype="float32"):
    return ModelSource(str(directory), None, dtype)


@pytest.mark.parametrize("trust", [False, True])
def test_a_revision_is_not_for_classes_of_transformers(trust, tiny_dir):
    named = ModelSource(str(tiny_dir("llama")), "main", "float32", trust_remote_code=trust)
    assert type(skeleton(load_config(named), named)).__name__ == "LlamaForCausalLM"


def copy_without(tiny, target, pattern):
    """A copy of a checkpoint that lacks the tensors whose name holds `pattern`."""
    shutil.copytree(tiny, target)
    weights = load_file(target / "model.safetensors")
    kept = {name: w for name, w in weights.items() if pattern not in name}
    assert len(kept) < len(weights)
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-rotary", "mpt", "opt"])
def test_missing_weights_are_errors(name, tiny_dir, tmp_path):
    whole = load_file(tiny_dir(name) / "model.safetensors")
    lost = next(n for n in sorted(whole) if ".1." in n and n.endswith("weight"))
    broken = source(copy_without(tiny_dir(name), tmp_path / "model", lost))
    for load in (load_causal, load_base):
        with pytest.raises(ModelError, match=r"lacks 1 of the model's weights, '.*\.1\..*weight'"):
            load(broken, World())


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", "model.layers.0.mlp.gate_proj.lora_A.default.weight"),  # a model that peft changed, saved as it was
        ("llama", "model.layers.1.mlp.up_proj.weight_scale_inv"),  # quantised weights without their configuration
        ("qwen3", "model.layers.0.self_attn.q_proj.bias"),
        ("gpt2", "transformer.h.0.mlp.c_fc.lora_B.weight"),
    ],
)
def test_weights_that_loading_would_leave_out_are_errors(name, more, tiny_dir, tmp_path):
    shutil.copytree(tiny_dir(name), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), more: torch.ones(4)}, file, metadata={"format": "pt"})
    for load in (load_causal, load_base):
        with pytest.raises(ModelError, match=rf"leave out 1 of the checkpoint's tensors, '{re.escape(more)}'"):
            load(source(tmp_path / "model"), World())


def test_tables_and_later_layers_may_be_left_out(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    more = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.3.mlp.gate_proj.weight", "mtp.fc.weight"]
    save_file({**load_file(file), **{n: torch.ones(4) for n in more}}, file, metadata={"format": "pt"})
    load_causal(source(tmp_path / "model"), World())
    load_base(source(tmp_path / "model"), World(), num_layers=1)


def test_missing_head_matters_to_the_causal_model_only(tiny_dir, tmp_path):
    broken = source(copy_without(tiny_dir("llama"), tmp_path / "model", "lm_head"))
    with pytest.raises(ModelError, match=r"'lm_head\.weight' among them"):
        load_causal(broken, World())
    load_base(broken, World())


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "falcon-rotary"])
def test_tied_head_is_the_embedding(name, tiny_dir):
    model = load_causal(source(tiny_dir(name)), World())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_missing_layers_are_not_missed_when_they_are_not_needed(tiny_dir, tmp_path):
    broken = source(copy_without(tiny_dir("llama"), tmp_path / "model", "layers.2."))
    model = load_base(broken, World(), num_layers=2)
    assert len(model.layers) == 2
    with pytest.raises(ModelError, match="lacks"):
        load_base(broken, World())


def test_another_shape_than_the_configuration_says_is_an_error(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    config.intermediate_size = 96
    config.save_pretrained(tmp_path / "model")
    for load in (load_causal, load_base):
        with pytest.raises(ModelError, match=r"cannot be loaded|lacks"):
            load(source(tmp_path / "model"), World())


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_damaged_weights_are_errors(damage, tiny_dir, tmp_path):
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000] if damage == "cut" else b"")
    for load in (load_causal, load_base):
        with pytest.raises(ModelError, match="cannot be loaded"):
            load(source(tmp_path / "model"), World())


def test_wrong_places_are_errors(tiny_dir, tmp_path):
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ModelError, match=r"expected a local directory or a hub name"):
            load_config(source(place))
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ModelError):
        load_config(source(tmp_path))
    shutil.copy(tiny_dir("llama") / "config.json", tmp_path)
    for load in (load_causal, load_base):
        with pytest.raises(ModelError, match="cannot be loaded"):
            load(source(tmp_path), World())


def test_other_kinds_of_model_are_errors():
    with pytest.raises(ModelError, match="model type 't5' is not a causal language model") as caught:
        skeleton(T5Config())
    assert len(str(caught.value)) < 250, "without the names of all causal language models"
    with pytest.raises(ModelError, match=r"model type 'bert' is not a causal language model: .* got an encoder"):
        skeleton(BertConfig(num_hidden_layers=1))
    # GPT-NeoX's configuration says that it is no decoder, too
    for config in (BertConfig(is_decoder=True), GPTNeoXConfig(num_hidden_layers=1)):
        assert skeleton(config).device.type == "meta"


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_base_is_the_causal_models_own(name, tiny_dir):
    base = load_base(source(tiny_dir(name)), World())
    causal = AutoModelForCausalLM.from_pretrained(tiny_dir(name), dtype=torch.float32)
    assert type(base) is type(causal.base_model)
    ours, theirs = base.state_dict(), causal.base_model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("load", [load_causal, load_base])
def test_models_are_frozen_in_eval_mode_and_of_the_dtype_asked_for(load, dtype, tiny_dir):
    model = load(source(tiny_dir("gpt2"), dtype), World())
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_skeleton_leaves_the_configuration_as_it_was():
    config = TINY_CONFIGS["gemma3"]()
    before = config.to_dict()
    skeleton(config)
    assert config.to_dict() == before


def test_old_checkpoint_format(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir("falcon-rotary"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    state = tiny_causal("falcon-rotary").state_dict()
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    model = load_causal(source(tmp_path / "model"), World())
    assert all(torch.equal(w, state[n]) for n, w in model.state_dict().items())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "nope"),
        ("_attn_implementation", "flash_attention_2"),
        ("num_attention_heads", 0),
        ("hidden_size", -1),
    ],
)
def test_configurations_that_give_no_model_are_errors(field, value):
    config = TINY_CONFIGS["llama"]()
    setattr(config, field, value)
    with pytest.raises(ModelError, match=r"model type 'llama' cannot be made from its config\.json: .+"):
        skeleton(config)


@pytest.mark.parametrize("name", ["gpt2", "mpt", "llama", "opt"])
def test_positions_of_every_name(name):
    config = TINY_CONFIGS[name]()
    check_positions(config, 256, "--max-tokens")
    with pytest.raises(ConfigError, match=r"--max-tokens: expected at most 256, the model's positions, got .* 257"):
        check_positions(config, 257, "--max-tokens")
    check_positions(TINY_CONFIGS["bloom"](), 10**6, "--max-tokens")  # ALiBi made for any length


def test_ids_beyond_the_vocabulary_are_errors():
    config = TINY_CONFIGS["gemma3"]()
    check_vocabulary(config, VOCAB - 1)
    with pytest.raises(ModelError, match=f"expected token ids below {VOCAB}, the model's vocabulary, got {VOCAB}"):
        check_vocabulary(config, VOCAB)


def test_absent_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(ModelError, match="expected a GPU"):
        pick_device("cuda")
    assert pick_device("auto") == pick_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["gemma3", "falcon-alibi", "opt", "bloom", "minicpm3", "recurrent-gemma"])
@torch.no_grad()
def test_cut_model_computes_what_the_whole_one_does(name, tiny_dir):
    """Two of three layers, on a text beyond the sliding window: each layer keeps its own kind of attention."""
    base, causal = (
        load_base(source(tiny_dir(name)), World(), num_layers=2),
        load_causal(source(tiny_dir(name)), World()),
    )
    layer = f"{decoder_layers_name(causal)}.1"
    outputs = []
    for model, within in ((base, layer.partition(".")[2]), (causal, layer)):
        model.get_submodule(within).register_forward_hook(lambda _m, _a, out: outputs.append(out))
        model(input_ids=torch.arange(3, 83)[None])
    ours, theirs = (out[0] if isinstance(out, tuple) else out for out in outputs)
    assert torch.equal(ours, theirs)


def test_cut_model_has_its_own_class_and_the_whole_configuration(tiny_dir):
    whole, cut = (load_base(source(tiny_dir("gpt2")), World(), num_layers=n) for n in (None, 1))
    assert type(cut) is type(whole)
    assert cut.config.num_hidden_layers == 3
    assert [len(m.h) for m in (whole, cut)] == [3, 1]
    kept, everything = cut.state_dict(), whole.state_dict()
    assert set(everything) - set(kept) == {n for n in everything if n.startswith(("h.1.", "h.2."))}
    assert all(torch.equal(kept[n], everything[n]) for n in kept)
