"""What `mlp`, `attention` and `norm` mean for each architecture."""

import pytest
import torch
import transformers as hf

from aura_dist.errors import ModelError
from aura_dist.models.load import ModelSource, load_base, skeleton
from aura_dist.ranks.world import World
from aura_dist.sites.find import find_sites
from aura_dist.sites.kinds import KINDS
from tests.models import LLAMA_LIKE, ODD_CONFIGS, TINY_CONFIGS

SPLIT_ATTENTION = "self_attn.q_proj 48, self_attn.k_proj 24, self_attn.v_proj 24, self_attn.o_proj 48"
GATED_MLP = "mlp.gate_proj 80, mlp.up_proj 80, mlp.down_proj 48"
TWO_NORMS = "input_layernorm 48, post_attention_layernorm 48"
FALCON_MLP = "mlp.dense_h_to_4h 192, mlp.dense_4h_to_h 48"

# name → layers' prefix, attention, mlp, norm of one layer
TABLE = {
    "gpt2": ("transformer.h", "attn.c_attn 144, attn.c_proj 48", "mlp.c_fc 192, mlp.c_proj 48", "ln_1 48, ln_2 48"),
    "falcon-rotary": (
        "transformer.h", "self_attention.query_key_value 72, self_attention.dense 48", FALCON_MLP, "input_layernorm 48",
    ),
    "falcon-alibi": (
        "transformer.h", "self_attention.query_key_value 72, self_attention.dense 48", FALCON_MLP,
        "post_attention_layernorm 48, input_layernorm 48",
    ),
    "falcon-40b-style": (
        "transformer.h", "self_attention.query_key_value 96, self_attention.dense 64",
        "mlp.dense_h_to_4h 256, mlp.dense_4h_to_h 64", "ln_attn 64, ln_mlp 64",
    ),
    "mpt": (
        "transformer.blocks", "attn.Wqkv 144, attn.out_proj 48", "ffn.up_proj 192, ffn.down_proj 48",
        "norm_1 48, norm_2 48",
    ),
    "llama": ("model.layers", SPLIT_ATTENTION, GATED_MLP, TWO_NORMS),
    "mistral": ("model.layers", SPLIT_ATTENTION, GATED_MLP, TWO_NORMS),
    "gemma3": (
        "model.layers", SPLIT_ATTENTION, GATED_MLP,
        f"{TWO_NORMS}, pre_feedforward_layernorm 48, post_feedforward_layernorm 48",
    ),
    "opt": (
        "model.decoder.layers",
        "self_attn.k_proj 48, self_attn.v_proj 48, self_attn.q_proj 48, self_attn.out_proj 48",
        "fc1 80, fc2 48", "self_attn_layer_norm 48, final_layer_norm 48",
    ),
    "bloom": (
        "transformer.h", "self_attention.query_key_value 144, self_attention.dense 48", FALCON_MLP, TWO_NORMS,
    ),
    "qwen3": ("model.layers", SPLIT_ATTENTION, GATED_MLP, TWO_NORMS),
    "phi3": (
        "model.layers", "self_attn.o_proj 48, self_attn.qkv_proj 96", "mlp.gate_up_proj 160, mlp.down_proj 48",
        TWO_NORMS,
    ),
    "qwen3-moe": ("model.layers", SPLIT_ATTENTION, "", TWO_NORMS),
}  # fmt: skip


def test_the_table_has_every_architecture():
    assert set(TABLE) == set(TINY_CONFIGS)


@pytest.mark.parametrize("name", TABLE)
def test_kinds(name):
    prefix, *kinds = TABLE[name]
    table = find_sites(skeleton(TINY_CONFIGS[name]()))
    for kind, expected in zip(("attention", "mlp", "norm"), kinds, strict=True):
        for layer in range(3):
            found = [f"{s.name} {s.width}" for s in table.sites if s.kind == kind and s.layer == layer]
            assert found == [f"{prefix}.{layer}.{entry}" for entry in expected.split(", ") if entry]


@pytest.mark.parametrize("name", TABLE)
def test_names_of_the_base_are_those_of_the_causal_model(name, tiny_dir):
    causal = hf.AutoModelForCausalLM.from_pretrained(tiny_dir(name))
    base = load_base(ModelSource(str(tiny_dir(name)), None, "float32"), World())
    within = {n for n, _ in causal.named_modules() if n.startswith(f"{causal.base_model_prefix}.")}
    assert {f"{base.base_model_prefix}.{n}" for n, _ in base.named_modules() if n} == within
    assert {s.name.partition(":")[0] for s in find_sites(skeleton(causal.config)).sites} <= within


def test_experts_are_no_mlp():
    table = find_sites(skeleton(TINY_CONFIGS["qwen3-moe"]()))
    assert not table.experts
    assert [f"{s.name} {s.width}" for s in table.sites if s.layer == 1 and s.kind in ("experts", "routing")] == [
        "model.layers.1.mlp.experts 96", "model.layers.1.mlp.experts:routed 4", "model.layers.1.mlp.experts:weight 4",
    ]  # fmt: skip
    with pytest.raises(ModelError, match=r"'mlp' matches nothing in Qwen3MoeForCausalLM; found .*experts: 3 \(model"):
        table.select(["mlp"])


