"""What a traced forward says, against what a real one does, and sizes against real weights."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aura_dist.model.sharding import ModelSource, load_base, skeleton
from aura_dist.model.sites import find_sites
from aura_dist.model.sizes import is_mapped, prepare, splits_layers, weight_sizes
from aura_dist.model.trace import forward_cost, trace_forward
from aura_dist.runtime.world import World
from tests.models import ODD_CONFIGS, TINY_CONFIGS


def prepared(name, num_layers=3, dtype="float32"):
    model = skeleton((TINY_CONFIGS | ODD_CONFIGS)[name]())
    sites = find_sites(model).select(["all"])
    return prepare(model, num_layers, dtype), [s for s in sites if s.layer < num_layers]


@pytest.mark.parametrize("name", [*TINY_CONFIGS, *ODD_CONFIGS])
def test_every_architecture_can_be_traced(name):
    model, sites = prepared(name)
    traced = trace_forward(model, sites, ["max", "mean", "min", "last", "absmax"], (4, 32))
    widest = max(s.width for s in sites) * 4 * 32 * 4
    assert traced.peak_bytes >= widest
    assert traced.flops > 0
    assert all(not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-rotary", "opt"])
def test_operations_are_those_of_a_real_forward(name, tiny_dir):
    model, sites = prepared(name)
    real = load_base(ModelSource(str(tiny_dir(name)), None, "float32"), World())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        # eager: the counter of torch leaves out the fused attention of a CPU
        real.set_attn_implementation("eager")
        real(input_ids=torch.full((4, 32), 5), use_cache=False)
    assert trace_forward(model, sites, ["max"], (4, 32)).flops == counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "falcon-40b-style", "mpt", "gemma3", "bloom"])
def test_cost_bounds_every_shorter_batch_and_gives_its_operations(name):
    model, sites = prepared(name)
    cost = forward_cost(model, sites, ["max"], 64)
    for rows, tokens in ((1, 64), (8, 64), (3, 40), (16, 7), (5, 1), (1, 1), (256, 33)):
        traced = trace_forward(model, sites, ["max"], (rows, tokens))
        assert traced.peak_bytes <= cost.peak_bytes(rows, tokens, rows * tokens)
        assert traced.flops == pytest.approx(cost.flops([(rows, tokens)]), rel=1e-9)
    full = trace_forward(model, sites, ["max"], (64, 64)).peak_bytes
    assert cost.peak_bytes(64, 64, 64 * 64) == pytest.approx(full, rel=0.1)


def test_weights_are_not_counted_as_activations():
    model, sites = prepared("llama")
    traced = trace_forward(model, sites, ["max"], (1, 1))
    assert traced.peak_bytes < weight_sizes(model).total_bytes / 10


@pytest.mark.parametrize("name", TINY_CONFIGS)
@pytest.mark.parametrize("num_layers", [2, 3])
def test_sizes_are_those_of_the_loaded_model(name, num_layers, tiny_dir):
    sizes = weight_sizes(prepared(name, num_layers)[0])
    real = load_base(ModelSource(str(tiny_dir(name)), None, "float32"), World(), num_layers=num_layers)
    tensors = [*real.parameters(), *real.buffers()]
    assert sizes.total_bytes == sum(t.nbytes for t in tensors)
    assert sizes.largest_bytes == max(t.nbytes for t in tensors)
    assert len(sizes.layers) == num_layers


@pytest.mark.parametrize(
    ("name", "can"),
    [*((n, True) for n in ("llama", "falcon-rotary", "falcon-40b-style", "mpt", "bloom", "opt", "gemma3", "mistral")),
     ("gpt2", False)],
)  # fmt: skip
def test_tensor_parallelism_splits_the_linear_layers(name, can):
    model, _ = prepared(name)
    assert splits_layers(model) == can
    if can:
        whole, split = weight_sizes(model).layers[0]
        assert split > 5 * whole


def test_weights_are_mapped_in_the_checkpoints_own_dtype_only(tiny_dir):
    model, _ = prepared("llama")
    config = load_base(ModelSource(str(tiny_dir("llama")), None, "float32"), World()).config
    model.config.dtype = config.dtype
    assert is_mapped(model, ModelSource(str(tiny_dir("llama")), None, "float32"))
    assert not is_mapped(model, ModelSource(str(tiny_dir("llama")), None, "bfloat16"))
    assert not is_mapped(model, ModelSource("somewhere/else", None, "float32"))
