"""Gates: the operator against a few lines of torch, the artifact, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import aura_dist
from aura_dist.errors import InputError, ModelError, StoreError
from aura_dist.interventions.artifact import WEIGHTS_FILE, Intervention
from aura_dist.interventions.gates import GATES, Gate, posterior
from aura_dist.interventions.hub import card, without_paths
from aura_dist.models.load import skeleton
from aura_dist.sites.find import find_sites
from tests.distributed.intervened import random_gate
from tests.models import MIXTURE_CONFIGS, TINY_CONFIGS, tiny_causal

IDS = torch.arange(5, 29).reshape(2, 12)
KINDS = tuple(GATES)


def gated(name, kind, modules=("all", "norm", "residual"), seed=0):
    """A map with shifts and gates at every site of some modules of a tiny model."""
    rng = np.random.default_rng(seed)
    sites = find_sites(skeleton((TINY_CONFIGS | MIXTURE_CONFIGS)[name]())).select(modules)
    return Intervention(
        {s.name: rng.uniform(0, 1, s.width).astype(np.float32) for s in sites},
        {s.name: rng.normal(size=s.width).astype(np.float32) for s in sites},
        gate={s.name: random_gate(rng, kind, s.width) for s in sites},
    )


def everywhere(intervention, constant):
    """The same with gates whose logit is `constant` at every token."""
    gates = {}
    for site, gate in intervention.gate.items():
        parts = {name: np.zeros_like(values) for name, values in gate.parts.items()}
        parts[gate.row.constant] += np.float32(constant)
        gates[site] = Gate(gate.kind, parts)
    return replace(intervention, gate=gates)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1.0, 1.7])
def test_equals_hooks_by_hand(kind, strength):
    model, intervention = tiny_causal("llama"), gated("llama", kind, ("all", "norm"))
    with aura_dist.intervene(model, intervention, strength):
        ours = logits(model)
    for site, gate in intervention.gate.items():
        scale, shift = (torch.tensor(maps[site]) for maps in (intervention.scale, intervention.shift))
        parts = [torch.tensor(gate.parts[name]) for name in gate.row.parts]

        def by_hand(module, inputs, z, parts=parts, scale=scale, shift=shift):
            if len(parts) == 2:
                g = torch.sigmoid(z @ parts[0] + parts[1])[..., None]
            else:
                g = torch.sigmoid(parts[0] * z**2 + parts[1] * z + parts[2])
            return z + strength * g * ((scale - 1) * z + shift)

        model.get_submodule(site).register_forward_hook(by_hand)
    torch.testing.assert_close(ours, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_open_closed_and_strength_zero_are_exact(kind):
    model, intervention = tiny_causal("gemma3"), gated("gemma3", kind)
    plain = logits(model)
    with aura_dist.intervene(model, intervention, strength=0):
        assert torch.equal(logits(model), plain)
    with aura_dist.intervene(model, everywhere(intervention, -200)):
        assert torch.equal(logits(model), plain)
    with aura_dist.intervene(model, replace(intervention, gate={})):
        ungated = logits(model)
    with aura_dist.intervene(model, everywhere(intervention, 200)):
        assert torch.equal(logits(model), ungated)
    with aura_dist.intervene(model, intervention):
        between = logits(model)
    assert not torch.allclose(between, plain, atol=1e-2)
    assert not torch.allclose(between, ungated, atol=1e-2)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_gate_is_of_float32_values_at_least_and_the_result_rounds_once(kind, dtype):
    model, site = tiny_causal("llama").to(dtype), "model.layers.1.mlp.up_proj"
    intervention, seen = gated("llama", kind, (site,)), {}
    module = model.get_submodule(site)
    plain = module.register_forward_hook(lambda _m, _a, out: seen.__setitem__("plain", out))
    with aura_dist.intervene(model, intervention):
        after = module.register_forward_hook(lambda _m, _a, out: seen.__setitem__("ours", out))
        logits(model)
    plain.remove(), after.remove()
    z = seen["plain"].double().numpy()
    opened = intervention.gate[site].values(z)
    expected = z + opened * ((intervention.scale[site] - 1.0) * z + intervention.shift[site])
    assert seen["ours"].dtype == dtype
    torch.testing.assert_close(seen["ours"], torch.tensor(expected).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_pass_through_a_gate():
    model, intervention = tiny_causal("llama"), gated("llama", "tokens")
    with aura_dist.intervene(model, intervention):
        model(input_ids=IDS).logits.sum().backward()
        expected = logits(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_units_of_experts_have_gates_and_tokens_of_them_are_refused():
    model = tiny_causal("qwen3-moe")
    intervention = gated("qwen3-moe", "units", ("experts",))
    with aura_dist.intervene(model, replace(intervention, gate={})):
        ungated = logits(model)
    with aura_dist.intervene(model, everywhere(intervention, 200)):
        assert torch.equal(logits(model), ungated)
    with aura_dist.intervene(model, intervention):
        ours = logits(model)
    site = intervention.sites[0]
    one = intervention.restricted([site])
    shut = one.gate[site].parts["constant"].copy()
    shut[24:] = -200  # all experts but the first
    closed = replace(one, gate={site: Gate("units", {**one.gate[site].parts, "constant": shut, **zeros(one, site)})})
    with aura_dist.intervene(model, closed):
        first = logits(model)
    scale, shift = intervention.scale[site].copy(), intervention.shift[site].copy()
    scale[24:], shift[24:] = 1, 0
    open_first = replace(
        one, scale={site: scale}, shift={site: shift}, gate={site: Gate("units", closed.gate[site].parts)}
    )
    with aura_dist.intervene(model, open_first):
        torch.testing.assert_close(logits(model), first, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours, ungated, atol=1e-3)
    message = r"experts': expected modules that hold all values of a token together with a gate of tokens"
    with (
        pytest.raises(ModelError, match=message),
        aura_dist.intervene(model, gated("qwen3-moe", "tokens", ("experts",))),
    ):
        pass


def zeros(intervention, site):
    return {name: np.zeros_like(intervention.gate[site].parts[name]) for name in ("quadratic", "linear")}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    intervention = gated("llama", kind)
    intervention.save(tmp_path / "one")
    again = Intervention.load(tmp_path / "one")
    assert (again.sites, list(again.gate), again.digest) == (
        intervention.sites, list(intervention.gate), intervention.digest,
    )  # fmt: skip
    for site, gate in intervention.gate.items():
        assert again.gate[site].kind == kind
        for name, values in gate.parts.items():
            np.testing.assert_array_equal(again.gate[site].parts[name], values)
    assert replace(intervention, gate={}).digest != intervention.digest
    site = intervention.sites[0]
    other = {**intervention.gate, site: intervention.gate[site].moved(0.5, 1.0)}
    assert replace(intervention, gate=other).digest != intervention.digest
    halved = intervention.at_strength(0.5)
    assert halved.gate == intervention.gate, "strength acts on the map alone"
    assert list(intervention.restricted([site]).gate) == [site]


def test_names_of_modules_that_look_like_parts_are_kept_apart(tmp_path):
    scale = {"mlp.gate": np.full(3, 0.5, np.float32), "mlp": np.full(2, 0.5, np.float32)}
    gate = {site: random_gate(np.random.default_rng(0), "tokens", len(v)) for site, v in scale.items()}
    Intervention(scale, gate=gate).save(tmp_path)
    assert Intervention.load(tmp_path).digest == Intervention(scale, gate=gate).digest


def test_gates_compose_at_different_sites_alone():
    one = gated("llama", "tokens", ("*.0.mlp.*",))
    two = replace(gated("llama", "units", ("*.1.mlp.*",)), gate={})
    both = two @ one
    assert both.gate == one.gate
    assert both.sites == [*one.sites, *two.sites]
    for outer, inner in ((one, replace(one, gate={})), (replace(one, gate={}), one), (one, one)):
        with pytest.raises(
            InputError, match=r"0\.mlp\.gate_proj': expected maps without gates .* a gate of tokens; let"
        ):
            outer @ inner


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("up.gate.bias"), "for 'up' a gate of weight"),
        (lambda t: t.update({"up.gate.linear": t["up.gate.weight"]}), "for 'up' a gate of bias, linear, weight"),
        (lambda t: t.update({"up.gate.weight": np.ones(3, np.float32)}), "'weight' of a gate, float32 of shape"),
        (lambda t: t.update({"up.gate.bias": np.ones(2, np.float32)}), "'bias' of a gate, float32 of shape"),
        (
            lambda t: t.update({"up.gate.weight": np.full(2, np.nan, np.float32)}),
            "'up.gate.weight' that are not finite",
        ),
        (lambda t: t.update({"up.gate.slope": np.ones(2, np.float32)}), "has 'up.gate.slope'"),
        (lambda t: t.pop("up.scale"), "no neurons for 'up'"),
    ],
)
def test_damaged_gates_are_refused(change, message, tmp_path):
    gate = {"up": Gate("tokens", {"weight": np.ones(2, np.float32), "bias": np.ones(1, np.float32)})}
    Intervention({"up": np.zeros(2, np.float32)}, gate=gate).save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(StoreError, match=message):
        Intervention.load(tmp_path)
    wrong = {"up": Gate("tokens", {"weight": np.ones(3, np.float32), "bias": np.ones(1, np.float32)})}
    with pytest.raises(StoreError, match="cannot be written"):
        Intervention({"up": np.zeros(2, np.float32)}, gate=wrong).save(tmp_path / "other")


def test_a_description_with_another_form_is_refused(tmp_path):
    gated("llama", "units").save(tmp_path)
    place = tmp_path / "intervention.json"
    known = json.loads(place.read_text())
    for wrong in ({"gate": "tokens"}, {"gate": {"control": "a"}}, {"gate": {"control": {"data": "x"}}}):
        place.write_text(json.dumps({**known, **wrong}))
        with pytest.raises(StoreError, match="where an object belongs"):
            Intervention.load(tmp_path)


def test_the_card_names_the_gates_and_no_path():
    about = {
        "kind": "tokens",
        "control": {"store": "/home/me/neutral.zarr", "num_texts": 7, "data": {"path": "/a/b.csv"}},
    }
    intervention = replace(gated("llama", "tokens"), meta={"method": "mean-act", "gate": about})
    shown = card(intervention, "me/it")
    assert "z ← z + g ⊙ ((ω − 1) ⊙ z + b)" in shown
    assert "- gates of tokens: 30 modules" in shown
    assert "- control: neutral.zarr (7 texts)" in shown
    assert "/home" not in json.dumps(without_paths(intervention.meta)) + shown
    assert "/a/" not in json.dumps(without_paths(intervention.meta))


def test_the_posterior_is_that_of_two_gaussians():
    rng = np.random.default_rng(0)
    (m1, m0), (s1, s0) = rng.normal(size=(2, 9)), rng.uniform(0.3, 2, (2, 9))
    gate = posterior((m1, m0), (m1**2 + s1**2, m0**2 + s0**2))
    z = rng.normal(size=(5, 9)) * 2

    def density(mean, spread):
        return np.exp(-0.5 * ((z - mean) / spread) ** 2) / spread

    expected = density(m1, s1) / (density(m1, s1) + density(m0, s0))
    np.testing.assert_allclose(gate.values(z), expected, rtol=1e-4, atol=1e-6)
    moved = gate.moved(0.7, 3.0).values(z)
    odds = np.log(expected / (1 - expected))
    np.testing.assert_allclose(moved, 1 / (1 + np.exp(-3 * (odds - 0.7))), rtol=1e-3, atol=1e-5)
    dead = posterior((np.array([0.0, 0.0]), np.array([0.0, 1.0])), (np.array([0.0, 0.0]), np.array([0.0, 2.0])))
    assert dead.values(np.array([0.0, 0.0])).tolist()[0] == 0.5
    assert np.isfinite(np.concatenate(list(dead.parts.values()))).all()
