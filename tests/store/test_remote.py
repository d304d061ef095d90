"""Stores at URLs: what is tried again and what is not, requests at once, credentials, names of places and chunks."""

import asyncio
import multiprocessing
import pickle
import threading
import time
import uuid
from datetime import timedelta

import numpy as np
import pytest
import zarr
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

import aura_dist.store.access as access
from aura_dist.errors import StoreError
from aura_dist.sites.site import Site
from aura_dist.store import remote
from aura_dist.store.remote import RETRIES, open_remote
from aura_dist.store.schema import Samples, StoreSpec, create_store
from tests.faults import proxy_before
from tests.s3 import ENVIRONMENT, s3_server

pytest.importorskip("obstore", reason="the extra `s3` is not installed")
pytest.importorskip("moto", reason="the S3 server of the extra `test` is not installed")

QUICK = {
    "max_retries": 4,
    "backoff": {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=20), "base": 2},
}
SPEC = StoreSpec(
    model={"name": "m"}, tokenizer={}, dtype="float32", max_tokens=8, tokens_per_batch=64, skip_special_tokens=False,
    poolings=("max",), concepts=("toxic",), data={}, sites=(Site("layer", "mlp", 0, 24),),
)  # fmt: skip
SAMPLES = Samples(
    np.arange(40), np.full(40, 8, dtype=np.int32), (np.arange(40) % 2).astype(np.int8)[:, None]
)  # fmt: skip


@pytest.fixture(scope="module")
def proxy():
    """A proxy before an S3 server with an empty bucket; the environment says where it is, as a user's would."""
    with s3_server("bucket") as server, proxy_before(server) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": proxy.url}).items():
            patch.setenv(name, value)
        patch.setattr(remote, "RETRIES", QUICK)
        yield proxy


@pytest.fixture
def flaky(proxy):
    """The proxy, and a store behind it that has one key, `a/b`."""
    store = open_remote(f"s3://bucket/{uuid.uuid4().hex}")
    sync(store.set("a/b", buffer()))
    proxy.asked.clear()
    yield proxy, store
    proxy.fault = lambda method, path, before: None


def buffer(content=b"content"):
    return default_buffer_prototype().buffer.from_bytes(content)


async def listed(keys):
    return [key async for key in keys]


