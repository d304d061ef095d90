"""Interventions in memory: exact on exit, exactly the map that was asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import aura_dist
from aura_dist.errors import InputError, ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.hooks import laid_over
from aura_dist.models.load import skeleton
from aura_dist.sites.find import find_sites
from tests.models import TINY_CONFIGS, tiny_causal

ARCHITECTURES = ["gpt2", "falcon-rotary", "falcon-40b-style", "mpt", "llama", "gemma3", "opt", "phi3"]
IDS = torch.arange(5, 29).reshape(2, 12)


def random_intervention(name, modules=("all",), shift=False, seed=0):
    rng = np.random.default_rng(seed)
    sites = find_sites(skeleton(TINY_CONFIGS[name]())).select(modules)
    scale = {s.name: rng.uniform(0, 1, s.width).astype(np.float32) for s in sites}
    moved = {s.name: rng.normal(size=s.width).astype(np.float32) for s in sites} if shift else {}
    return Intervention(scale, moved)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_strength_zero_and_leaving_are_bit_identical(name):
    model, intervention = tiny_causal(name), random_intervention(name, ("all", "norm"), shift=True)
    untouched = logits(model)
    with aura_dist.intervene(model, intervention, strength=0):
        assert torch.equal(logits(model), untouched)
    with aura_dist.intervene(model, intervention):
        assert not torch.allclose(logits(model), untouched, atol=1e-3)
    assert torch.equal(logits(model), untouched)
    with pytest.raises(RuntimeError, match="inside"), aura_dist.intervene(model, intervention):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), untouched)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("shift", [False, True])
def test_equals_hooks_by_hand(name, shift):
    model, intervention = tiny_causal(name), random_intervention(name, shift=shift)
    with aura_dist.intervene(model, intervention):
        ours = logits(model)
    for site, scale in intervention.scale.items():
        moved = torch.tensor(intervention.shift.get(site, np.zeros_like(scale)))
        weight = torch.tensor(scale)
        by_hand = lambda _m, _a, out, w=weight, b=moved: out * w + b  # noqa: E731
        model.get_submodule(site).register_forward_hook(by_hand)
    assert torch.equal(ours, logits(model))


def test_equals_weights_scaled_by_hand():
    model, intervention = tiny_causal("llama"), random_intervention("llama", ("mlp",))
    with aura_dist.intervene(model, intervention):
        ours = logits(model)
    with torch.no_grad():
        for site, scale in intervention.scale.items():
            model.get_submodule(site).weight.mul_(torch.tensor(scale)[:, None])
    torch.testing.assert_close(ours, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    model = tiny_causal("llama").to(dtype)
    site = "model.layers.1.mlp.up_proj"
    intervention = random_intervention("llama", (site,), shift=True)
    module, seen = model.get_submodule(site), {}
    plain = module.register_forward_hook(lambda _m, _a, out: seen.__setitem__("plain", out))
    with aura_dist.intervene(model, intervention):
        after = module.register_forward_hook(lambda _m, _a, out: seen.__setitem__("ours", out))
        logits(model)
    plain.remove(), after.remove()
    scale, shift = torch.tensor(intervention.scale[site]), torch.tensor(intervention.shift[site])
    assert torch.equal(seen["ours"], (seen["plain"].float() * scale + shift).to(dtype))


def test_strength_interpolates():
    model, intervention = tiny_causal("gpt2"), random_intervention("gpt2", shift=True)
    half = Intervention(
        {s: 1 + np.float32(0.5) * (v - 1) for s, v in intervention.scale.items()},
        {s: np.float32(0.5) * v for s, v in intervention.shift.items()},
    )
    with aura_dist.intervene(model, intervention, strength=0.5):
        ours = logits(model)
    with aura_dist.intervene(model, half):
        torch.testing.assert_close(ours, logits(model), rtol=1e-5, atol=1e-5)


def test_composition_is_nesting():
    model = tiny_causal("llama")
    first = random_intervention("llama", ("mlp",), shift=True)
    second = random_intervention("llama", ("all",), shift=True, seed=1)
    with aura_dist.intervene(model, first), aura_dist.intervene(model, second):
        nested = logits(model)
    with aura_dist.intervene(model, second @ first):
        torch.testing.assert_close(logits(model), nested, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_works_on_the_base_model():
    model, intervention = tiny_causal("falcon-rotary"), random_intervention("falcon-rotary")
    with aura_dist.intervene(model, intervention):
        through_causal = model.base_model(input_ids=IDS).last_hidden_state
    with aura_dist.intervene(model.base_model, intervention):
        assert torch.equal(model.base_model(input_ids=IDS).last_hidden_state, through_causal)


@pytest.mark.parametrize(
    ("site", "width", "message"),
    [
        ("model.layers.7.mlp.up_proj", 80, "it has no module 'model.layers.7.mlp.up_proj'"),
        ("model.layers.0.mlp.up_proj", 79, "expected 80 neurons at 'model.layers.0.mlp.up_proj', got 79"),
    ],
)
def test_what_does_not_fit_is_refused_untouched(site, width, message):
    model = tiny_causal("llama")
    good = random_intervention("llama").scale
    bad = Intervention({**good, site: np.zeros(width, np.float32)})
    with pytest.raises(ModelError, match=message), aura_dist.intervene(model, bad):
        pass
    assert not any(m._forward_hooks for m in model.modules())


def test_nested_contexts_leave_nothing_behind():
    model = tiny_causal("llama")
    first, second = random_intervention("llama"), random_intervention("llama", seed=1)
    untouched = logits(model)
    others = model.get_submodule("model.layers.0.mlp").register_forward_hook(lambda _m, _a, out: out + 1)
    with_other_hook = logits(model)
    with aura_dist.intervene(model, first):
        outer = logits(model)
        with pytest.raises(KeyError), aura_dist.intervene(model, second):
            raise KeyError
        assert torch.equal(logits(model), outer)
    assert torch.equal(logits(model), with_other_hook)
    others.remove()
    assert torch.equal(logits(model), untouched)


@torch.no_grad()
def test_generation_under_an_intervention_is_the_argmax_loop():
    """With and without cache: every step sees the intervention."""
    model, intervention = tiny_causal("gemma3"), random_intervention("gemma3")
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    plain = model.generate(IDS, **settings)
    with aura_dist.intervene(model, intervention):
        ids = IDS
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(model.generate(IDS, **settings), ids)
        assert torch.equal(model.generate(IDS, use_cache=False, **settings), ids)
    assert not torch.equal(plain, ids)
    assert torch.equal(model.generate(IDS, **settings), plain)


def test_model_of_another_class_is_refused():
    with pytest.raises(ModelError, match=r"does not fit GPT2LMHeadModel: it has no module 'model\.layers"):
        aura_dist.intervene(tiny_causal("gpt2"), random_intervention("llama")).__enter__()


def test_senseless_strength_is_refused_untouched():
    model = tiny_causal("llama")
    for strength in (-1.0, float("nan")):
        with pytest.raises(InputError), aura_dist.intervene(model, random_intervention("llama"), strength):
            pass
    assert not any(m._forward_hooks for m in model.modules())


def test_what_another_hook_saw_is_not_changed_behind_its_back():
    """Outputs are scaled in place only where nobody else can hold them; the values are the same either way."""
    model, intervention = tiny_causal("llama"), random_intervention("llama", ("mlp",), shift=True)
    with aura_dist.intervene(model, intervention):
        in_place = logits(model)
        with torch.enable_grad():
            assert torch.equal(model(input_ids=IDS).logits.detach(), in_place)
    seen = {}
    for site in intervention.sites:
        hook = lambda _m, _a, out, s=site: seen.__setitem__(s, (out, out.clone()))  # noqa: E731
        model.get_submodule(site).register_forward_hook(hook)
    with aura_dist.intervene(model, intervention):
        assert torch.equal(logits(model), in_place)
    assert len(seen) == len(intervention.sites)
    assert all(torch.equal(held, copy) for held, copy in seen.values())


class EightBitLinear(nn.Module):
    """As quantised layers are: no `nn.Linear`, integer weights, float output."""

    def __init__(self, linear, output=lambda out: out):
        super().__init__()
        self.out_features = linear.out_features
        self.step = nn.Parameter(linear.weight.abs().amax(dim=1) / 127)
        self.weight = nn.Parameter((linear.weight / self.step[:, None]).round().to(torch.int8), requires_grad=False)
        self.output = output

    def forward(self, x):
        return self.output(x @ (self.weight.to(x.dtype) * self.step[:, None]).T)


def quantised(**arguments):
    """A tiny Llama whose MLP layers are quantised."""
    model = tiny_causal("llama")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".mlp." in name:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, EightBitLinear(module, **arguments))
    return model.requires_grad_(False)


def test_hooks_work_on_quantised_layers():
    model, intervention = quantised(), random_intervention("llama", ("mlp", "norm"), shift=True)
    untouched = logits(model)
    with aura_dist.intervene(model, intervention):
        ours = logits(model)
    for site in intervention.sites:
        weight, bias = (torch.tensor(v[site]) for v in (intervention.scale, intervention.shift))
        model.get_submodule(site).register_forward_hook(lambda _m, _a, out, w=weight, b=bias: out * w + b)
    assert torch.equal(ours, logits(model))
    assert not torch.allclose(ours, untouched, atol=1e-3)


def test_collection_lays_an_intervention_over_quantised_layers():
    """And, of a model that was cut after a layer, over those that are left."""
    model, intervention = quantised(), random_intervention("llama")
    with aura_dist.intervene(model, intervention):
        expected = model.model(input_ids=IDS).last_hidden_state
    intervention = replace(intervention, scale={**intervention.scale, "model.layers.9.mlp.up_proj": np.ones(3)})
    with laid_over(model.model, intervention, 1.0):
        assert torch.equal(model.model(input_ids=IDS).last_hidden_state, expected)


def test_module_that_the_forward_leaves_out_is_named():
    model, intervention = tiny_causal("llama"), random_intervention("llama", ("mlp",))
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)
    with (
        pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.down_proj' was not called"),
        aura_dist.intervene(model, intervention),
    ):
        logits(model)
    assert not any(m._forward_hooks for m in model.modules())
    with aura_dist.intervene(model, intervention.restricted([f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up")])):
        logits(model)


def test_module_that_a_decoder_within_a_base_model_leaves_out_is_named():
    """OPT calls its base model's decoder, never the base model."""
    model, intervention = tiny_causal("opt"), random_intervention("opt", ("mlp",))
    model.model.decoder.layers[1].fc2.__class__ = type("Skipped", (nn.Linear,), {"__call__": nn.Linear.forward})
    with pytest.raises(ModelError, match=r"fc2' was not called"), aura_dist.intervene(model, intervention):
        logits(model)


