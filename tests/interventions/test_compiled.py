"""An intervention acts in every forward of a model that is compiled, or a forward that it cannot act in is an error."""

import logging
import threading
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CompileConfig

import aura_dist
from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.hooks import laid_over
from tests.models import tiny_causal

IDS = torch.arange(5, 29).reshape(2, 12)
SITES = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(2) for name in ("gate", "down")]
HALF = Intervention({s: np.full(80 if "gate" in s else 48, 0.25, np.float32) for s in SITES})


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(name="llama"):
    """A model of two layers, because tracing takes most of the time."""
    model = tiny_causal(name)
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def expected():
    model = small("llama")
    plain = logits(model)
    with aura_dist.intervene(model, HALF):
        return plain, logits(model)


def in_place(model):
    model.compile(backend="eager")
    return model


def wrapped(model):
    return torch.compile(model, backend="eager")


def its_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def its_layers_in_place(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def its_layers_wrapped(model):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def one_part_wrapped(model):
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp, backend="eager")
    return model


WAYS = [in_place, wrapped, its_forward, its_layers_in_place, its_layers_wrapped, one_part_wrapped]


@pytest.mark.parametrize(("compile_it", "ran_before"), [*((way, True) for way in WAYS), (in_place, False)])
def test_compiled_model_is_changed_within_the_context_and_only_there(compile_it, ran_before):
    plain, changed = expected()
    model = compile_it(small("llama"))
    names = [name for name, _ in model.named_modules()]
    if ran_before:
        torch.testing.assert_close(logits(model), plain)
    with aura_dist.intervene(model, HALF):
        torch.testing.assert_close(logits(model), changed)
    torch.testing.assert_close(logits(model), plain)
    assert [name for name, _ in model.named_modules()] == names
    with aura_dist.intervene(model, HALF, strength=0):
        torch.testing.assert_close(logits(model), plain)


def test_compiled_within_the_context_it_is_plain_after_it():
    plain, changed = expected()
    model = small("llama")
    with aura_dist.intervene(model, HALF):
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(logits(compiled), changed)
    torch.testing.assert_close(logits(compiled), plain)


@pytest.mark.parametrize(("name", "ran_before"), [("llama", True), ("llama", False), ("mistral", True)])
def test_generation_with_a_static_cache(name, ran_before):
    """transformers compiles these steps by itself on a GPU; here it is made to on the CPU."""
    prompt = torch.arange(40, 49)[None]
    compiled = CompileConfig(backend="eager", fullgraph=False, mode="default")
    compiled._compile_all_devices = True

    def continued(model, **how):
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=4, min_new_tokens=4, **how
        )
        return made[0, prompt.shape[1] :].tolist()

    def static(model):
        return continued(model, cache_implementation="static", compile_config=compiled)

    model = small(name)
    sites = {f"model.layers.{layer}.mlp.gate_proj": np.zeros(80, np.float32) for layer in range(2)}
    plain = continued(model)
    with aura_dist.intervene(model, Intervention(sites)):
        changed = continued(model)
    assert changed != plain
    model = small(name)
    if ran_before:
        assert static(model) == plain
    with aura_dist.intervene(model, Intervention(sites)):
        assert static(model) == changed
    assert static(model) == plain


def test_later_forward_that_a_recorded_one_replaces_is_an_error():
    """As a CUDA graph replays a layer: the first forward calls the site, a later one does not."""
    model = small("llama")
    mlp = model.model.layers[1].mlp
    with aura_dist.intervene(model, HALF):
        logits(model)
        mlp.forward = lambda x: nn.functional.linear(
            mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight
        )
        with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.down_proj' was not called.*torch\.compile"):
            logits(model)
        del mlp.forward
        logits(model)


def test_what_is_no_model_of_transformers_is_refused():
    intervention = Intervention({"model.layers.0.mlp.up_proj": np.zeros(80, np.float32)})
    for wrapped in (nn.DataParallel(tiny_causal("llama")), torch.fx.symbolic_trace(nn.Linear(2, 2))):
        expected = pytest.raises(ModelError, match=f"expected a model of transformers, got {type(wrapped).__name__}")
        with expected, aura_dist.intervene(wrapped, intervention):
            pass


def test_nested_interventions_on_a_compiled_model():
    model = small("llama")
    with aura_dist.intervene(model, HALF), aura_dist.intervene(model, HALF):
        twice = logits(model)
    model = wrapped(small("llama"))
    logits(model)
    with aura_dist.intervene(model, HALF):
        with aura_dist.intervene(model, HALF):
            torch.testing.assert_close(logits(model), twice)
        torch.testing.assert_close(logits(model), expected()[1])


@torch.no_grad()
def test_base_model_with_compiled_layers():
    model = small("llama")
    with laid_over(model.model, HALF, 1.0):
        changed = model.model(input_ids=IDS).last_hidden_state
    base = its_layers_in_place(small("llama")).model
    base(input_ids=IDS)
    with laid_over(base, HALF, 1.0):
        torch.testing.assert_close(base(input_ids=IDS).last_hidden_state, changed)


class Routed(nn.Module):
    """A mixture whose router sends the first token's parity to one of two experts."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = nn.ModuleList([mlp, deepcopy(mlp)])
        self.chosen = 0

    def forward(self, x):
        return self.experts[self.chosen](x)


def routed():
    model = small("llama")
    model.model.layers[1].mlp = Routed(model.model.layers[1].mlp)
    return model, model.model.layers[1].mlp


def test_mixture_need_not_call_every_expert(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("aura_dist"), "propagate", True)  # a verb of an earlier test ended it
    model, mixture = routed()
    sites = [f"model.layers.1.mlp.experts.{e}.up_proj" for e in range(2)]
    intervention = Intervention({site: np.zeros(80, np.float32) for site in sites})
    with aura_dist.intervene(model, intervention):
        first = logits(model)
        assert not caplog.records
    assert "experts.1.up_proj among them" in caplog.text
    with aura_dist.intervene(model, intervention):
        mixture.chosen = 1
        torch.testing.assert_close(logits(model), first)
        mixture.forward = lambda x: x
        with pytest.raises(ModelError, match=r"experts\.\*\.up_proj' was not called"):
            logits(model)
    del mixture.forward
    with aura_dist.intervene(model, intervention.restricted(sites[:1])):
        logits(model)  # the other expert alone is called


def test_threads_do_not_disturb_each_other():
    model, changed = small("llama"), expected()[1]
    found, errors = [], []

    def work():
        try:
            found.extend(logits(model) for _ in range(5))
        except ModelError as error:
            errors.append(error)

    with aura_dist.intervene(model, HALF):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(found) == 20
    for values in found:
        torch.testing.assert_close(values, changed)
