"""Consolidated metadata of a finished store: whole, never stale, and one request for who reads at a URL."""

import json
import shutil
import uuid
from collections import Counter

import numpy as np
import pytest
import zarr
from zarr.buffer import cpu
from zarr.core.sync import sync

import aura_dist
from aura_dist.store.access import open_group, store_at
from aura_dist.store.consolidated import consolidate, forget_consolidated
from aura_dist.store.remote import RemoteStore
from tests.scoring.test_score import score
from tests.stores import make_store


def consolidated(store) -> set[str]:
    """Paths of what the root describes; empty where it describes only itself."""
    root = json.loads((store / "zarr.json").read_text())
    return set(root.get("consolidated_metadata", {"metadata": {}})["metadata"])


def described(store) -> set[str]:
    """Paths of all groups and arrays but the root."""
    return {str(f.parent.relative_to(store)) for f in store.rglob("zarr.json") if f.parent != store}


def test_follows_what_is_written(tmp_path):
    store = make_store(tmp_path / "s.zarr", 40, (32, 16), num_unfinished=1)
    consolidate(open_group(str(store)))
    assert not consolidated(store), "it is not finished"
    assert score(store, "--partial", "--statistics", "auroc") == 0
    assert not consolidated(store)
    store = make_store(tmp_path / "whole.zarr", 40, (32, 16))
    consolidate(open_group(str(store)))
    assert consolidated(store) == described(store)
    before = described(store)
    for more in (["--statistics", "auroc"], [], ["--overwrite"]):
        assert score(store, *more) == 0
        assert consolidated(store) == described(store) > before
        theirs = zarr.open_group(store, mode="r", use_consolidated=True)
        assert np.isfinite(theirs["scores/layers.0.up/max"][1]).all()
        for name, node in theirs.members(max_depth=None):
            if isinstance(node, zarr.Array):
                plain = zarr.open_array(store / name, mode="r")
                assert (node.shape, node.shards, node.attrs) == (plain.shape, plain.shards, plain.attrs)
    forget_consolidated(open_group(str(store)))
    assert not consolidated(store)
    assert json.loads((store / "zarr.json").read_text())["attributes"]["created"] is True


def test_removed_before_scores_are(tmp_path, monkeypatch):
    store = make_store(tmp_path / "s.zarr", 40, (32, 16))
    assert score(store) == 0
    assert consolidated(store)
    monkeypatch.setattr("aura_dist.stages.score.make_array", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert score(store, "--overwrite") == 130
    assert not consolidated(store)


@pytest.fixture
def at_url(tmp_path):
    """A scored store behind a URL."""
    local = make_store(tmp_path / "s.zarr", 40, (32,) * 6)
    assert score(local, "--statistics", "auroc") == 0
    url = f"memory://{uuid.uuid4().hex}/s.zarr"
    remote = store_at(url)
    assert isinstance(remote, RemoteStore)
    for file in [f for f in local.rglob("*") if f.is_file()]:
        sync(remote.set(str(file.relative_to(local)), cpu.Buffer.from_bytes(file.read_bytes())))
    shutil.rmtree(local)
    return url


def test_opening_at_a_url_reads_no_description_but_the_root(at_url, monkeypatch):
    asked, get = Counter[str](), RemoteStore.get

    async def counted(self, key, *args, **kwargs):
        asked[key] += key.endswith("zarr.json")
        return await get(self, key, *args, **kwargs)

    monkeypatch.setattr(RemoteStore, "get", counted)
    tree = aura_dist.open_store(at_url)
    assert set(+asked) == {"zarr.json"}
    assert np.isfinite(tree["scores/layers.5.up/max"]["auroc"].values).all()
    assert np.isfinite(tree["activations/layers.5.up"]["max"].values).all()
