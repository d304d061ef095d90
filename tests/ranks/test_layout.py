"""Layouts, and what ranks see, write and send each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aura_dist.ranks.layout import Layout
from aura_dist.ranks.world import World
from aura_dist.sites.ownership import ColumnPlan, Move, plan_columns, split_columns
from aura_dist.store.grid import columns_per_chunk


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
@given(widths, st.integers(1, 70), ranks, st.sampled_from(["replicated", "split", "packed"]))
def test_every_column_is_written_once_by_its_chunks_owner(width, chunk, num_ranks, how):
    width += width % 2 if how == "packed" else 0
    blocks = 2 if how == "packed" else 1
    seen = [((0, width),)] * num_ranks if how == "replicated" else split_columns(width, num_ranks, blocks)
    plans = plan_columns(width, chunk, seen)
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
        assert all(a % chunk == 0 and (b % chunk == 0 or b == width) for a, b in plan.owned), "whole chunks"
    assert sorted(np.concatenate(buffers).tolist()) == columns.tolist()
    if how == "replicated":
        assert not any(plan.sends for plan in plans), "what all have is not sent"


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("width", [32_768, 8_192, 9_216, 2_048])
def test_nothing_is_sent_where_widths_align(width, num_ranks):
    chunk = columns_per_chunk(width, 2_500, 4)
    assert not any(plan.sends for plan in plan_columns(width, chunk, split_columns(width, num_ranks)))


def test_one_rank_writes_all():
    every = (0, 100)
    assert plan_columns(100, 7, [(every,)]) == [ColumnPlan(100, (every,), (Move(every, every),), {}, {})]
