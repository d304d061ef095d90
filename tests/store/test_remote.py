"""Stores at URLs: what is tried again and what is not, one event loop for all, names of places and chunks."""

import asyncio
import pickle
import threading

import numpy as np
import pytest
import zarr
from fsspec.asyn import get_loop
from fsspec.registry import known_implementations
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import aura_dist.store.access as access
from aura_dist.errors import StoreError
from aura_dist.sites.site import Site
from aura_dist.store.remote import RemoteStore, Retries, open_remote
from aura_dist.store.schema import Samples, StoreSpec, create_store

QUICK = Retries(num_attempts=4, first_seconds=1e-4)
SPEC = StoreSpec(
    model={"name": "m"}, tokenizer={}, dtype="float32", max_tokens=8, tokens_per_batch=64, skip_special_tokens=False,
    poolings=("max",), concepts=("toxic",), data={}, sites=(Site("layer", "mlp", 0, 24),),
)  # fmt: skip
SAMPLES = Samples(
    np.arange(40), np.full(40, 8, dtype=np.int32), (np.arange(40) % 2).astype(np.int8)[:, None]
)  # fmt: skip


class Flaky(WrapperStore):
    """Fails the first `times` requests with `error`; notes the event loops it is asked on."""

    def __init__(self, store, times=0, error=OSError("away")):  # noqa: B008
        super().__init__(store)
        self.times, self.error, self.asked, self.loops = times, error, 0, set()

    def _ask(self):
        self.asked += 1
        self.loops.add(asyncio.get_running_loop())
        if self.asked <= self.times:
            raise self.error

    async def get(self, key, prototype, byte_range=None):
        self._ask()
        return await super().get(key, prototype, byte_range)

    async def set(self, key, value):
        self._ask()
        await super().set(key, value)

    async def exists(self, key):
        self._ask()
        return await super().exists(key)

    async def delete(self, key):
        self._ask()
        await super().delete(key)

    async def delete_dir(self, prefix):
        self._ask()
        await super().delete_dir(prefix)

    async def list_dir(self, prefix):
        self._ask()
        async for key in super().list_dir(prefix):
            yield key

    async def list_prefix(self, prefix):
        self._ask()
        async for key in super().list_prefix(prefix):
            yield key


def buffer(content=b"content"):
    return default_buffer_prototype().buffer.from_bytes(content)


async def listed(keys):
    return [key async for key in keys]


