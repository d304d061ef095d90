"""Plans for tensor parallelism, on models without weights."""

import pytest

from aura_dist.errors import ConfigError, ModelError
from aura_dist.models.load import skeleton
from aura_dist.models.strategies.tensor_plan import seen_columns, tensor_plan
from aura_dist.sites.find import find_sites, own_names
from aura_dist.sites.outputs import LinearTap
from aura_dist.sites.tap import generic
from tests.models import ODD_CONFIGS, TINY_CONFIGS


@pytest.mark.parametrize("name", sorted(set(TINY_CONFIGS) - {"gpt2"}))
@pytest.mark.parametrize("part", ["base", "causal"])
def test_every_plan_splits_every_layer_but_norms(name, part):
    causal = skeleton(TINY_CONFIGS[name]())
    model = causal if part == "causal" else causal.base_model
    plan = tensor_plan(model, 2)
    own_name = own_names(model)
    for site in find_sites(causal).select(["all", "norm"]):
        style = plan.get(generic(own_name(site.name)))
        assert (site.kind == "norm") == (style is None), site.name


@pytest.mark.parametrize(("num_ranks", "style"), [(2, "colwise"), (4, "colwise_gather_output")])
def test_heads_that_cannot_be_shared_out_stay_whole(num_ranks, style):
    model = skeleton(TINY_CONFIGS["llama"]())  # 4 heads, 2 of keys and values
    assert tensor_plan(model, num_ranks)["model.layers.*.self_attn.k_proj"] == style
    assert tensor_plan(model, num_ranks)["model.layers.*.mlp.up_proj"] == "colwise"


def test_more_ranks_than_hidden_values_are_refused():
    with pytest.raises(ModelError, match="expected at most 48 ranks, because LlamaForCausalLM has"):
        tensor_plan(skeleton(TINY_CONFIGS["llama"]()), 49)
    assert tensor_plan(skeleton(TINY_CONFIGS["llama"]()), 48)


def test_conv1d_is_refused_by_name_with_what_can():
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel.*Conv1D.*--sharding fsdp, zero3"):
        tensor_plan(skeleton(TINY_CONFIGS["gpt2"]()), 2)


def test_architecture_without_a_plan():
    with pytest.raises(ModelError, match=r"RecurrentGemma.*no plan.*--tensor-plan"):
        tensor_plan(skeleton(ODD_CONFIGS["recurrent-gemma"]()), 2)


def test_users_plan(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("transformer.h.*.mlp.dense_h_to_4h: colwise\ntransformer.h.*.mlp.dense_4h_to_h: rowwise\n")
    causal = skeleton(TINY_CONFIGS["falcon-rotary"]())
    assert tensor_plan(causal, 2, str(file))["transformer.h.*.mlp.dense_h_to_4h"] == "colwise"
    assert tensor_plan(causal.base_model, 2, str(file))["h.*.mlp.dense_h_to_4h"] == "colwise"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("model.layers.*.mlp.up: colwise", ModelError, "no module 'model.layers.\\*.mlp.up'"),
        ("model.layers.*.mlp.up_proj: sideways", ConfigError, "expected one of .*colwise.*, got 'sideways'"),
        ("- colwise", ConfigError, "expected module names and styles, got list"),
        ("", ConfigError, "expected module names and styles"),
        ("a: [", ConfigError, "cannot be read"),
    ],
)
def test_bad_plans_of_a_user(text, error, message, tmp_path):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(error, match=message):
        tensor_plan(skeleton(TINY_CONFIGS["llama"]()), 2, str(tmp_path / "plan.yaml"))


def test_missing_plan():
    with pytest.raises(ConfigError, match="cannot be read"):
        tensor_plan(skeleton(TINY_CONFIGS["llama"]()), 2, "no-such-file.yaml")


def test_columns_of_a_fused_layer_are_two_intervals():
    tap = LinearTap("m", "m", 20)
    assert seen_columns({"m": "packed_colwise"}, tap, 2) == [((0, 5), (10, 15)), ((5, 10), (15, 20))]
    with pytest.raises(ModelError, match="'m' is split as 'sequence_parallel', which is not by columns"):
        seen_columns({"m": "sequence_parallel"}, tap, 2)


def test_layer_numbers_become_wildcards():
    assert generic("model.layers.12.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
