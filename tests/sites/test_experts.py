"""A mixture's experts: what is stored, changed and folded equals a loop over tokens and experts."""

import csv

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DbrxConfig, JetMoeConfig, RwkvConfig

import aura_dist
from aura_dist.cli import main
from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.methods import METHODS, FromStatistics
from aura_dist.models.load import skeleton
from aura_dist.sites.find import find_sites, tap_of
from aura_dist.sites.pooling import POOLINGS, TokenMask
from aura_dist.sites.routed import Routed
from aura_dist.sites.tap import attached
from tests.models import tiny_causal
from tests.sites.mixtures import MIXTURES, listen, loop, plain_mixture

IDS = torch.arange(5, 29).reshape(2, 12)


@pytest.fixture(scope="module")
def texts_csv(sentences_csv, tmp_path_factory):
    with open(sentences_csv) as file:
        rows = list(csv.DictReader(file))[::40]
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    path.write_text("text,toxic\n" + "".join(f'"{r["text"]}",{i % 2}\n' for i, r in enumerate(rows)))
    return path


@pytest.fixture(scope="module")
def collected(tiny_dir, texts_csv, tmp_path_factory):
    """`collected(name)`: the store of a mixture's experts and routing, under every pooling."""
    made = {}

    def store(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "s.zarr"
            words = ["--model", tiny_dir(name), "--data", texts_csv, "--concepts", "toxic", "--store", made[name]]
            words += ["--modules", "experts", "routing", "--pooling", *POOLINGS, "--tokens-per-batch", 200]
            assert main(["collect", *map(str, words), "--skip-special-tokens"]) == 0
        return made[name]

    return store


@pytest.mark.parametrize("name", MIXTURES)
def test_stored_values_equal_a_loop_over_tokens_and_experts(name, collected, tiny_dir, texts_csv):
    view = aura_dist.open_store(collected(name))
    with open(texts_csv) as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    expected = plain_mixture(tiny_dir(name), [texts[r] for r in view["samples"]["row"].values], POOLINGS, first=1)
    assert {site for site, _ in expected} == set(view["activations"])
    for (site, pooling), plain in expected.items():
        np.testing.assert_allclose(view["activations"][site][pooling].values, plain, rtol=1e-5, atol=1e-5)
    assert all(np.abs(plain).max() > 0.1 for (_, pooling), plain in expected.items() if pooling == "max"), "they show"


@pytest.mark.parametrize("chosen", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
@torch.no_grad()
def test_every_implementation_is_as_without_a_tap(name, chosen):
    model = tiny_causal(name)
    model.set_experts_implementation(chosen)
    sites, seen = find_sites(model).select(["experts"]), []
    plain, configs = model(IDS).logits, [id(model.get_submodule(site.name).config) for site in sites]
    with attached(model, [(tap_of(model, site), lambda raw, alone: seen.append(raw)) for site in sites]):
        torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-5, atol=1e-5)
    assert len(seen) == len(sites)
    assert torch.equal(model(IDS).logits, plain)
    assert configs == [id(model.get_submodule(site.name).config) for site in sites]
    assert model.config._experts_implementation == chosen


def random_map(name, shift=False):
    rng = np.random.default_rng(0)
    sites = find_sites(tiny_causal(name)).select(["experts"])
    scale = {s.name: rng.uniform(0, 1.5, s.width).astype(np.float32) for s in sites}
    moved = {s.name: rng.normal(size=s.width).astype(np.float32) * 0.3 for s in sites} if shift else {}
    return Intervention(scale, moved)


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_hooked_is_the_map_where_a_token_is_routed_and_leaves_no_trace(name):
    model, intervention = tiny_causal(name), random_map(name, shift=True)
    plain, state = model(IDS).logits, {k: v.clone() for k, v in model.state_dict().items()}
    site = next(iter(intervention.scale))
    tap = tap_of(model, next(s for s in find_sites(model).sites if s.name == site))
    first, calls, seen = intervention.restricted([site]), listen(model), []
    with aura_dist.intervene(model, first), attached(model, [(tap, lambda raw, alone: seen.append(raw))]):
        changed = model(IDS).logits
    acts_TD, routed_TE, _ = loop(model.get_submodule(site), *calls[site].pop())
    scale, shift = torch.from_numpy(first.scale[site]), torch.from_numpy(first.shift[site])
    where_TD = routed_TE.repeat_interleave(len(scale) // routed_TE.shape[1], dim=1)
    mask = TokenMask.build(np.ones((len(acts_TD), 1), np.bool_), "cpu")
    ours = mask.at(mask.last_B, seen[0])
    torch.testing.assert_close(ours, (acts_TD * scale + shift) * where_TD, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed, plain, atol=1e-2)
    assert torch.equal(model(IDS).logits, plain)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def export(directory, intervention, out):
    intervention.save(out.parent / "map")
    return main(["export", *map(str, ("--model", directory, "--intervention", out.parent / "map", "--out", out))])


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_folded_is_hooked(name, tiny_dir, tmp_path):
    intervention, model = random_map(name), AutoModelForCausalLM.from_pretrained(tiny_dir(name))
    with aura_dist.intervene(model, intervention):
        hooked = model(IDS).logits
    assert not torch.allclose(hooked, model(IDS).logits, atol=1e-2)
    assert export(tiny_dir(name), intervention, tmp_path / "out") == 0
    # OLMoE has more than ten experts, whose order is not that of their names
    folded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(folded(IDS).logits, hooked, rtol=1e-5, atol=1e-5 * float(hooked.abs().max()))


def test_shift_that_finds_no_bias_is_refused_by_name(tiny_dir, tmp_path, capsys):
    assert export(tiny_dir("qwen3-moe"), random_map("qwen3-moe", shift=True), tmp_path / "out") == 2
    assert "'model.layers.0.mlp.experts'" in capsys.readouterr().err


def test_every_method_of_statistics_fits_experts_and_leaves_the_routing_out(collected, tiny_dir, tmp_path, capsys):
    store = str(collected("qwen3-moe"))
    assert main(["score", "--store", store]) == 0
    fit = ["fit", "--store", store, "--concept", "toxic", "--out", str(tmp_path / "map")]
    for method in [name for name, row in METHODS.items() if isinstance(row, FromStatistics)]:
        assert main([*fit, "--method", method]) == 0
        fitted = Intervention.load(tmp_path / "map")
        assert set(fitted.sites) == {f"model.layers.{i}.mlp.experts" for i in range(3)}
        assert fitted.num_changed > 0
    prompt = ["--prompt", "you are", "--max-new-tokens", "4", "--intervention", str(tmp_path / "map")]
    assert main(["generate", "--model", str(tiny_dir("qwen3-moe")), *prompt]) == 0
    capsys.readouterr()
    assert main([*fit, "--method", "aura", "--modules", "routing"]) == 2
    assert "that an intervention can change, got 'model.layers.0.mlp.experts:routed'" in capsys.readouterr().err


def test_routing_cannot_be_changed(tiny_dir):
    site = "model.layers.0.mlp.experts:weight"
    changed = aura_dist.intervene(tiny_causal("qwen3-moe"), Intervention({site: np.zeros(4, np.float32)}))
    with pytest.raises(ModelError, match=f"{site}.*that an intervention can change"), changed:
        pass


def random_rows(num_texts, num_tokens, num_experts, width, dtype):
    """Routed rows in a random order, some of experts elsewhere, and the same values as [B, T, D]."""
    generator = torch.Generator().manual_seed(num_tokens)
    expert_TK = torch.rand((num_texts * num_tokens, num_experts + 1), generator=generator).topk(2).indices
    token_S = torch.arange(len(expert_TK)).repeat_interleave(2)
    values = torch.randn((len(token_S), width), generator=generator).to(dtype)
    order = torch.randperm(len(token_S), generator=generator)
    dense = torch.zeros((len(expert_TK), num_experts + 1, width), dtype=dtype)
    dense[token_S, expert_TK.reshape(-1)] = values
    routed = Routed(values[order], token_S[order], expert_TK.reshape(-1)[order], num_experts, len(expert_TK))
    return routed, dense[:, :num_experts].reshape(num_texts, num_tokens, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [1, 5])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_routed_rows_are_pooled_as_their_dense_values(pooling, num_experts, dtype):
    routed, acts_BTD = random_rows(3, 9, num_experts, 4, dtype)
    mask_BT = np.ones((3, 9), np.bool_)
    mask_BT[0, 4:] = mask_BT[1, [0, 3]] = False
    mask_BT[2, 1:] = False
    mask, how = TokenMask.build(mask_BT, "cpu"), POOLINGS[pooling]
    ours, plain = how.pool(mask, routed), how.pool(mask, acts_BTD)
    sums = pooling in ("mean", "mean_square")  # of as many values as were routed, or of zeros too
    torch.testing.assert_close(ours, plain, rtol=1e-6 if sums else 0, atol=1e-6 if sums else 0)
    if how.of_token:
        counts = [mask.count_first(plain, acts, how.of_token) for acts in (routed, acts_BTD)]
        assert torch.equal(*counts)
    spoilt = Routed(routed.values_SI.clone(), routed.token_S, routed.expert_S, num_experts, routed.num_tokens)
    spoilt.values_SI[(spoilt.token_S == 18) & (spoilt.expert_S < num_experts)] = torch.nan
    assert how.pool(mask, spoilt)[2].isnan().any(), "a NaN shows"


def test_experts_that_transformers_computes_otherwise_are_named():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    table = find_sites(skeleton(JetMoeConfig(**sizes, num_key_value_heads=2, kv_channels=8, num_local_experts=2)))
    assert "model.layers.0.mlp.output_linear.weight" in table.experts
    with pytest.raises(ModelError, match=r"'experts' matches nothing.* 8 expert parameters .* cannot be captured"):
        table.select(["experts"])
    assert not any(s.kind == "heads" for s in table.sites), "keys and values are no output projection"
    attention = {"kv_n_heads": 2, "rope_theta": 1e4}
    experts = {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2}
    dbrx = DbrxConfig(d_model=32, n_heads=4, n_layers=1, attn_config=attention, ffn_config=experts)
    place = "transformer.blocks.0.ffn.experts.mlp"
    assert find_sites(skeleton(dbrx)).experts == tuple(f"{place}.{name}" for name in ("w1", "v1", "w2"))
    rwkv = RwkvConfig(**sizes, attention_hidden_size=32, context_length=64)
    assert not find_sites(skeleton(rwkv)).experts, "vectors of three dims"


def test_fused_kernels_are_refused_by_name():
    model = tiny_causal("qwen3-moe")
    model.config._experts_implementation_internal = "sonicmoe"
    tap = tap_of(model, find_sites(model).select(["experts"])[0])
    with pytest.raises(ModelError, match=r"shows hidden values \(eager, grouped_mm, batched_mm\), got 'sonicmoe'"):
        tap.attach(model, lambda raw, alone: None)


def test_plan_counts_the_experts(tiny_dir, texts_csv, capsys):
    words = ["--model", str(tiny_dir("qwen3-moe")), "--data", str(texts_csv), "--concepts", "toxic"]
    assert main(["plan", *words, "--modules", "experts", "routing"]) == 0
    text = capsys.readouterr().out
    assert f"{3 * (4 * 24 + 2 * 4):,} neurons" in text
    assert "not captured" not in text
