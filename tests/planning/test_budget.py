"""Budgets: memory by layout, placing of layers, largest batches, sizes in words."""

import re
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aura_dist.errors import ConfigError
from aura_dist.models.strategies.dispatch import place
from aura_dist.models.strategies.strategy import Spread, WeightSizes
from aura_dist.models.strategies.table import title
from aura_dist.planning.budget import (
    CUDA_DEVICE_BYTES,
    MAX_WAITING_BYTES,
    NUM_BUFFERS,
    advice,
    over_more,
    owned_neurons,
    rank_memory,
    spreads,
    survey,
    what_fits,
)
from aura_dist.planning.seconds import Rates, reading, run_seconds, schedule
from aura_dist.planning.work import COMPRESSED, ForwardCost, Machine, Work, store_size
from aura_dist.ranks.layout import Layout
from aura_dist.store import writer
from aura_dist.units import parse_bytes, show_bytes

GPU = Machine(gpu=True)
# a layer of 1 GB, a tenth of it kept whole under tensor parallelism; embeddings of 2 GB
WORK = Work(
    weights=WeightSizes(((100_000_000, 900_000_000),) * 10, (2_000_000_000, 0)),
    forward=ForwardCost(1e6, 0, 0, 1e5, 2e9, 1e5),
    neurons=((4096, 256), (1024, 64)) * 10,
    stored_bytes=4,
    pooled_bytes=2,
    rows_chunk=64,
    shortest=8,
    longest=128,
    tokens_per_batch=4096,
)


def memory(layout, machine=GPU, work=WORK, **options):
    return rank_memory(work, Spread(layout, options), machine)


def test_number_of_buffers_is_the_writers():
    assert NUM_BUFFERS == writer.NUM_BUFFERS
    assert MAX_WAITING_BYTES == writer.MAX_WAITING_BYTES


def test_page_locked_buffers_are_powers_of_two():
    buffer = (WORK.rows_chunk + 1) * sum(width for width, _ in WORK.neurons) * WORK.stored_bytes
    assert 2**23 < buffer < 2**24
    assert memory(Layout()).host["queue"] == NUM_BUFFERS * 2**24 + buffer
    assert memory(Layout(), Machine(gpu=False)).host["queue"] == (NUM_BUFFERS + 1) * buffer


def test_tokens_that_wait_are_bounded():
    """One batch of a module is taken, encoded and joined; ranks that split columns hold it twice more."""
    work = replace(WORK, kept_bytes=2**14)
    assert work.token_bytes == 2**26
    assert "tokens" not in memory(Layout()).host
    assert memory(Layout(), work=work).host["tokens"] == MAX_WAITING_BYTES + 3 * 2**26
    assert memory(Layout("tensor", 2, tensor=2), work=work).host["tokens"] == MAX_WAITING_BYTES + 5 * 2**26
    assert memory(Layout(), work=replace(work, kept_bytes=2**18)).host["tokens"] == 4 * 2**30
    assert work.with_batch(2048).token_bytes == 2**25
    assert work.with_batch(2**20).token_bytes == 2**27, "a batch is a row chunk at most"


def test_weights_are_split_as_the_strategy_splits_them():
    def weights(layout, **how):
        device = memory(layout, **how).device
        return device["weights"], device["gathered weights"]

    assert weights(Layout("replicate", 8)) == (12_000_000_000, 0)
    assert weights(Layout("fsdp", 8, fsdp=4)) == (3_000_000_000, 4_000_000_000)
    assert weights(Layout("tensor", 8, tensor=4)) == (2_000_000_000 + 10 * 325_000_000, 0)
    assert weights(Layout("tensor", 8, fsdp=2, tensor=4)) == (2_625_000_000, 2_650_000_000)
    assert weights(Layout("zero3", 8, fsdp=8)) == (1_500_000_000, 4_000_000_000)
    assert weights(Layout("zero3", 8, fsdp=8), offload="cpu") == (0, 4_000_000_000)


def test_offloaded_weights_lie_on_the_host_or_the_disk():
    held = memory(Layout("zero3", 8, fsdp=8), offload="cpu")
    assert (held.host["offloaded weights"], held.disk, held.streamed) == (1_500_000_000, 0, 1_500_000_000)
    held = memory(Layout("zero3", 8, fsdp=8), offload="nvme")
    assert ("offloaded weights" in held.host, held.disk, held.streamed) == (False, 1_500_000_000, 1_500_000_000)


def test_without_a_gpu_all_is_in_the_host():
    on_gpu, on_cpu = (memory(Layout(), Machine(gpu=g)) for g in (True, False))
    assert on_cpu.device == {}
    assert on_cpu.host["weights"] == on_gpu.device["weights"]
    mapped = rank_memory(replace(WORK, mapped=True), Spread(Layout()), Machine(gpu=False))
    assert "weights" not in mapped.host
    assert mapped.mapped == 12_000_000_000
    assert mapped.anonymous_bytes == on_cpu.anonymous_bytes - 12_000_000_000
    assert mapped.host_bytes(4) == 4 * sum(mapped.host.values()) + 12_000_000_000