REQUESTS = {
    "get": (lambda s: s.get("a/b", default_buffer_prototype()), b"content"),
    "range": (lambda s: s.get("a/b", default_buffer_prototype(), RangeByteRequest(2, 4)), b"nt"),
    "end": (lambda s: s.get("a/b", default_buffer_prototype(), SuffixByteRequest(3)), b"ent"),
    "missing": (lambda s: s.get("a/x", default_buffer_prototype()), None),
    "set": (lambda s: s.set("a/c", buffer()), None),
    "set_if_not_exists": (lambda s: s.set_if_not_exists("a/b", buffer(b"other")), None),
    "exists": (lambda s: s.exists("a/b"), True),
    "delete": (lambda s: s.delete("a/b"), None),
    "delete_dir": (lambda s: s.delete_dir("a"), None),
    "list_dir": (lambda s: listed(s.list_dir("a")), ["b"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", ["busy", "close"])
@pytest.mark.parametrize("name", REQUESTS)
def test_every_request_is_repeated_until_it_succeeds(name, fault, flaky):
    proxy, store = flaky
    request, expected = REQUESTS[name]
    proxy.fault = lambda method, path, before: fault if before < 3 else None
    answer = sync(request(store))
    assert set(proxy.asked.values()) == ({4, 5} if name == "delete_dir" else {4}), "which lists twice"
    if name in ("get", "range", "end"):
        answer = answer.to_bytes()
    assert answer == expected


@pytest.mark.parametrize("name", ["get", "set", "exists", "list_dir"])
def test_server_that_does_not_answer_is_asked_again(name, flaky, monkeypatch):
    proxy, store = flaky
    monkeypatch.setitem(remote.CLIENT, "read_timeout", timedelta(seconds=0.2))
    store = open_remote(str(store))
    proxy.fault = lambda method, path, before: "hang" if before < 2 else None
    sync(REQUESTS[name][0](store))
    assert set(proxy.asked.values()) == {3}


def test_what_was_cut_short_is_read_on(flaky):
    proxy, store = flaky
    content = bytes(range(256)) * 4000
    sync(store.set("large", buffer(content)))
    proxy.fault = lambda method, path, before: "cut" if before < 3 and method == "GET" else None
    assert sync(store.get("large", default_buffer_prototype())).to_bytes() == content
    assert proxy.faults["cut"] >= 3


@pytest.mark.parametrize(("fault", "text"), [("busy", "503 Service Unavailable"), ("close", "error sending request")])
def test_the_last_failure_is_the_error(fault, text, flaky):
    proxy, store = flaky
    proxy.fault = lambda method, path, before: fault
    with pytest.raises(StoreError, match=rf"--store '{store}': a/c: failed: [^\n]* after 4 retries[^\n]*{text}[^\n]*$"):
        sync(store.set("a/c", buffer()))
    assert list(proxy.asked.values()) == [5]


@pytest.mark.parametrize("name", REQUESTS)
def test_what_will_not_pass_is_not_repeated(name, flaky):
    proxy, store = flaky
    proxy.fault = lambda method, path, before: "deny"
    with pytest.raises(StoreError, match=r"failed: [^\n]*403 Forbidden[^\n]*; expected credentials that may list"):
        sync(REQUESTS[name][0](store))
    assert set(proxy.asked.values()) == {1}


def test_server_that_is_not_there(monkeypatch, proxy):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"after 4 retries[^\n]*Connection refused[^\n]*AWS_ENDPOINT_URL\)$"):
        open_remote("s3://bucket/x").is_vacant("mark")


def test_waits_are_a_minute_or_so():
    backoff = RETRIES["backoff"]
    first, longest = backoff["init_backoff"].total_seconds(), backoff["max_backoff"].total_seconds()
    random, totals = np.random.default_rng(0), []
    for _ in range(200):  # as object_store's `Backoff` draws them
        waits = [first]
        while len(waits) < RETRIES["max_retries"]:
            waits.append(min(longest, random.uniform(first, waits[-1] * backoff["base"])))
        totals.append(sum(waits))
    assert 20 < np.quantile(totals, 0.05) < np.quantile(totals, 0.95) < 120


def test_many_requests_of_threads_and_loops_are_few_at_once(flaky):
    proxy, store = flaky
    most, now, lock = [0], [0], threading.Lock()

    def slow(method, path, before):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1

    proxy.fault = slow

    def ask():
        with asyncio.Runner() as runner:
            for _ in range(2):
                runner.run(store.set("k", buffer()))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert store.existing(["a/b", *map(str, range(300))]) == [True] + [False] * 300
    for thread in threads:
        thread.join()
    assert 1 < most[0] <= remote.NUM_CONCURRENT + 3
    assert store.existing(["k"]) == [True]


@pytest.mark.parametrize("place", ["run.zarr", "a b/ü%20?x#y.zarr"])
def test_keys_are_as_the_url_says(place, flaky):
    proxy, _ = flaky
    sync(open_remote(f"s3a://bucket/{place}/").set("k", buffer()))
    assert {path for _, path in proxy.asked} == {f"/bucket/{place}/k"}


def test_deleting_spares_what_only_begins_alike(flaky):
    _, store = flaky
    for key in ("a/c/d", "a-beside", "b"):
        sync(store.set(key, buffer()))
    sync(store.delete_dir("a"))
    assert sorted(sync(listed(store.list()))) == ["a-beside", "b"]
    sync(store.clear())
    assert store.is_vacant("mark")


def test_store_survives_pickling(flaky):
    store = pickle.loads(pickle.dumps(open_remote("memory://pickled/x.zarr")))
    sync(store.set("a", buffer()))
    assert open_remote("memory://pickled/x.zarr/").existing(["a"]) == [True]
    assert str(store) == "memory://pickled/x.zarr"
    store = pickle.loads(pickle.dumps(flaky[1].with_read_only(True)))
    assert store.existing(["a/b"]) == [True]
    assert store.read_only


def test_fork_of_a_process_that_opened_a_url_is_refused(flaky):
    child = multiprocessing.get_context("fork").Process(target=_ask_in_fork, args=[flaky[1]])
    child.start()
    child.join(20)
    assert child.exitcode == 0


def _ask_in_fork(store):
    for ask in (lambda: open_remote(str(store)).is_vacant("mark"), lambda: asyncio.run(store.exists("a/b"))):
        with pytest.raises(StoreError, match="spawn or forkserver"):
            ask()


def test_what_boto3_finds(proxy, tmp_path, monkeypatch):
    for name in (*ENVIRONMENT, "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    (tmp_path / "config").write_text(
        "[profile lab]\naws_access_key_id = testing\naws_secret_access_key = testing\nregion = eu-north-1\n"
        f"endpoint_url = {proxy.url}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(StoreError, match=r"^--store 's3://bucket/p': expected credentials .* AWS_PROFILE"):
        open_remote("s3://bucket/p")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    store = open_remote("s3://bucket/p")
    assert store.store.config["region"] == "eu-north-1"
    sync(store.set("k", buffer()))
    assert pickle.loads(pickle.dumps(store)).existing(["k"]) == [True]
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(StoreError, match=r"'s3://bucket/p' cannot be opened: ProfileNotFound: .*other"):
        open_remote("s3://bucket/p")


def test_paths_and_file_urls_are_local(tmp_path):
    assert access.store_at("a/b.zarr") == "a/b.zarr"
    assert access.store_at("file:///a/b%20c.zarr") == "/a/b c.zarr"
    assert access.local_path("s3://a/b") is None
    create_store(f"file://{tmp_path}/s.zarr", SPEC, SAMPLES, {})
    assert access.store_around(tmp_path / "s.zarr" / "scores" / "x") == (tmp_path / "s.zarr").resolve()
    assert access.store_around(tmp_path / "s.zarr") == (tmp_path / "s.zarr").resolve()
    assert access.store_around(tmp_path / "x") is None
    assert isinstance(access.open_group(str(tmp_path / "s.zarr")).store, LocalStore)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("foo://a/b", r"expected a path, file://, s3://, gs://, az:// or, to read, https:// or http://, got foo://$"),
        ("simplecache::s3://a/b", "got simplecache::s3://"),
        ("file://host/a", "got file://"),
        ("s3:///a", "cannot be opened: "),
        ("https://host/a.zarr?signed", r"expected an address without \? and #"),
    ],
)
def test_urls_that_cannot_be_used(url, expected, proxy):
    with pytest.raises(StoreError, match=expected):
        access.open_group(url)


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