def test_gradients_pass_after_a_forward_in_inference_mode():
    model = tiny_causal("llama")
    with aura_dist.intervene(model, random_intervention("llama", shift=True)):
        with torch.inference_mode():
            expected = model(input_ids=IDS).logits
        got = model(input_ids=IDS).logits
        got.sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_what_another_hook_has_seen_is_not_changed_in_place():
    model, intervention = tiny_causal("llama"), random_intervention("llama", ("mlp",))
    seen = []
    kept = lambda module, args, output: seen.append((output, output.clone()))  # noqa: E731
    hook = torch.nn.modules.module.register_module_forward_hook(lambda m, a, o: kept(m, a, o) if m is first else None)
    first = model.model.layers[0].mlp.up_proj
    try:
        with aura_dist.intervene(model, intervention):
            logits(model)
    finally:
        hook.remove()
    assert torch.equal(*seen[0])


def test_quantised_layers_of_another_width_are_refused():
    narrow = Intervention({"model.layers.0.mlp.up_proj": np.ones(79, np.float32) / 2})
    with pytest.raises(ModelError, match="expected 80 neurons at"), aura_dist.intervene(quantised(), narrow):
        pass


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda out: (out, 1), "got tuple"),
        (lambda out: out.to(torch.int32), r"got torch.int32 of shape \(2, 12, 80\)"),
        (lambda out: out[..., :5], r"a float output of 80 neurons, got torch.float32 of shape \(2, 12, 5\)"),
    ],
)
def test_output_that_no_hook_can_scale_is_refused_by_name(output, got):
    model, intervention = quantised(output=output), random_intervention("llama", ("mlp",))
    pattern = rf"'model\.layers\.0\.mlp\.\w+' \(EightBitLinear\).*{got}"
    with pytest.raises(ModelError, match=pattern), aura_dist.intervene(model, intervention):
        logits(model)
    assert not any(m._forward_hooks for m in model.modules())
