"""Tasks, batches and the chunk grid: everything once, within bounds, at least cost."""

from itertools import combinations, pairwise
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aura_dist.store.grid import (
    BATCH_OVERHEAD_TOKENS,
    Task,
    columns_per_chunk,
    make_batches,
    make_tasks,
    row_chunks,
    rows_per_chunk,
    token_grid,
)

lengths = st.lists(st.integers(1, 130), min_size=1, max_size=200).map(sorted)
budgets = st.integers(1, 3000)
chunk_rows = st.sampled_from([1, 3, 32, 64])


def cost(cuts, num_tokens):
    return sum((b - a) * num_tokens[b - 1] + BATCH_OVERHEAD_TOKENS for a, b in pairwise(cuts))


def padded(batch, num_tokens):
    return (batch.stop - batch.start) * max(num_tokens[batch])


@settings(deadline=None)
@given(lengths, chunk_rows, budgets)
def test_tasks_cover_every_row_once_in_whole_row_chunks(num_tokens, rows, budget):
    tasks = make_tasks(num_tokens, rows, budget)
    assert [t.index for t in tasks] == list(range(len(tasks)))
    assert tasks[0].start == 0
    assert tasks[-1].stop == len(num_tokens)
    assert all(a.stop == b.start and a.stop % rows == 0 for a, b in pairwise(tasks))
    assert [t.num_tokens for t in tasks] == [sum(num_tokens[t.start : t.stop]) for t in tasks]


@settings(deadline=None)
@given(lengths, chunk_rows, budgets)
def test_tasks_hold_enough_tokens_and_no_chunk_more_than_needed(num_tokens, rows, budget):
    tasks = make_tasks(num_tokens, rows, budget)
    if sum(num_tokens) < budget:
        assert len(tasks) == 1
    else:
        assert all(t.num_tokens >= budget for t in tasks)
    for task in tasks[:-1]:
        *before, _ = row_chunks(task, rows)
        assert sum(sum(num_tokens[c]) for c in before) < budget


@settings(deadline=None)
@given(lengths, chunk_rows, budgets)
def test_row_chunks_are_those_of_the_grid(num_tokens, rows, budget):
    chunks = [c for task in make_tasks(num_tokens, rows, budget) for c in row_chunks(task, rows)]
    assert chunks == [slice(b, min(b + rows, len(num_tokens))) for b in range(0, len(num_tokens), rows)]


def test_remainder_joins_the_last_task():
    assert make_tasks([10] * 5, 1, 20) == [Task(0, 0, 2, 20), Task(1, 2, 5, 30)]
    assert make_tasks([10] * 5, 1, 1000) == [Task(0, 0, 5, 50)]
    assert make_tasks([10, 9, 10], 1, 10) == [Task(0, 0, 1, 10), Task(1, 1, 3, 19)]


@settings(deadline=None)
@given(lengths, budgets, st.data())
def test_batches_cover_the_chunk_once_within_the_budget(num_tokens, budget, data):
    start = data.draw(st.integers(0, len(num_tokens) - 1))
    stop = data.draw(st.integers(start + 1, len(num_tokens)))
    batches = make_batches(num_tokens, slice(start, stop), budget)
    assert [r for b in batches for r in range(b.start, b.stop)] == list(range(start, stop))
    assert all(padded(b, num_tokens) <= budget or b.stop - b.start == 1 for b in batches)


@settings(deadline=None)
@given(st.lists(st.integers(1, 130), min_size=1, max_size=9).map(sorted), st.integers(1, 600))
def test_batches_cost_no_more_than_any_other_cut(num_tokens, budget):
    n = len(num_tokens)
    batches = make_batches(num_tokens, slice(0, n), budget)
    allowed = [
        cuts
        for count in range(n)
        for inner in combinations(range(1, n), count)
        for cuts in [(0, *inner, n)]
        if all((b - a) * num_tokens[b - 1] <= budget or b - a == 1 for a, b in pairwise(cuts))
    ]
    ours = (0, *(b.stop for b in batches))
    assert cost(ours, num_tokens) == min(cost(cuts, num_tokens) for cuts in allowed)


