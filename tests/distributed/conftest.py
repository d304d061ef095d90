"""Stores of one process, made once for all that compare with them or fit from them."""

import pytest

from aura_dist.config import CollectConfig
from aura_dist.stages import collect
from tests.distributed.loop import OPTIONS


@pytest.fixture(scope="session")
def plain_store(tiny_dir, sentences_csv, tmp_path_factory):
    """`plain_store(name)`: the store of a tiny model, every module of it, collected by one process at first use."""
    out = tmp_path_factory.mktemp("plain")

    def store(name):
        if not (out / name).exists():
            settings = {"model": str(tiny_dir(name)), "data": sentences_csv, "concepts": ["toxic"], **OPTIONS}
            collect.run(CollectConfig(store=str(out / name), **settings))
        return out / name

    return store