def test_kinds_and_patterns_together_in_model_order():
    table = find_sites(skeleton(TINY_CONFIGS["llama"]()))
    names = [s.name for s in table.select(["*.1.mlp.down_proj", "norm", "*.1.mlp.*"])]
    outputs = [s for s in table.sites if not s.name.endswith(":input")]
    assert names == [s.name for s in outputs if s.kind == "norm" or ".1.mlp." in s.name]
    assert len(table.select(["all"])) == 3 * 7
    assert not any("lm_head" in s.name for s in table.select(["*"]))


def test_one_pattern_without_a_match_is_an_error_beside_one_with():
    with pytest.raises(ModelError, match=r"'lm_head' matches nothing"):
        find_sites(skeleton(TINY_CONFIGS["llama"]())).select(["mlp", "lm_head"])


def test_text_layers_of_a_model_that_sees():
    text = {**LLAMA_LIKE, "head_dim": 12}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2}
    config = hf.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    sites = find_sites(skeleton(config)).select(["all"])
    assert {s.layer for s in sites} == {0, 1, 2}
    assert not any("vision" in s.name for s in sites)


def test_skeleton_takes_no_memory():
    model = skeleton(hf.LlamaConfig())
    assert all(p.device == torch.device("meta") for p in model.parameters())


def test_layers_named_after_attention_keep_their_mlp():
    config = hf.JambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1,
    )  # fmt: skip
    layer = [s for s in find_sites(skeleton(config)).sites if s.layer == 1]
    assert [s.name.rpartition(".")[2] for s in layer if s.kind == "attention"] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]
    assert [s.name.rpartition(".")[2] for s in layer if s.kind == "mlp"] == ["gate_proj", "up_proj", "down_proj"]
    assert len([s for s in layer if s.kind == "norm"]) == 2


def test_layers_that_a_model_does_not_name():
    config = hf.OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    model = skeleton(config)
    assert not model._no_split_modules
    sites = find_sites(model).select(["all"])
    assert {s.layer for s in sites} == {0, 1, 2}
    assert [(s.name, s.width) for s in sites[-2:]] == [
        ("transformer.h.2.mlp.c_fc", 128),
        ("transformer.h.2.mlp.c_proj", 32),
    ]


def test_lists_that_cannot_be_told_apart_are_refused():
    config = hf.XLMConfig(vocab_size=64, emb_dim=32, n_layers=2, n_heads=4)
    with pytest.raises(ModelError, match=r"found transformer\.attentions and transformer\.ffns"):
        find_sites(skeleton(config))


def test_vision_layers_are_not_taken_where_a_model_names_none():
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 2}
    config = hf.GitConfig(
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        vocab_size=64, hidden_size=32, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=2,
    )  # fmt: skip
    model = skeleton(config)
    assert not model._no_split_modules
    sites = find_sites(model).sites
    assert {s.layer for s in sites} == {0, 1, 2}
    assert not any("vision" in s.name for s in sites)


def kinds_of(name, layer=0):
    """Kind → last parts of the names in a layer."""
    sites = [s for s in find_sites(skeleton(ODD_CONFIGS[name]())).sites if s.layer == layer]
    return {kind: {s.name.rpartition(".")[2] for s in sites if s.kind == kind} for kind in KINDS}


def outputs_of(name, layer=0):
    """The same of the kinds of the paper."""
    return {kind: names for kind, names in kinds_of(name, layer).items() if kind in ("attention", "mlp", "norm")}


def test_linear_attention_is_attention():
    assert outputs_of("qwen3-next", 0) == {
        "attention": {"in_proj_qkvz", "in_proj_ba", "out_proj"},
        "mlp": {"gate_proj", "up_proj", "down_proj", "shared_expert_gate"},
        "norm": {"input_layernorm", "post_attention_layernorm"},
    }
    assert outputs_of("qwen3-next", 1)["attention"] == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert kinds_of("qwen3-next", 0)["heads"] == {"out_proj:input"}
    assert kinds_of("qwen3-next", 1)["heads"] == {"o_proj:input"}


def test_router_is_no_site():
    table = find_sites(skeleton(ODD_CONFIGS["phimoe"]()))
    assert not any("router" in s.name for s in table.sites)
    assert {s.kind for s in table.sites} == {"attention", "norm", "heads", "inputs", "residual", "experts", "routing"}


def test_convolution_is_no_expert():
    table = find_sites(skeleton(ODD_CONFIGS["qwen3-next"]()))
    assert not table.experts
    assert any(p.ndim == 3 for n, p in skeleton(ODD_CONFIGS["qwen3-next"]()).named_parameters() if "conv1d" in n)