def test_short_and_long_rows_part_where_padding_costs_more_than_a_forward():
    assert make_batches([1] * 8 + [100] * 2, slice(0, 10), 4096) == [slice(0, 8), slice(8, 10)]
    assert make_batches([100] * 10, slice(0, 10), 4096) == [slice(0, 10)]
    assert make_batches([10, 5000], slice(0, 2), 100) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize(
    ("num_rows", "rows"),
    [(1, 32), (127, 32), (128, 64), (200, 100), (201, 67), (500, 100), (2500, 100), (4096, 128), (10**8, 256)],
)
def test_rows_of_a_chunk(num_rows, rows):
    assert rows_per_chunk(num_rows) == rows


@settings(deadline=None)
@given(st.integers(128, 50_000))
def test_row_chunks_are_even_and_leave_work_for_many_ranks(num_rows):
    rows = rows_per_chunk(num_rows)
    num_chunks = ceil(num_rows / rows)
    assert 64 <= rows <= 256
    assert num_chunks >= min(32, num_rows / 100)
    assert num_chunks * rows - num_rows < num_chunks


@pytest.mark.parametrize(
    ("width", "num_rows", "columns"),
    [
        (4096, 2500, 256),
        (18_176, 2500, 568),  # Falcon-7B: a sixteenth is 1,136
        (32_768, 2500, 1024),
        (2048, 2500, 128),
        (80, 100, 5),
        (7, 100, 1),
        (4096, 250_000, 256),
        (4096, 500_000, 128),
        (4096, 64_000_000, 1),
        (4096, 10**9, 1),
        (16 * 1009, 100, 1009),  # prime, small enough to keep
        (16 * 2003, 100, 1024),  # prime, too large: alignment is given up
        (16 * 257, 1_000_000, 64),  # prime, too large for memory
    ],
)
def test_columns_of_a_chunk(width, num_rows, columns):
    assert columns_per_chunk(width, num_rows, 4) == columns


@settings(deadline=None)
@given(st.integers(1, 100_000), st.integers(1, 3_000_000), st.sampled_from([2, 4]))
def test_columns_of_a_chunk_are_aligned_and_fit(width, num_rows, item_bytes):
    columns = columns_per_chunk(width, num_rows, item_bytes)
    share = ceil(width / 16)
    limit = min(share, 1024, max(1, 256_000_000 // (num_rows * item_bytes)))
    assert 1 <= columns <= limit
    assert columns == 1 or columns * num_rows * item_bytes <= 256_000_000
    best = max(c for c in range(1, limit + 1) if share % c == 0)
    assert columns == (best if best >= limit / 8 else limit)


@settings(deadline=None)
@given(lengths, budgets, st.integers(1, 100_000), st.sampled_from([2, 4]))
def test_blocks_of_tokens_are_the_batches_and_each_begins_with_a_shard(num_tokens, budget, width, item_bytes):
    grid, rows = token_grid(num_tokens, budget), rows_per_chunk(len(num_tokens))
    chunks = [slice(b, min(b + rows, len(num_tokens))) for b in range(0, len(num_tokens), rows)]
    assert list(grid.blocks) == [batch for chunk in chunks for batch in make_batches(num_tokens, chunk, budget)]
    assert all(sum(num_tokens[block]) <= grid.block_tokens for block in grid.blocks)
    shard = grid.tokens_per_shard(width, item_bytes)
    assert grid.block_tokens % shard == 0
    assert shard % 64 == 0
    assert shard == 64 or shard * width * item_bytes <= 64 * 2**20
    places = {
        (number * grid.block_tokens + token) // shard
        for number, block in enumerate(grid.blocks)
        for token in range(sum(num_tokens[block]))
    }
    assert grid.num_shards(num_tokens, width, item_bytes) == len(places)
