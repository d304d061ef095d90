"""A store in S3: collected, killed, resumed and scored as a local one, and what can go wrong on the way."""

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import aura_dist
from aura_dist.cli import main
from aura_dist.collecting.capture import Capture
from aura_dist.interventions.artifact import Intervention
from aura_dist.store import remote
from aura_dist.store.access import exists, open_group
from aura_dist.store.record import unfinished
from tests.distributed.launch import run_ranks
from tests.faults import proxy_before
from tests.s3 import ENVIRONMENT, s3_server

obstore = pytest.importorskip("obstore", reason="the extra `s3` is not installed")
pytest.importorskip("moto", reason="the S3 server of the extra `test` is not installed")

pytestmark = pytest.mark.timeout(480)
SITE = "model.layers.1.mlp.up_proj"
MADE_BEFORE = Path(__file__).with_name("made_before.tar.gz")

# the command line of `aura-dist`, with a forward slow enough to be killed within
SLOWED = """
import sys, time
from aura_dist.cli import main
from aura_dist.collecting.capture import Capture
run = Capture.run
def slow(*args):
    time.sleep(0.4)
    run(*args)
Capture.run = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def s3():
    """URL of an empty bucket; the environment says where it is, as a user's would."""
    with s3_server("bucket") as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield "s3://bucket"


@pytest.fixture(scope="module")
def command(tiny_dir, sentences_csv):
    """`command(store)`: arguments that collect one module of 160 sentences: 2 tasks."""

    def arguments(store, *more, rows=80):
        return [
            "collect", "--model", str(tiny_dir("llama")), "--data", sentences_csv, "--concepts", "toxic",
            "--store", str(store), "--tokens-per-batch", "128", "--modules", SITE, "--num-positive", str(rows),
            "--num-negative", str(rows), *more,
        ]  # fmt: skip

    return arguments


@pytest.fixture(scope="module")
def local(command, tmp_path_factory):
    """The same in a directory, scored and fitted."""
    out = tmp_path_factory.mktemp("local")
    store = out / "store.zarr"
    assert main(command(store)) == 0
    assert main(["score", "--store", str(store)]) == 0
    assert main(["fit", "--store", str(store), "--concept", "toxic", "--out", str(out / "aura")]) == 0
    return store


def test_tokens_in_s3_are_those_of_a_local_store(s3, command, tmp_path):
    url, place = f"{s3}/tokens.zarr", tmp_path / "tokens.zarr"
    for store in (url, place):
        assert main(command(store, "--pooling", "tokens")) == 0
        assert main(["score", "--store", str(store), "--pooling", "max", "--statistics", "auroc"]) == 0
    trees = [aura_dist.open_store(store)["activations"][SITE] for store in (url, place)]
    for name in ("tokens", "max"):
        np.testing.assert_array_equal(*(tree[name].values for tree in trees))


