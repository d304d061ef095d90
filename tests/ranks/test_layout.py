"""Layouts, and what ranks see, write and send each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aura_dist.ranks.layout import Layout
from aura_dist.ranks.world import World
from aura_dist.sites.ownership import ColumnPlan, Move, deal_shards, plan_columns, split_columns


def test_places_of_a_two_dimensional_launch():
    layout = Layout("tensor", 12, fsdp=2, tensor=3)
    places = [World(layout, rank) for rank in range(12)]
    assert [w.replica for w in places] == [0] * 6 + [1] * 6
    assert [w.rank for w in places] == [0, 1, 2, 3, 4, 5] * 2
    assert [w.column_rank for w in places] == [0, 1, 2] * 4
    assert layout.num_replicas == 2
    assert layout.num_row_workers == 4


widths = st.integers(1, 300)
ranks = st.integers(1, 9)


@given(widths, ranks)
def test_split_is_torchs(width, num_ranks):
    import torch

    ours = [[c for a, b in mine for c in range(a, b)] for mine in split_columns(width, num_ranks)]
    theirs = [part.tolist() for part in torch.arange(width).chunk(num_ranks)]
    assert ours == theirs + [[]] * (num_ranks - len(theirs))


@settings(deadline=None, max_examples=300)
@given(widths, st.integers(1, 70), ranks, st.sampled_from(["replicated", "split", "packed"]), st.data())
def test_every_column_is_written_once_by_its_shards_owner(width, shard, num_ranks, how, data):
    width += width % 2 if how == "packed" else 0
    blocks = 2 if how == "packed" else 1
    seen = [((0, width),)] * num_ranks if how == "replicated" else split_columns(width, num_ranks, blocks)
    num_shards = -(-width // shard)
    owners = data.draw(st.lists(st.integers(0, num_ranks - 1), min_size=num_shards, max_size=num_shards))
    plans = plan_columns(width, shard, seen, owners)
    columns = np.arange(width)
    outputs = [np.concatenate([columns[:0], *(columns[a:b] for a, b in s)]) for s in seen]
    buffers = [np.full(plan.num_owned, -1) for plan in plans]
    for rank, plan in enumerate(plans):
        assert plan.num_seen == len(outputs[rank])
        for move in plan.keeps:
            buffers[rank][slice(*move.target)] = outputs[rank][slice(*move.source)]
        for peer, sent in plan.sends.items():
            for source, target in zip(sent, plans[peer].receives[rank], strict=True):
                buffers[peer][slice(*target)] = outputs[rank][slice(*source)]
    for plan, buffer in zip(plans, buffers, strict=True):
        assert buffer.tolist() == [c for a, b in plan.owned for c in range(a, b)]
        assert all(a % shard == 0 and (b % shard == 0 or b == width) for a, b in plan.owned), "whole shards"
    assert sorted(np.concatenate(buffers).tolist()) == columns.tolist()
    if how == "replicated":
        assert not any(plan.sends for plan in plans), "what all have is not sent"


@given(st.lists(st.tuples(widths, st.integers(1, 300)), min_size=1, max_size=12), ranks)
def test_shards_are_dealt_evenly(sites, num_ranks):
    dealt = deal_shards(sites, num_ranks)
    loads, sizes = [0] * num_ranks, []
    for (width, shard), owners in zip(sites, dealt, strict=True):
        assert len(owners) == -(-width // shard)
        for first, owner in zip(range(0, width, shard), owners, strict=True):
            sizes.append(min(shard, width - first))
            loads[owner] += sizes[-1]
    assert max(loads) - min(loads) <= max(sizes)
    assert deal_shards(sites, num_ranks) == dealt


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_write_as_much_of_falcon_40b(num_ranks):
    sites = [(width, width) for width in (32_768, 8_192)] * 60
    dealt = deal_shards(sites, num_ranks)
    loads = [sum(w for (w, _), (o,) in zip(sites, dealt, strict=True) if o == rank) for rank in range(num_ranks)]
    assert max(loads) <= 1.05 * sum(loads) / num_ranks


def test_thousands_of_ranks_are_dealt_to_at_once():
    assert len({o for owners in deal_shards([(98_304, 16_384)] * 2_000, 4_096) for o in owners}) == 4_096


def test_one_rank_writes_all():
    every = (0, 100)
    expected = [ColumnPlan(100, (every,), (Move(every, every),), {}, {})]
    assert plan_columns(100, 70, [(every,)], [0, 0]) == expected
