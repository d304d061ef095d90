"""The grid of chunks that a store is made with, and what is compared before going on with it."""

from dataclasses import replace

import numpy as np
import pytest

from aura_dist.errors import StoreError
from aura_dist.planning.work import store_size
from aura_dist.store import grid as partition
from aura_dist.store.access import get_array, open_group
from aura_dist.store.record import check_same
from aura_dist.store.schema import Samples, activation_path, create_store, shard_widths
from tests.stores import make_spec


@pytest.mark.parametrize("poolings", [("max", "mean"), ("mean", "max")])
def test_poolings_of_a_site_have_the_same_chunks(poolings, tmp_path, monkeypatch):
    """Ranks own columns of all poolings alike: with other chunks two of them would write one."""
    num_rows, width = 64, 1024
    monkeypatch.setattr(partition, "MAX_BYTES_PER_CHUNK_COLUMN", num_rows * 64 * 2)  # 64 columns of float16
    spec = replace(make_spec([width], ["toxic"], "float16"), poolings=poolings)
    tokens = np.full(num_rows, 8, dtype=np.int32)
    create_store(str(tmp_path / "s"), spec, Samples(np.arange(num_rows), tokens, np.zeros((num_rows, 1), np.int8)), {})
    group = open_group(str(tmp_path / "s"))
    arrays = [get_array(group, activation_path("layers.0.up", pooling)) for pooling in poolings]
    assert {a.dtype.itemsize for a in arrays} == {2, 4}
    assert {a.chunks[1] for a in arrays} == {32}
    assert {a.shards for a in arrays} == {(32, 1024)}
    assert set(shard_widths(group, spec).values()) == {1024}
    planned = store_size(num_rows, 32, [width], ["float16", "float32"])
    assert planned.num_chunks == sum(a.nchunks for a in arrays)


def test_words_for_an_intervention_may_change_but_not_what_it_does(tmp_path):
    under = {"digest": "d", "method": "composed", "parameters": None, "strength": 1.0}
    spec = replace(make_spec([16], ["toxic"]), intervention=under)
    samples = Samples(np.arange(4), np.full(4, 8, np.int32), np.zeros((4, 1), np.int8))
    create_store(str(tmp_path / "s"), spec, samples, {})
    group = open_group(str(tmp_path / "s"))
    check_same("s", group, replace(spec, intervention={**under, "method": "mean-act in 2 steps"}), samples)
    for other in ({**under, "digest": "e"}, {**under, "strength": 0.5}, None):
        with pytest.raises(StoreError, match="was collected under another intervention"):
            check_same("s", group, replace(spec, intervention=other), samples)
