"""What a traced forward says, against what a real one does, and sizes against real weights."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aura_dist.models.load import ModelSource, load_base, skeleton
from aura_dist.models.strategies.tensor_plan import tensor_plan
from aura_dist.planning.estimate import is_mapped, is_split, prepare, weight_sizes
from aura_dist.planning.trace import _Account, forward_cost, trace_forward
from aura_dist.ranks.world import World
from aura_dist.sites.find import find_sites
from aura_dist.sites.pooling import POOLINGS
from tests.models import ODD_CONFIGS, TINY_CONFIGS


def prepared(name, num_layers=3, dtype="float32"):
    model = skeleton((TINY_CONFIGS | ODD_CONFIGS)[name]())
    sites = find_sites(model).select(["all"])
    return prepare(model, num_layers, dtype), [s for s in sites if s.layer < num_layers]


@pytest.mark.parametrize("name", [*TINY_CONFIGS, *ODD_CONFIGS])
def test_every_architecture_can_be_traced(name):
    model, sites = prepared(name)
    traced = trace_forward(model, sites, list(POOLINGS), (4, 32))
    widest = max(s.width for s in sites) * 4 * 32 * 4
    assert traced.peak_bytes >= widest
    assert traced.flops > 0
    assert all(not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "falcon-40b-style", "gemma3", "qwen3-moe", "minicpm3"])
def test_kernels_of_which_one_call_is_known_are_accounted_as_if_run(name, monkeypatch):
    model, sites = prepared(name, dtype="bfloat16")
    known = trace_forward(model, sites, ["max", "mean"], (4, 32))
    monkeypatch.setattr("aura_dist.planning.trace._made", lambda *call: None)
    assert trace_forward(model, sites, ["max", "mean"], (4, 32)) == known


def test_calls_that_depend_on_values_are_not_taken_for_alike():
    model, _ = prepared("llama")
    account = _Account(model.parameters(), on_cpu=True)
    with account:
        given = torch.empty(8, 4, device="meta")
        for num_true in (1, 8):
            assert given[torch.arange(8) < num_true].shape == (num_true, 4)
        whole = torch.empty(3, dtype=torch.int64, device="meta")
        assert [(whole * value).dtype for value in (1, 1.0)] == [torch.int64, torch.float32]


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


def test_mean_in_16_bits_is_summed_from_a_copy_on_a_cpu():
    """Torch's CPU kernel copies the whole input as float32 first; a GPU's widens element by element."""
    model, sites = prepared("llama", dtype="bfloat16")
    widest = max(s.width for s in sites) * 16 * 64 * 4
    on_gpu, on_cpu = (trace_forward(model, sites, ["mean"], (16, 64), on_cpu=c).peak_bytes for c in (False, True))
    assert on_gpu < on_cpu <= on_gpu + widest  # less than the copy where the peak lay elsewhere before
    narrow = [trace_forward(model, sites, ["max"], (16, 64), on_cpu=c).peak_bytes for c in (False, True)]
    assert narrow[0] == narrow[1]


def test_weights_are_not_counted_as_activations():
    model, sites = prepared("llama")
    traced = trace_forward(model, sites, ["max"], (1, 1))
    assert traced.peak_bytes < weight_sizes(model, {}).total_bytes / 10


@pytest.mark.parametrize("name", TINY_CONFIGS)
@pytest.mark.parametrize("num_layers", [2, 3])
def test_sizes_are_those_of_the_loaded_model(name, num_layers, tiny_dir):
    sizes = weight_sizes(prepared(name, num_layers)[0], {})
    real = load_base(ModelSource(str(tiny_dir(name)), None, "float32"), World(), num_layers=num_layers)
    tensors = [*real.parameters(), *real.buffers()]
    assert sizes.total_bytes == sum(t.nbytes for t in tensors)
    assert len(sizes.layers) == num_layers


@pytest.mark.parametrize("name", sorted(set(TINY_CONFIGS) - {"gpt2"}))
def test_tensor_parallelism_splits_the_linear_layers_and_embeddings(name):
    model, _ = prepared(name)
    sizes = weight_sizes(model, tensor_plan(model, 2))
    whole, split = sizes.layers[0]
    assert split > 5 * whole
    assert sizes.outside[1] > sizes.outside[0]


def test_biases_are_split_with_columns_alone():
    splits = partial(is_split, {"h.*.up": "colwise", "h.*.down": "rowwise", "h.*.out": "rowwise_split_input"})
    assert [splits(f"h.3.{n}") for n in ("up.weight", "up.bias", "down.weight", "out.weight")] == [True] * 4
    assert [splits(f"h.3.{n}") for n in ("down.bias", "out.bias", "norm.weight")] == [False] * 3


def test_weights_are_mapped_in_the_checkpoints_own_dtype_only(tiny_dir):
    model, _ = prepared("llama")
    config = load_base(ModelSource(str(tiny_dir("llama")), None, "float32"), World()).config
    model.config.dtype = config.dtype
    assert is_mapped(model, ModelSource(str(tiny_dir("llama")), None, "float32"))
    assert not is_mapped(model, ModelSource(str(tiny_dir("llama")), None, "bfloat16"))
    assert not is_mapped(model, ModelSource("somewhere/else", None, "float32"))
