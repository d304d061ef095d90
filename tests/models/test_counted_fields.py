"""A field of the configuration that changes the logits changes the identity; one that does not count changes none."""

import copy
import json
import shutil

import pytest
import torch
import transformers as hf
from transformers import AutoConfig, AutoModelForCausalLM

from aura_dist.models.identity import NOT_COUNTED, _is_dropout, digest_of, fingerprint
from aura_dist.models.load import ModelSource
from tests.models import LLAMA_LIKE, TINY_CONFIGS, save_tiny, tiny_causal

IDS = torch.arange(5, 53)[None]  # longer than the windows of the tiny models
# what changes the logits of these models, among others
CHANGES = {
    "llama": {"hidden_act", "rms_norm_eps", "rope_parameters.rope_theta"},
    "gpt2": {"activation_function", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"},
    "falcon-rotary": {"activation", "alibi", "layer_norm_epsilon", "rope_parameters.rope_theta"},
    "gemma3": {
        "hidden_activation", "query_pre_attn_scalar", "sliding_window", "final_logit_softcapping", "layer_types",
        "use_bidirectional_attention", "rope_parameters.full_attention.rope_theta",
    },
    "qwen3-moe": {"hidden_act", "num_experts_per_tok", "norm_topk_prob", "rope_parameters.rope_theta"},
}  # fmt: skip
ACTIVATIONS = {"hidden_act", "hidden_activation", "activation", "activation_function"}
SPECIAL = {
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "architectures": ["OtherForCausalLM"],
    "problem_type": "regression",
    "transformers_version": "4.0.0",
    "dtype": "bfloat16",
    "id2label": {0: "a", 1: "b"},
    "label2id": {"a": 0, "b": 1},
    "summary_activation": "tanh",
    "sliding_window": 3,
    "query_pre_attn_scalar": 4,
    "final_logit_softcapping": 1.0,
}


def flipped(name, value):
    """Another value of the field; None where there is none of its type."""
    if name in SPECIAL:
        return SPECIAL[name]
    if name in ACTIVATIONS:
        return "relu"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.5 if value else 0.5
    return f"{value}x" if isinstance(value, str) else None


def flips(fields, path=()):
    """(Name, a copy of the fields in which it has another value), of every field; parts of a field are `a.b`."""
    for name, value in fields.items():
        if isinstance(value, dict) and name not in SPECIAL:
            for inner, changed in flips(value, (*path, name)):
                yield inner, {**fields, name: changed}
        elif name != "model_type" and (other := flipped(name, value)) is not None and other != value:
            yield ".".join((*path, name)), {**fields, name: other}


@torch.no_grad()
def logits(config, weights):
    """None where the model cannot be made, or does not hold the weights."""
    try:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
        model.load_state_dict(weights)
        output = model(IDS)
        return output[0] if isinstance(output, tuple) else output.logits
    except Exception:
        return None


@pytest.mark.parametrize("name", CHANGES)
def test_every_field(name):
    model = tiny_causal(name)
    config, weights = TINY_CONFIGS[name](), model.state_dict()
    before, identity = logits(config, weights), digest_of(config, [])
    assert before is not None
    changing, counted, left_out = set(), set(), set()
    for field, fields in flips(config.to_dict()):
        try:
            other = type(config).from_dict(fields)
        except Exception:
            continue  # refused by transformers
        if other.to_dict() == config.to_dict():
            continue  # not looked at, as a window that another field turns off
        after = logits(other, weights)
        if after is None or not torch.equal(after, before):
            changing.add(field)
        (counted if digest_of(other, []) != identity else left_out).add(field)
    both = changing & left_out
    assert not both, both
    assert changing >= CHANGES[name]
    assert all(field in NOT_COUNTED or _is_dropout(field) for field in left_out)
    assert left_out >= {
        "_name_or_path",
        "use_cache",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "dtype",
    }
    assert len(counted) > 10


def of(directory):
    return fingerprint(ModelSource(str(directory), None, "float32"), AutoConfig.from_pretrained(directory))


@pytest.mark.parametrize("name", CHANGES)
def test_saved_again_or_with_its_defaults_left_out(name, tmp_path):
    directory = save_tiny(name, tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.config.architectures, model.config.use_cache = None, False
    model.save_pretrained(tmp_path / "b", max_shard_size="60KB")
    assert of(tmp_path / "b") == of(directory)
    shutil.copytree(directory, tmp_path / "c")
    config = json.loads((directory / "config.json").read_text())
    defaults = type(model.config)().to_dict()
    kept = {field: value for field, value in config.items() if value != defaults.get(field) or field == "model_type"}
    assert len(kept) < len(config)
    (tmp_path / "c" / "config.json").write_text(json.dumps(kept))
    assert of(tmp_path / "c") == of(directory)


def test_whole_numbers_have_one_spelling(tmp_path):
    whole, real = (hf.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": t}) for t in (10000, 10000.0))
    assert digest_of(whole, []) == digest_of(real, [])


def test_parts_of_a_configuration_count(tmp_path):
    def config(**text):
        return hf.Gemma3Config(text_config={**LLAMA_LIKE, "head_dim": 12, **text})

    plain = digest_of(config(), [])
    assert digest_of(config(rms_norm_eps=0.5), []) != plain
    assert digest_of(config(hidden_activation="relu"), []) != plain
    assert digest_of(config(attention_dropout=0.5, dtype="bfloat16", pad_token_id=7), []) == plain


@pytest.mark.parametrize("kind", [hf.RobertaConfig, hf.XLMRobertaConfig, hf.XGLMConfig])
def test_padding_counts_where_positions_depend_on_it(kind):
    assert digest_of(kind(pad_token_id=1), []) != digest_of(kind(pad_token_id=3), [])


@pytest.mark.parametrize("field", ["attn_implementation", "experts_implementation"])
def test_code_of_attention_and_experts_counts_where_the_file_names_it(field, tmp_path):
    prints = set()
    for value in ("eager", None):
        directory = save_tiny("qwen3-moe", tmp_path / str(value))
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, field: value} if value else config))
        prints.add(of(directory))
    assert len(prints) == 2