REQUESTS = {
    "get": (lambda s: s.get("a/b", default_buffer_prototype()), buffer()),
    "set": (lambda s: s.set("a/c", buffer()), None),
    "exists": (lambda s: s.exists("a/b"), True),
    "delete": (lambda s: s.delete("a/b"), None),
    "delete_dir": (lambda s: s.delete_dir("a"), None),
    "list_dir": (lambda s: listed(s.list_dir("a")), ["b"]),
    "list_prefix": (lambda s: listed(s.list_prefix("a/")), ["a/b"]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_every_request_is_repeated_until_it_succeeds(name):
    request, expected = REQUESTS[name]
    flaky = Flaky(MemoryStore({"a/b": buffer()}), times=3)
    answer = sync(request(RemoteStore(flaky, "s3://b/x", QUICK)))
    assert flaky.asked == 4
    if name == "get":
        answer, expected = answer.to_bytes(), expected.to_bytes()
    assert answer == expected


def test_the_last_failure_is_the_error():
    flaky = Flaky(MemoryStore(), times=99, error=TimeoutError("no answer"))
    with pytest.raises(StoreError, match=r"'s3://b/x': a/c: failed after 4 attempts: TimeoutError: no answer"):
        sync(RemoteStore(flaky, "s3://b/x", QUICK).set("a/c", buffer()))
    assert flaky.asked == 4


@pytest.mark.parametrize("error", [PermissionError("denied"), FileNotFoundError("no bucket"), ValueError("x")])
def test_what_will_not_pass_is_not_repeated(error):
    flaky = Flaky(MemoryStore(), times=99, error=error)
    with pytest.raises(StoreError, match=str(error)):
        sync(RemoteStore(flaky, "s3://b/x", QUICK).set("a/c", buffer()))
    assert flaky.asked == 1


def test_waits_double_up_to_a_bound_and_vary():
    retries = Retries(num_attempts=8, first_seconds=0.5, longest_seconds=30)
    for failures, longest in ((1, 0.5), (2, 1), (5, 8), (9, 30), (40, 30)):
        waits = [retries.wait_seconds(failures) for _ in range(50)]
        assert longest / 2 <= min(waits) < max(waits) <= longest


def test_requests_of_all_loops_and_threads_run_on_one():
    flaky = Flaky(MemoryStore())
    store = RemoteStore(flaky, "s3://b/x", QUICK)

    def ask():
        with asyncio.Runner() as runner:
            for _ in range(2):
                runner.run(store.set("k", buffer()))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sync(store.get("k", default_buffer_prototype()))
    assert store.existing(["k", "l"]) == [True, False]
    assert flaky.asked == 9
    assert flaky.loops == {get_loop()}


def test_store_survives_pickling():
    store = pickle.loads(pickle.dumps(open_remote("memory://pickled/x.zarr")))
    sync(store.set("a", buffer()))
    assert open_remote("memory://pickled/x.zarr/").existing(["a"]) == [True]
    assert str(store) == "memory://pickled/x.zarr"


def test_paths_and_file_urls_are_local(tmp_path):
    assert access.store_at("a/b.zarr") == "a/b.zarr"
    assert access.store_at("file:///a/b%20c.zarr") == "/a/b c.zarr"
    assert access.local_path("s3://a/b") is None
    create_store(f"file://{tmp_path}/s.zarr", SPEC, SAMPLES, {})
    assert access.store_around(tmp_path / "s.zarr" / "scores" / "x") == (tmp_path / "s.zarr").resolve()
    assert access.store_around(tmp_path / "s.zarr") == (tmp_path / "s.zarr").resolve()
    assert access.store_around(tmp_path / "x") is None
    assert isinstance(access.open_group(str(tmp_path / "s.zarr")).store, LocalStore)


def test_unknown_scheme_and_missing_driver_say_what_to_do(monkeypatch):
    with pytest.raises(StoreError, match=r"expected a path, s3://, .* or another scheme of fsspec, got foo://"):
        open_remote("foo://a/b")
    absent = {"class": "aura_no_such_driver.FileSystem", "err": "install the driver"}
    monkeypatch.setitem(known_implementations, "absent", absent)
    with pytest.raises(StoreError, match=r"expected the fsspec driver of absent:// to be installed"):
        open_remote("absent://a/b")


def test_made_found_and_replaced_in_memory():
    store = "memory://made/x.zarr"
    assert not access.exists(store)
    create_store(store, SPEC, SAMPLES, {})
    assert access.exists(store)
    group = access.open_group(store)
    array = access.get_array(group, "activations/layer/max")
    chunks = [(0, 0), (0, 3), (1, 0)]
    assert access.missing_chunks(array, chunks) == chunks
    array[:32, :2] = 1.0
    assert access.missing_chunks(array, chunks) == chunks[1:]
    assert access.chunk_name(array, (0, 0)) == "memory://made/x.zarr/activations/layer/max/c/0/0"
    create_store(store, SPEC, SAMPLES, {})
    assert access.missing_chunks(access.get_array(access.open_group(store), array.path), chunks) == chunks


@pytest.mark.parametrize("place", ["memory://cut/x.zarr", "{}/x.zarr"])
def test_replacing_that_is_cut_off_leaves_what_may_be_replaced(place, tmp_path, monkeypatch):
    store = place.format(tmp_path)
    create_store(store, SPEC, SAMPLES, {})
    delete, deleted = zarr.Group.__delitem__, []

    def cut(group, name):
        if deleted:
            raise KeyboardInterrupt
        deleted.append(name)
        delete(group, name)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Group, "__delitem__", cut)
        with pytest.raises(KeyboardInterrupt):
            create_store(store, SPEC, SAMPLES, {})
    assert not access.exists(store), "ours, and never finished being made"
    create_store(store, SPEC, SAMPLES, {})
    assert access.exists(store)


def test_what_is_no_store_is_refused_in_memory():
    sync(open_remote("memory://other").set("table.csv", buffer()))
    with pytest.raises(StoreError, match="found something else"):
        access.exists("memory://other")
