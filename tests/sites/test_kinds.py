"""Inputs of linear layers and the residual stream: found, collected, changed and folded as plain hooks have them."""

import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM

import aura_dist
from aura_dist.cli import main
from aura_dist.errors import ModelError
from aura_dist.interventions.hooks import laid_over
from aura_dist.interventions.methods import METHODS, FromStatistics
from aura_dist.models.load import skeleton
from aura_dist.models.strategies.tensor_plan import seen_columns, tensor_plan
from aura_dist.sites.find import find_sites, tap_of
from aura_dist.sites.kinds import kind_words, matching
from tests.models import MIXTURE_CONFIGS, ODD_CONFIGS, TINY_CONFIGS
from tests.sites.supported import (
    ARCHITECTURES,
    README,
    begin,
    checked_row,
    exported,
    header,
    hooked,
    logits,
    random_map,
)

CONFIGS = TINY_CONFIGS | ODD_CONFIGS | MIXTURE_CONFIGS
# name → one site of a layer of `neurons` and `heads`, in layer 1
PLACES = {
    "llama": ("model.layers.1.mlp.down_proj:input 80", "model.layers.1.self_attn.o_proj:input 48"),
    "opt": ("model.decoder.layers.1.fc2:input 80", "model.decoder.layers.1.self_attn.out_proj:input 48"),
    "gpt2": ("transformer.h.1.mlp.c_proj:input 192", "transformer.h.1.attn.c_proj:input 48"),
    "mpt": ("transformer.blocks.1.ffn.down_proj:input 192", "transformer.blocks.1.attn.out_proj:input 48"),
    "phi3": ("model.layers.1.mlp.down_proj:input 80", "model.layers.1.self_attn.o_proj:input 48"),
    "qwen3-next": (
        "model.layers.1.mlp.shared_expert.down_proj:input 32", "model.layers.1.self_attn.o_proj:input 48",
    ),
    "deepseek-v3": (
        "model.layers.1.mlp.shared_experts.down_proj:input 24", "model.layers.1.self_attn.o_proj:input 48",
    ),
    "minicpm3": ("model.layers.1.mlp.down_proj:input 80", "model.layers.1.self_attn.o_proj:input 48"),
    "recurrent-gemma": ("model.layers.1.mlp_block.down_proj:input 40", None),  # a recurrent layer
    "mixtral": (None, "model.layers.1.self_attn.o_proj:input 48"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_neurons_and_heads_are_found_by_their_place(name):
    sites = [s for s in find_sites(skeleton(CONFIGS[name]())).sites if s.layer == 1]
    for kind, place in zip(("neurons", "heads"), PLACES[name], strict=True):
        assert [f"{s.name} {s.width}" for s in sites if s.kind == kind] == [place] * (place is not None), kind
    inputs = {s.name for s in sites if s.name.endswith(":input")}
    assert inputs == {f"{s.name}:input" for s in sites if s.kind in ("mlp", "attention")}, "each linear layer's, once"
    assert [s.name.rpartition(".")[2] for s in sites if s.kind == "residual"] == ["1"]


def test_output_projection_with_a_capital_letter_is_found():
    how = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}
    sites = find_sites(skeleton(hf.ModernBertDecoderConfig(**how))).sites
    assert [s.name for s in sites if s.kind == "heads"] == ["model.layers.0.attn.Wo:input"]


def test_hidden_width_where_attention_reads_two_states():
    how = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    blocks = {"layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 4}
    sites = find_sites(skeleton(hf.Zamba2Config(**how, **blocks))).sites
    assert [s.width for s in sites if s.kind == "residual"] == [48, 48]
    found = [s.name for s in sites if s.kind in ("neurons", "heads")]
    within = "model.layers.1.shared_transformer"
    assert sorted(found) == [f"{within}.feed_forward.down_proj:input", f"{within}.self_attn.o_proj:input"]


def test_kind_that_a_model_lacks_is_named_with_what_there_is():
    table = find_sites(skeleton(CONFIGS["mixtral"]()))
    with pytest.raises(ModelError, match=r"'neurons' matches nothing in Mixtral.*neurons: 0, heads: 3 \(model.*_proj:"):
        table.select(["neurons"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_equals_plain_hooks_and_its_folds(name, tiny_dir, tmp_path):
    row = checked_row(name, tiny_dir(name), tmp_path)
    assert row in README.read_text(), "bring the table up to date: python -m tests.sites.supported"


def test_table_of_the_readme_has_these_rows_alone():
    table = README.read_text().partition(begin())[2].partition("\n\n")[0]
    names = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert header() in table
    assert names == list(ARCHITECTURES)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["neurons", "heads", "inputs", "residual"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-rotary", "bloom", "opt"])
def test_kind_is_changed_and_restored_bit_for_bit(name, kind, tiny_dir):
    model, intervention = AutoModelForCausalLM.from_pretrained(tiny_dir(name)), random_map(tiny_dir(name), kind)
    plain = logits(model)
    with aura_dist.intervene(model, intervention, strength=0):
        assert torch.equal(logits(model), plain)
    with aura_dist.intervene(model, intervention):
        changed = logits(model)
    with laid_over(model.base_model, intervention, 1.0):
        assert torch.equal(logits(model), changed)
    assert not torch.allclose(changed, plain, atol=1e-2)
    assert torch.equal(logits(model), plain)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["neurons", "residual"])
def test_change_is_that_of_a_hook_by_hand(kind, tiny_dir):
    model, intervention = AutoModelForCausalLM.from_pretrained(tiny_dir("llama")), random_map(tiny_dir("llama"), kind)
    with aura_dist.intervene(model, intervention):
        ours = logits(model)
    for site in intervention.sites:
        scale, shift = (torch.tensor(v) for v in intervention.map_of(site))
        module = model.get_submodule(site.removesuffix(":input"))
        if kind == "residual":
            module.register_forward_hook(lambda _m, _a, out, w=scale, b=shift: out * w + b)
        else:
            module.register_forward_pre_hook(lambda _m, args, w=scale, b=shift: (args[0] * w + b,))
    assert torch.equal(ours, logits(model))


def test_residual_is_refused_by_export(tiny_dir, tmp_path, capsys):
    assert exported(tiny_dir("llama"), random_map(tiny_dir("llama"), "residual"), tmp_path) == 2
    assert "'model.layers.0': a map of a residual site cannot be folded" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_maps_of_inputs_and_outputs_of_the_same_modules_fold_together(name, tiny_dir, tmp_path):
    """Both change one weight; where there is no bias, the shifts of both make one."""
    intervention = random_map(tiny_dir(name), "neurons", "mlp", "heads", "attention", "inputs")
    assert exported(tiny_dir(name), intervention, tmp_path) == 0
    folded, expected = (
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")),
        hooked(tiny_dir(name), intervention),
    )
    assert (folded - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def scored(tiny_dir, sentences_csv, tmp_path_factory):
    """A scored store of Llama's new kinds."""
    store = tmp_path_factory.mktemp("kinds") / "store.zarr"
    data = ["--data", sentences_csv, "--concepts", "toxic", "--num-positive", "30", "--num-negative", "30"]
    data += ["--modules", "neurons", "heads", "residual", "--pooling", "max", "mean"]
    assert main(["plan", "--model", str(tiny_dir("llama")), *data]) == 0
    assert main(["collect", "--model", str(tiny_dir("llama")), *data, "--store", str(store)]) == 0
    assert main(["score", "--store", str(store), "--dask", "threads"]) == 0
    return store


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if isinstance(row, FromStatistics)])
def test_every_method_fits_and_folds(method, scored, tiny_dir, tmp_path):
    fit = ["fit", "--store", str(scored), "--concept", "toxic", "--method", method, "--modules", "!residual"]
    assert main([*fit, "--out", str(tmp_path / "map")]) == 0
    intervention = aura_dist.Intervention.load(tmp_path / "map")
    assert {site.rpartition(":")[2] for site in intervention.sites} == {"input"}
    assert exported(tiny_dir("llama"), intervention, tmp_path) == 0
    folded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    expected = hooked(tiny_dir("llama"), intervention)
    assert (folded - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_other_verbs_take_the_new_kinds(scored, tiny_dir, tmp_path, capsys):
    fit = ["fit", "--store", str(scored), "--concept", "toxic", "--out", str(tmp_path / "map")]
    assert main(fit) == 0, "on the residual stream too"
    use = ["--model", str(tiny_dir("llama")), "--intervention", str(tmp_path / "map")]
    assert main(["generate", *use, "--prompt", "You are", "--max-new-tokens", "4"]) == 0
    texts = Path(__file__).parents[2] / "aura_dist" / "demo" / "passages.csv"
    assert main(["evaluate", *use, "--perplexity-texts", str(texts), "--out", str(tmp_path / "r.json")]) == 0
    capsys.readouterr()
    assert main(["status", str(scored.parent)]) == 0
    assert set(aura_dist.top_neurons(scored, "toxic", 9999)["kind"]) == {"neurons", "heads", "residual"}


def test_report_sets_the_kinds_side_by_side(scored, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    assert main(["report", str(scored.parent), "--out", str(tmp_path / "page.html")]) == 0
    page, drawn = (tmp_path / "page.html").read_text(), (tmp_path / "page-pictures" / "kinds-1.svg").read_text()
    assert all(f">{kind}</text>" in drawn for kind in ("neurons", "heads", "residual"))
    assert "The kinds of modules side by side" in page
    assert "AUROC by layer of residual: median" in page, "the layers are one module of the page, not one each"


def test_rank_sees_its_slice_of_an_input():
    model = skeleton(TINY_CONFIGS["llama"]())
    plan, sites = tensor_plan(model, 2), {s.kind: s for s in find_sites(model).sites}
    assert seen_columns(plan, tap_of(model, sites["neurons"]), 2) == [((0, 40),), ((40, 80),)]
    assert seen_columns(plan, tap_of(model, sites["heads"]), 2) == [((0, 24),), ((24, 48),)]
    assert seen_columns(plan, tap_of(model, sites["inputs"]), 2) == [((0, 48),)] * 2
    assert seen_columns(plan, tap_of(model, sites["residual"]), 2) == [((0, 48),)] * 2
    phi3 = skeleton(TINY_CONFIGS["phi3"]())  # splits the input of its row-parallel layers by itself
    down = next(s for s in find_sites(phi3).sites if s.kind == "neurons")
    assert seen_columns(tensor_plan(phi3, 2), tap_of(phi3, down), 2) == [((0, 80),)] * 2


def test_words_of_modules():
    sites = find_sites(skeleton(TINY_CONFIGS["llama"]())).sites
    assert kind_words()["all"] == "attention and mlp"
    assert matching(sites, "all") == matching(sites, "attention") | matching(sites, "mlp")
    assert matching(sites, "*.down_proj:input") == matching(sites, "neurons")