def test_queue_is_the_row_buffers_and_the_one_being_encoded():
    """A buffer has the rows of a row chunk, and one of counts."""
    assert memory(Layout(), Machine(gpu=False)).host["queue"] == 4 * 65 * 51_200 * 4
    split = memory(Layout("tensor", 4, tensor=4), Machine(gpu=False)).host
    assert split["queue"] == 4 * 65 * 12_800 * 4
    assert split["exchange"] == 2 * 65 * 12_800 * 4 * 3 // 4, "of four columns, one is the rank's own"


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 600)), min_size=1, max_size=4), st.integers(1, 9))
def test_owned_neurons_are_an_even_share_at_least_and_all_at_most(neurons, num_ranks):
    total = sum(width for width, _ in neurons)
    owned = owned_neurons(neurons, num_ranks)
    assert total / num_ranks <= owned <= total
    assert owned_neurons(neurons, 1) == total


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=20),
    st.lists(st.integers(0, 200), max_size=3),
)
def test_blocks_fill_the_tiers_in_order(blocks, limits):
    tiers = {**{str(n): limit for n, limit in enumerate(limits)}, "disk": inf}
    held = place(blocks, tiers)
    assert sum(held.values()) == sum(blocks)
    assert all(held[tier] <= limit for tier, limit in tiers.items())
    prefixes = {sum(blocks[:n]) for n in range(len(blocks) + 1)}
    done = 0
    for tier in tiers:  # each tier ends between two blocks, so none is divided
        done += held[tier]
        assert done in prefixes


def test_dispatch_keeps_room_for_the_layer_that_is_brought_in():
    held = memory(Layout("dispatch"), max_memory={"cpu": 3_000_000_000, 0: 8_000_000_000})
    assert (held.device["weights"], held.device["gathered weights"]) == (6_000_000_000, 2_000_000_000)
    assert (held.host["offloaded weights"], held.disk, held.streamed) == (3_000_000_000, 3_000_000_000, 6_000_000_000)
    held = memory(Layout("dispatch"), max_memory={0: 12_000_000_000})
    assert (held.device["weights"], held.device["gathered weights"], held.streamed) == (12_000_000_000, 0, 0)


@given(st.integers(4, 40).map(lambda g: g * 10**9), st.integers(1, 100).map(lambda g: g * 10**9))
def test_dispatch_stays_within_its_machine(device, host):
    """Where what must be there fits at all, the default tiers fill what is left and no more."""
    machine = Machine(True, device, host)
    assert what_fits(WORK, Spread(Layout("dispatch")), machine).tokens_per_batch or device < 5e9 or host < 3e9


@given(
    st.sampled_from([Layout(), Layout("fsdp", 4, fsdp=4), Layout("tensor", 4, tensor=2), Layout("zero3", 4, fsdp=4)]),
    st.integers(128, 4095),
    st.integers(1, 500),
)
def test_memory_never_falls_as_batches_grow(layout, tokens, more):
    small, large = (memory(layout, work=WORK.with_batch(t)) for t in (tokens, tokens + more))
    assert small.device_bytes <= large.device_bytes


@given(st.sampled_from(["replicate", "fsdp", "zero3"]), st.integers(5_000_000_000, 16_000_000_000))
def test_largest_batch_fits_and_the_next_does_not(strategy, device):
    spread = Spread(Layout(strategy, 4, fsdp=1 if strategy == "replicate" else 4))
    machine = Machine(True, device)
    found = what_fits(WORK, spread, machine)
    fits = [rank_memory(WORK.with_batch(t), spread, machine).fits(machine) for t in (128, 4096)]
    assert (found.tokens_per_batch is not None, found.tokens_per_batch == 4096) == (fits[0], fits[1])
    if found.tokens_per_batch not in (None, 4096):
        at = found.tokens_per_batch
        assert rank_memory(WORK.with_batch(at), spread, machine).fits(machine)
        assert not rank_memory(WORK.with_batch(at + 1), spread, machine).fits(machine)


def test_spreads_are_named_as_flags():
    assert [title(s) for s in spreads(12, gpu=True, splits=True)] == [
        "replicate", "fsdp=2", "tensor=2", "fsdp=4", "tensor=4", "fsdp=12", "tensor=12", "zero3", "zero3 --offload cpu",
        "layers",
    ]  # fmt: skip
    assert [title(s) for s in spreads(1, gpu=False, splits=True)] == ["replicate", "zero3", "dispatch", "layers"]
    assert title(Spread(Layout("tensor", 8, fsdp=2, tensor=4))) == "fsdp=2,tensor=4"


@pytest.mark.parametrize(
    ("world_size", "strategy", "device", "wanted"),
    [
        (4, "replicate", 13.6e9, r"the largest batch that fits is --tokens-per-batch \d+"),
        (4, "replicate", 12e9, "what fits is --sharding fsdp=2"),
        (1, "replicate", 8e9, r"what fits is --sharding zero3 --offload cpu|what fits is --sharding dispatch"),
        (4, "replicate", 2e9, "no number of ranks fits"),
    ],
)
def test_advice_names_the_largest_setting_that_fits(world_size, strategy, device, wanted):
    machine, spread = Machine(True, int(device)), Spread(Layout(strategy, world_size))
    others = survey(WORK, world_size, machine, splits=True)
    assert re.match(wanted, advice(WORK, spread, machine, others))