@pytest.fixture
def proxy(s3, monkeypatch):
    """A proxy before the server, and few repetitions."""
    quick = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=20), "base": 2}
    monkeypatch.setattr(remote, "RETRIES", {"max_retries": 4, "backoff": quick})
    with proxy_before(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def bucket():
    return obstore.store.from_url("s3://bucket", client_options={"allow_http": True})


def upload(directory, url):
    """Put every file of a directory below a URL."""
    for file in (f for f in directory.rglob("*") if f.is_file()):
        write(f"{url}/{file.relative_to(directory)}", file.read_bytes())


def key_of(url):
    return url.removeprefix("s3://bucket/")


def read(url):
    return bytes(bucket().get(key_of(url)).bytes())


def write(url, content):
    bucket().put(key_of(url), content)


def assert_equal(one, other):
    """The same samples and responses, bit for bit."""
    one, other = aura_dist.open_store(str(one)), aura_dist.open_store(str(other))
    for name in ("row", "num_tokens", "label"):
        assert np.array_equal(one["samples"][name].values, other["samples"][name].values)
    there, here = (s[f"activations/{SITE}"]["max"].values for s in (one, other))
    assert there.shape == (160, 80)
    assert there.tobytes() == here.tobytes()


def test_killed_resumed_and_scored_equals_a_local_store(s3, command, local, tmp_path, capsys):
    store = f"{s3}/killed.zarr"
    child = subprocess.Popen([sys.executable, "-c", SLOWED, *command(store)], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            if exists(store) and len(unfinished(open_group(store))) <= 3:
                break
    finally:
        child.send_signal(signal.SIGKILL)
        output = child.communicate()[1]
    assert child.returncode == -signal.SIGKILL, output
    left = unfinished(open_group(store))
    assert 0 < len(left) <= 3, "the kill fell within the run"
    assert main(["score", "--store", store]) == 2
    assert "rows are missing" in capsys.readouterr().err

    assert main(command(store)) == 0
    assert_equal(store, local)
    assert main(["score", "--store", store]) == 0
    assert main(["fit", "--store", store, "--concept", "toxic", "--out", str(tmp_path / "aura")]) == 0
    assert_scores_equal(store, local)
    fitted, expected = Intervention.load(tmp_path / "aura"), Intervention.load(local.parent / "aura")
    assert fitted.meta["store_digest"] == expected.meta["store_digest"]
    assert np.array_equal(fitted.scale[SITE], expected.scale[SITE])


def with_environment(environment, arguments):
    """`aura-dist ARGUMENTS` as a rank, whose process has the environment that its server was started in."""
    os.environ.update(environment)
    return main(arguments)


def test_ranks_write_one_store_together(s3, command, local):
    store = f"{s3}/ranks.zarr"
    names = [*ENVIRONMENT, "AWS_ENDPOINT_URL"]
    call = partial(with_environment, {name: os.environ[name] for name in names})
    run_ranks(2, command(store), call)
    assert_equal(store, local)
    run_ranks(2, command(store, "--overwrite", "--sharding", "tensor"), call)
    assert not unfinished(open_group(store))
    one, other = (aura_dist.open_store(str(s))[f"activations/{SITE}"]["max"].values for s in (store, local))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def assert_scores_equal(store, local):
    top, expected = (aura_dist.top_neurons(str(s), "toxic", 80) for s in (store, local))
    assert top.equals(expected)


@pytest.mark.parametrize("fault", ["busy", "close"])
def test_failures_that_pass_are_outlived(fault, s3, command, local, proxy):
    proxy.fault = lambda method, path, before: fault if before < 2 and method in ("GET", "PUT") else None
    store = f"{s3}/flaky-{fault}.zarr"
    assert main(command(store)) == 0
    assert main(["score", "--store", store, "--dask", "threads"]) == 0
    assert proxy.faults[fault] > 100
    assert_equal(store, local)
    assert_scores_equal(store, local)


def test_failure_that_stays_is_one_error_and_the_store_resumes(s3, command, local, proxy, capsys):
    proxy.fault = lambda method, path, before: "close" if method == "PUT" and "/c/1/" in path else None
    store = f"{s3}/broken.zarr"
    assert main(command(store)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert f"--store {store!r}: activations/{SITE}/max/c/1/0: failed: " in error
    assert "after 4 retries" in error
    proxy.fault = lambda method, path, before: None
    assert main(command(store)) == 0
    assert_equal(store, local)


def test_finished_store_is_read_over_http(s3, command, local, proxy, tmp_path, capsys):
    store, web = f"{s3}/web.zarr", f"{proxy.url}/bucket/web.zarr"
    proxy.headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request"}
    assert main(command(store)) == 0
    assert main(["score", "--store", store]) == 0
    assert_equal(web, local)
    assert_scores_equal(web, local)
    assert main(["fit", "--store", web, "--concept", "toxic", "--out", str(tmp_path / "aura")]) == 0
    fitted, expected = Intervention.load(tmp_path / "aura"), Intervention.load(local.parent / "aura")
    assert np.array_equal(fitted.scale[SITE], expected.scale[SITE])
    assert main(["convert", "--store", web, "--to", "safetensors", "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    for arguments in (command(web), command(web, "--overwrite"), ["score", "--store", web, "--overwrite"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: --store {web!r}")
        assert "read" in error
    assert_scores_equal(store, local)


def assert_same_tree(one, other, *parts):
    """Every array of some parts of two stores, by path, value and coordinate."""
    trees = [aura_dist.open_store(str(store)) for store in (one, other)]
    for part in parts:
        nodes = [{n.path: n.to_dataset(inherit=False) for n in t[part].subtree if n.data_vars} for t in trees]
        assert nodes[0].keys() == nodes[1].keys() != set()
        for path, found in nodes[0].items():
            assert found.drop_attrs().equals(nodes[1][path].drop_attrs()), path


def test_store_is_copied_from_s3(s3, command, tmp_path):
    """With tokens, and a pooling that was made of them."""
    store, copy = f"{s3}/copied.zarr", tmp_path / "copy.zarr"
    assert main(command(store, "--pooling", "mean", "tokens")) == 0
    scored = ["--pooling", "max", "--statistics", "auroc"]
    assert main(["score", "--store", store, *scored]) == 0
    assert main(["convert", "--store", store, "--to", "store", "--out", str(copy)]) == 0
    assert main(["score", "--store", str(copy), *scored]) == 0
    assert_same_tree(copy, store, "activations", "samples", "tokens", "scores")


def test_unfinished_store_is_copied_from_s3_and_finished(s3, command, tmp_path, monkeypatch):
    run, calls = Capture.run, []

    def counted(self, *args):
        calls.append(args)
        if len(calls) == num_calls:
            raise KeyboardInterrupt
        run(self, *args)

    store, copy, whole = f"{s3}/half.zarr", tmp_path / "half.zarr", tmp_path / "whole.zarr"
    flags, num_calls = ["--pooling", "mean", "tokens"], 0
    monkeypatch.setattr(Capture, "run", counted)
    assert main(command(whole, *flags)) == 0
    num_calls = len(calls)
    calls.clear()
    assert main(command(store, *flags)) == 130, "at the last batch"
    left = unfinished(open_group(store))
    assert len(left) == 1
    assert main(["convert", "--store", store, "--to", "store", "--out", str(copy)]) == 0
    assert unfinished(open_group(str(copy))) == left
    monkeypatch.setattr(Capture, "run", run)
    assert main(command(copy, *flags)) == 0
    assert_same_tree(copy, whole, "activations", "samples", "tokens")


def test_store_of_an_earlier_schema_is_renewed_from_s3(s3, tmp_path):
    with tarfile.open(MADE_BEFORE) as archive:
        archive.extractall(tmp_path, filter="data")
    old, url, new = tmp_path / "run" / "store.zarr", f"{s3}/before.zarr", tmp_path / "new.zarr"
    upload(old, url)
    assert main(["convert", "--store", url, "--to", "store", "--out", str(new)]) == 0
    assert main(["score", "--store", str(new)]) == 0
    assert_same_tree(new, old, "activations", "samples", "scores")


def test_report_and_status_of_a_store_in_s3(s3, command, local, tmp_path, capsys):
    """The run's configuration names the store; the page is that of a local store, but for names and times."""
    pytest.importorskip("jinja2", reason="the extra `report` is not installed")
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    store = f"{s3}/reported.zarr"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"collect:\n  store: {store}\n")
    assert main(["status", str(run)]) == 0
    assert re.search("collect +nothing", capsys.readouterr().out), "there is no store yet"
    assert main(command(store)) == 0
    assert main(["score", "--store", store]) == 0
    capsys.readouterr()
    assert main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 tasks" in shown
    assert "160 of 160 rows" in shown
    pages = []
    for directory in (run, local.parent):
        assert main(["report", str(directory), "--out", str(tmp_path / "page.html")]) == 0
        pages.append((tmp_path / "page.html").read_text())
    assert store in pages[0]
    best = aura_dist.top_neurons(str(local), "toxic", 25)
    for page in pages:
        assert all(f"{auroc:.4f}" in page for auroc in best["auroc"])


def test_missing_and_damaged_chunks_and_overwrite(s3, command, capsys):
    store = f"{s3}/holes.zarr"
    few = command(store, rows=20)
    assert main(few) == 0
    chunk = f"{store}/activations/{SITE}/max/c/1/0"
    content = bytearray(read(chunk))
    content[len(content) // 2] ^= 1
    write(chunk, bytes(content))
    assert main(["score", "--store", store]) == 2
    assert f"the chunk {chunk!r} is damaged" in capsys.readouterr().err
    for size, text in ((len(content) // 2, "is damaged"), (10, "is damaged"), (0, "again with --overwrite")):
        write(chunk, bytes(content[:size]))
        assert main(["score", "--store", store]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert f"{SITE}/max/c/1/0" in error
    bucket().delete(key_of(chunk))
    assert main(["score", "--store", store]) == 2
    assert f"the chunk {chunk!r} is missing" in capsys.readouterr().err
    write(f"{s3}/holes.zarr-beside/kept", b"not of the store")
    assert main([*few, "--overwrite"]) == 0
    assert main(["score", "--store", store]) == 0
    assert read(f"{s3}/holes.zarr-beside/kept") == b"not of the store"


def test_what_is_no_store_is_never_replaced(s3, command, capsys):
    write(f"{s3}/results/table.csv", b"precious")
    assert main(command(f"{s3}/results", "--overwrite")) == 2
    assert "expected a store or nothing, found something else" in capsys.readouterr().err
    assert read(f"{s3}/results/table.csv") == b"precious"


def test_bucket_that_is_not_there(s3, command, capsys):
    assert main(command("s3://nowhere/x.zarr")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --store 's3://nowhere/x.zarr'")
    assert error.endswith("make the bucket first, or choose another")


def test_credentials_that_are_not_there(s3, command, monkeypatch, capsys):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert main(command(f"{s3}/x.zarr")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --store '{s3}/x.zarr'")
    assert "AWS_ACCESS_KEY_ID" in error