def test_ranks_needed_are_the_fewest():
    host = 12_000_000_000 + 3_000_000_000  # a GPU that holds what is gathered and a share of 1.5 GB: eight ranks
    machine = Machine(True, 4_000_000_000 + CUDA_DEVICE_BYTES + 1_700_000_000, host)
    assert over_more(WORK, machine, 1) == Spread(Layout("fsdp", 8, fsdp=8))
    assert over_more(WORK, Machine(True, 1_000_000_000), 1) is None


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200).map(sorted), st.integers(1, 600))
def test_schedule_counts_every_row_once(num_tokens, tokens_per_batch):
    plan = schedule(num_tokens, 32, tokens_per_batch, ForwardCost(0, 0, 0, 0, 3.0, 0.0))
    assert plan.num_tokens == sum(num_tokens) <= plan.num_padded_tokens
    assert plan.flops == pytest.approx(3.0 * plan.num_padded_tokens)
    assert len(num_tokens) / 32 <= plan.num_batches <= len(num_tokens)


def test_seconds_are_shared_by_all_ranks_and_offloaded_weights_come_in_for_every_batch():
    plan = schedule([128] * 64, 64, 4096, WORK.forward)
    held = memory(Layout())
    assert run_seconds(plan, Layout("replicate", 4), held, 2.0)[0] == pytest.approx(plan.flops / 8e12)
    assert run_seconds(plan, Layout(), held, 2.0)[1] == 0
    offloaded = memory(Layout("zero3", 1), offload="cpu")
    assert run_seconds(plan, Layout("zero3", 1), offloaded, 2.0)[1] == pytest.approx(plan.num_batches * 12e9 / 20e9)


def test_layer_by_layer_a_rank_needs_memory_for_two_layers():
    spread = Spread(Layout("layers", 4))
    work = replace(WORK, hidden_bytes=8_000_000_000, layer_neurons=WORK.neurons[:1])
    held = rank_memory(work, spread, Machine(True, None, 10**11))
    outside, layers = WORK.weights.per_tensor_rank(1)
    assert held.device["weights"] + held.device["gathered weights"] == outside + sum(sorted(layers)[-2:])
    assert held.streamed == sum(layers)
    assert held.host["hidden states"] == 2_000_000_000, "of a rank's share of the rows"
    assert held.host["queue"] < rank_memory(work, Spread(Layout("replicate", 4)), Machine(True)).host["queue"]
    short = rank_memory(work, spread, Machine(True, None, 5_000_000_000))
    assert 0 < short.host["hidden states"] < 2_000_000_000, "the others wait in a file"


def test_layers_are_read_once_a_wave_while_ranks_compute():
    plan = schedule([128] * 64, 64, 4096, WORK.forward)
    held = rank_memory(WORK, Spread(Layout("layers", 2)), Machine(True))
    once = reading(plan, Layout("layers", 2), held, None, Rates(copy=20e9, disk=5e9))
    assert (once.num_waves, once.num_bytes) == (1, held.streamed)
    assert once.seconds == pytest.approx(held.streamed / 5e9)
    assert reading(plan, Layout("layers", 2), held, 1000).num_waves == 5


def test_store_size_is_that_of_its_arrays():
    size = store_size(2500, 64, [2048, 640], ["bfloat16", "float32"])
    assert (size.num_arrays, size.num_neurons, size.raw_bytes) == (4, 2688, 2 * 4 * 2500 * 2688)
    assert size.num_chunks == 2 * 40 * (16 + 16)
    half = size.raw_bytes / 2
    expected = half * (COMPRESSED["bfloat16"] + COMPRESSED["float32"])
    assert size.compressed_bytes == pytest.approx(expected, abs=1)
    assert store_size(2500, 64, [2048], ["float16"]).raw_bytes == 2 * 2500 * 2048


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9),
        ("24 GiB", 24 * 2**30),
        ("1.5tb", 1_500_000_000_000),
        ("1000", 1000),
        ("2k", 2000),
        ("1e9", 10**9),
        (".5 GB", 5 * 10**8),
        ("1e3 KiB", 1024 * 1000),
        ("+1.B", 1),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text, "--x") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 iB", "10 giga", "e9", "1 GBB", "9" * 400 + "GB"])
def test_other_sizes_are_errors(text):
    with pytest.raises(ConfigError, match="--x: expected a size such as 80GB or 24GiB"):
        parse_bytes(text, "--x")


@given(st.integers(0, 10**17))
def test_sizes_are_shown_to_three_digits(size):
    shown = show_bytes(size)
    if size < 10**15:
        assert parse_bytes(shown, "") == pytest.approx(size, rel=0.0051)
