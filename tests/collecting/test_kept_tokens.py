"""Stores of every token's values: the forward's numbers, and poolings made from them are those that are collected."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
import transformers as hf

import aura_dist
from aura_dist.cli import main
from aura_dist.collecting.capture import Capture
from aura_dist.collecting.repool import repool
from aura_dist.planning.work import TOKENS_COMPRESSED
from aura_dist.sites.pooling import POOLINGS
from aura_dist.store.access import open_group, read_array
from aura_dist.store.first_token import _counts
from aura_dist.store.record import response_names, unfinished
from aura_dist.store.schema import TOKEN_FIELDS, StoreSpec, activation_path
from aura_dist.store.tokens import StoredTokens, num_nonfinite
from aura_dist.store.writer import ChunkWriter
from aura_dist.text.table import read_table
from tests.distributed.launch import run_ranks
from tests.store.test_store_faults import chunk_files

SITES = {"model.layers.1": "residual", "model.layers.0.mlp.down_proj:input": "neurons"}
MODULES = ["residual", "neurons"]
FEW = ["--tokens-per-batch", "256", "--num-positive", "70", "--num-negative", "70"]
TOKENS = ["--pooling", "tokens"]
# Forks for each share: the child collects and is killed, the first while it makes the store, later ones while they hand
# values over or are half through the file of a shard. Files are slow, so that values wait to be written. At last a
# child collects to the end. A task has four batches of six modules at least; making the store takes over thirty files.
KILLED = """
import json, os, signal, sys, time
from itertools import count
from zarr.storage import LocalStore
from aura_dist.cli import main
from aura_dist.collecting.tokens import TokenSink
from aura_dist.store import shards
from aura_dist.store.access import exists, open_group
from aura_dist.store.record import unfinished
command, shares = json.loads(sys.argv[1])
store = command[command.index("--store") + 1]
take, replace_file, put = TokenSink.take, shards.replace_file, LocalStore.set
for number, share in enumerate([*shares, None]):
    child = os.fork()
    if child == 0:
        moments = 48 * (len(unfinished(open_group(store))) if exists(store) else 4) if number else 30
        calls, moment = count(1), None if share is None else 1 + int(share * moments)
        def strike():
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        def struck_take(*arguments):
            strike()
            take(*arguments)
        def struck_file(path, content, partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name + partial).write_bytes(content[: len(content) // 2])
            strike()
            time.sleep(0.005)
            replace_file(path, content, partial)
        async def struck_put(*arguments):
            strike()
            await put(*arguments)
        if number:
            TokenSink.take, shards.replace_file = struck_take, struck_file
        else:
            LocalStore.set = struck_put
        os._exit(main(command))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if share is None else -signal.SIGKILL), (share, status)
"""


def command(model, data, store, *more, modules=MODULES, few=FEW):
    given = ["--model", str(model), "--data", data, "--concepts", "toxic", "--store", str(store), "--modules", *modules]
    return ["collect", *given, *few, *map(str, more)]


def collect(*arguments, **settings):
    return main(command(*arguments, **settings))


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def stores(dtype, tiny_dir, sentences_csv, tmp_path_factory):
    """One store of all poolings, and one of tokens alone."""
    place, flags = tmp_path_factory.mktemp(dtype), ["--dtype", dtype, "--skip-special-tokens"]
    model = tiny_dir("llama")
    assert collect(model, sentences_csv, place / "pooled.zarr", *flags, "--pooling", *POOLINGS) == 0
    assert collect(model, sentences_csv, place / "tokens.zarr", *flags, *TOKENS) == 0
    return place / "pooled.zarr", place / "tokens.zarr"


def texts_of(store, data):
    rows = aura_dist.open_store(store)["samples"]["row"].values
    return [read_table(data, ["text", "toxic"]).columns["text"][row] for row in rows]


@torch.no_grad()
def plainly(model, texts, dtype="float32"):
    """For each text its ids, and site → [T, D] values, from plain transformers."""
    plain = hf.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    tokenizer, seen = hf.AutoTokenizer.from_pretrained(model), {}
    plain.get_submodule("model.layers.1").register_forward_hook(
        lambda _m, _a, out: seen.__setitem__("model.layers.1", out[0])
    )
    plain.get_submodule("model.layers.0.mlp.down_proj").register_forward_pre_hook(
        lambda _m, args: seen.__setitem__("model.layers.0.mlp.down_proj:input", args[0][0])
    )
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        plain(**inputs)
        yield inputs["input_ids"][0].tolist(), {site: acts_TD.float().numpy() for site, acts_TD in seen.items()}


def test_every_value_is_that_of_plain_transformers(stores, dtype, tiny_dir, sentences_csv):
    tree = aura_dist.open_store(stores[1])
    offset, tolerance = tree["samples"]["offset"].values, {"float32": 1e-5, "bfloat16": 0.05, "float16": 5e-3}[dtype]
    values = {site: tree["activations"][site]["tokens"].values for site in SITES}
    ids, sample, position, counted = (tree["tokens"][n].values for n in ("input_ids", "sample", "position", "counted"))
    assert offset[-1] == len(ids) == tree["samples"]["num_tokens"].values.sum()
    for number, (row_ids, acts) in enumerate(plainly(tiny_dir("llama"), texts_of(stores[1], sentences_csv), dtype)):
        here = slice(offset[number], offset[number + 1])
        assert ids[here].tolist() == row_ids
        assert set(sample[here]) == {number}
        assert position[here].tolist() == list(range(len(row_ids)))
        assert counted[here].tolist() == [int(i > 2) for i in row_ids]
        for site, acts_TD in acts.items():
            assert np.abs(values[site][here] - acts_TD).max() <= tolerance * np.abs(acts_TD).max()
    some = slice(int(offset[3]), int(offset[5]))
    lazy = tree["activations"]["model.layers.1"]["tokens"]
    assert lazy.dtype == ("float16" if dtype == "float16" else "float32")
    np.testing.assert_array_equal(lazy[some, 7:9].values, values["model.layers.1"][some, 7:9])


def test_poolings_from_tokens_are_those_that_are_collected_bit_for_bit(stores):
    groups = [open_group(str(store)) for store in stores]
    repool(groups[1], StoreSpec.of(groups[1]), list(POOLINGS))
    for name in response_names(groups[0]):
        ours, theirs = (read_array(group, name, complete=True) for group in groups[::-1])
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    counts = [_counts(group, StoreSpec.of(group), [0, 1]) for group in groups]
    assert counts[0].keys() == counts[1].keys()
    for key in counts[0]:
        np.testing.assert_array_equal(counts[0][key], counts[1][key])


@pytest.fixture(scope="module")
def store(tiny_dir, sentences_csv, tmp_path_factory):
    """Tokens alone, float32; not to be changed."""
    place = tmp_path_factory.mktemp("tokens") / "s.zarr"
    assert collect(tiny_dir("llama"), sentences_csv, place, *TOKENS) == 0
    return place


def test_scores_of_a_pooling_from_tokens_are_those_of_one_that_is_collected(
    store, tiny_dir, sentences_csv, tmp_path, capsys
):
    pooled, tokens = tmp_path / "p.zarr", tmp_path / "run" / "store.zarr"
    shutil.copytree(store, tokens)
    assert main(["status", str(tmp_path / "run")]) == 0
    assert "tokens alone; `score --pooling` makes poolings of them" in capsys.readouterr().out
    assert collect(tiny_dir("llama"), sentences_csv, pooled) == 0
    assert main(["score", "--store", str(tokens)]) == 2
    assert "expected --pooling, because the store holds tokens and no pooling" in capsys.readouterr().err
    flags = ["--pooling", "max", "--statistics", "auroc"]
    for one in (pooled, tokens):
        assert main(["score", "--store", str(one), *flags]) == 0
    a, b = (aura_dist.open_store(one)["scores"] for one in (pooled, tokens))
    for node in a.subtree:
        assert node.to_dataset(inherit=False).drop_attrs().equals(b[node.relative_to(a)].to_dataset(inherit=False))
    # what is made is kept, unless it is to be made again; `collect` finds the same store as before
    shard = tokens / activation_path("model.layers.1", "max") / "c" / "0" / "0"
    before = shard.stat().st_mtime_ns
    assert main(["score", "--store", str(tokens), *flags]) == 0
    assert shard.stat().st_mtime_ns == before
    shard.write_bytes(b"")
    assert main(["score", "--store", str(tokens), *flags, "--overwrite"]) == 0
    assert shard.read_bytes() == (pooled / shard.relative_to(tokens)).read_bytes()
    assert collect(tiny_dir("llama"), sentences_csv, tokens, *TOKENS) == 0
    assert main(["fit", "--store", str(tokens), "--concept", "toxic", "--out", str(tmp_path / "aura")]) == 0
    assert main(["status", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    mean = ["fit", "--store", str(tokens), "--concept", "toxic", "--method", "mean-act", "--out", str(tmp_path / "no")]
    assert main(mean) == 2
    assert "score with `--pooling mean` for it" in capsys.readouterr().err


def same(a, b):
    """Whether two stores hold the same files of values and tokens."""
    files = [
        {
            p.relative_to(s): p.read_bytes()
            for part in ("activations", "tokens")
            for p in (s / part).rglob("*")
            if p.is_file()
        }
        for s in (a, b)
    ]
    assert files[0].keys() == files[1].keys()
    return files[0] == files[1]


def test_a_store_that_was_cut_off_and_continued_is_the_same(store, tiny_dir, sentences_csv, tmp_path, monkeypatch):
    run, written, calls = Capture.run, ChunkWriter._token_writes, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return run(self, *args)

    seen = []

    def recorded(self, site, place, values_TD):
        seen.append((site, place))
        return written(self, site, place, values_TD)

    monkeypatch.setattr(ChunkWriter, "_token_writes", recorded)
    monkeypatch.setattr(Capture, "run", interrupted)
    again = tmp_path / "s.zarr"
    assert collect(tiny_dir("llama"), sentences_csv, again, *TOKENS) == 130
    left = len(unfinished(open_group(str(again))))
    assert left > 0
    tree = aura_dist.open_store(again)
    assert np.isnan(tree["activations"]["model.layers.1"]["tokens"].values).any()
    assert main(["score", "--store", str(again), "--pooling", "max", "--partial"]) == 2
    monkeypatch.setattr(Capture, "run", run)
    seen.clear()
    assert collect(tiny_dir("llama"), sentences_csv, again, *TOKENS) == 0
    assert len(seen) == len(set(seen)), "each shard is written once"
    assert same(store, again)


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_at_random_moments_and_resumed(kills, tiny_dir, sentences_csv, tmp_path):
    """Tokens of 120 texts, in four tasks: every value, every index and every mark are the uninterrupted store's."""
    few, flags = [*FEW[:2], "--num-positive", "60", "--num-negative", "60"], [*TOKENS, "--max-attempts", "0"]
    whole, killed = (
        command(tiny_dir("llama"), sentences_csv, tmp_path / name, *flags, few=few) for name in ("whole", "killed")
    )
    assert main(whole) == 0
    chance = random.Random(kills)
    shares = [(part + chance.random()) / kills for part in range(kills)]
    chance.shuffle(shares)
    subprocess.run([sys.executable, "-c", KILLED, json.dumps([killed, shares])], check=True, timeout=100 + 60 * kills)
    assert same(tmp_path / "whole", tmp_path / "killed")
    assert chunk_files(tmp_path / "killed") == chunk_files(tmp_path / "whole")


def test_memory_of_what_waits_is_bounded(store, tiny_dir, sentences_csv, tmp_path, monkeypatch):
    """Where the disk is slow, the forward waits; where it fails, the run ends."""
    monkeypatch.setattr("aura_dist.store.writer.MAX_WAITING_BYTES", 1)
    assert collect(tiny_dir("llama"), sentences_csv, tmp_path / "s.zarr", *TOKENS) == 0
    assert same(store, tmp_path / "s.zarr")
    monkeypatch.setattr(ChunkWriter, "_token_writes", lambda *_: 1 / 0)
    assert collect(tiny_dir("llama"), sentences_csv, tmp_path / "t.zarr", *TOKENS) == 2


@pytest.mark.parametrize("sharding", ["layers", "dispatch"])
def test_one_process_that_does_not_hold_the_model(sharding, store, tiny_dir, sentences_csv, tmp_path):
    more = ["--offload-folder", str(tmp_path / "away"), "--max-memory", "cpu=150KB"] if sharding == "dispatch" else []
    flags = [*TOKENS, "--sharding", sharding, *more]
    assert collect(tiny_dir("llama"), sentences_csv, tmp_path / "s.zarr", *flags) == 0
    assert same(store, tmp_path / "s.zarr")


def test_tokens_of_some_modules_beside_poolings(store, tiny_dir, sentences_csv, tmp_path, capsys):
    some = tmp_path / "s.zarr"
    assert collect(tiny_dir("llama"), sentences_csv, some, "--keep-tokens", "*.layers.1", "--pooling", "mean") == 0
    tree = aura_dist.open_store(some)
    assert [site for site in tree["activations"] if "tokens" in tree["activations"][site].data_vars] == [
        "model.layers.1"
    ]
    assert set(tree["activations"]["model.layers.0"].coords) >= {"tokens", "num_tokens"}
    whole = aura_dist.open_store(store)["activations"]["model.layers.1"]["tokens"]
    np.testing.assert_array_equal(tree["activations"]["model.layers.1"]["tokens"], whole)
    assert main(["score", "--store", str(some), "--pooling", "max"]) == 2
    assert "or tokens of all modules to make it from, found none of model.layers.0" in capsys.readouterr().err
    assert main(["score", "--store", str(some), "--pooling", "mean"]) == 0
    # another choice of tokens is another store
    assert collect(tiny_dir("llama"), sentences_csv, some, "--pooling", "mean") == 2
    assert "was collected under another tokens: expected ['model.layers.1'], got ()" in capsys.readouterr().err


def test_refused(tiny_dir, sentences_csv, tmp_path, capsys, monkeypatch):
    def refusal(*flags):
        assert collect(tiny_dir("llama"), sentences_csv, tmp_path / "s.zarr", *flags) == 2
        assert not (tmp_path / "s.zarr" / "zarr.json").exists()
        return capsys.readouterr().err

    assert "--keep-tokens 'nothing*': expected a pattern of captured modules" in refusal("--keep-tokens", "nothing*")
    assert "--keep-tokens: expected it without --pooling tokens" in refusal(*TOKENS, "--keep-tokens", "residual")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**5))
    assert "because the values of" in refusal(*TOKENS)
    assert "expected room for about" in refusal("--keep-tokens", "residual")
    assert collect(tiny_dir("llama"), sentences_csv, tmp_path / "pooled.zarr") == 0, "no tokens, no such check"


def test_plan_says_bytes_and_files(store, tiny_dir, sentences_csv, tmp_path, capsys, monkeypatch):
    flags = ["--model", str(tiny_dir("llama")), "--data", sentences_csv, "--concepts", "toxic", "--modules", *MODULES]
    files = sum(1 for p in store.rglob("*") if p.is_file())
    assert main(["plan", *flags, *FEW, *TOKENS]) == 0
    shown = capsys.readouterr().out
    num_tokens = StoredTokens.of(open_group(str(store))).num_tokens
    width = 3 * (48 + 80)
    assert f"values of {num_tokens:,} tokens at {width:,} neurons" in shown
    assert f"  {files:,} files, and" in shown
    assert f"{num_tokens * width * 4 / 1e6:.3g} MB raw" in shown
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**5))
    assert main(["plan", *flags, *FEW, *TOKENS, "--store", str(tmp_path / "s.zarr")]) == 2
    assert "keep tokens of fewer modules" in capsys.readouterr().err
    assert main(["plan", *flags, *FEW, *TOKENS, "--store", str(store)]) == 0, "what is written needs no more room"


def test_a_damaged_shard_is_named(store, tmp_path, capsys):
    broken = tmp_path / "s.zarr"
    shutil.copytree(store, broken)
    shards = sorted((broken / activation_path("model.layers.1") / "c").rglob("0"))
    shard = [p for p in shards if p.is_file()][2]
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    for bad, what in ((bytes(content), "checksum"), (bytes(content[:-7]), "damaged"), (None, "missing")):
        shard.unlink() if bad is None else shard.write_bytes(bad)
        assert main(["score", "--store", str(broken), "--pooling", "max"]) == 2
        error = capsys.readouterr().err
        assert str(shard) in error
        assert what in error
        assert main(["convert", "--store", str(broken), "--to", "safetensors", "--out", str(tmp_path / "t")]) == 2
        assert str(shard) in capsys.readouterr().err
    assert "repooled" not in open_group(str(broken)).attrs


def test_experts_are_kept_as_dense_values(tiny_dir, sentences_csv, tmp_path):
    model, flags = tiny_dir("qwen3-moe"), {"modules": ["experts", "routing"]}
    assert collect(model, sentences_csv, tmp_path / "p.zarr", "--pooling", *POOLINGS, **flags) == 0
    assert collect(model, sentences_csv, tmp_path / "t.zarr", *TOKENS, **flags) == 0
    groups = [open_group(str(tmp_path / name)) for name in ("p.zarr", "t.zarr")]
    repool(groups[1], StoreSpec.of(groups[1]), list(POOLINGS))
    for name in response_names(groups[0]):
        np.testing.assert_array_equal(*(read_array(group, name, complete=True) for group in groups), err_msg=name)


def test_a_model_in_memory(tiny_dir, sentences_csv, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_dir("llama"))
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_dir("llama"))
    texts = ["a", "b" * 30, "such a nice day", "go away", "x y z"]
    store = aura_dist.collect(
        model, texts, [0, 1, 0, 1, 0], tokenizer=tokenizer, store=tmp_path / "s.zarr", modules=MODULES,
        pooling=["max", "tokens"],
    )  # fmt: skip
    tree = aura_dist.open_store(store)
    rows, offset = tree["samples"]["row"].values, tree["samples"]["offset"].values
    for number, (_, acts) in enumerate(plainly(tiny_dir("llama"), [texts[row] for row in rows])):
        for site, acts_TD in acts.items():
            node = tree["activations"][site]
            ours = node["tokens"][offset[number] : offset[number + 1]].values
            np.testing.assert_allclose(ours, acts_TD, atol=1e-5, rtol=1e-5)
            np.testing.assert_array_equal(node["max"][number].values, ours.max(axis=0))
    scored = aura_dist.score(store, pooling=["min"], statistics=["auroc"], top=2)
    assert scored["pooling"].tolist() == ["min", "min"]


def test_values_that_are_not_finite_are_counted():
    values = np.array([1.0, np.nan, np.inf, -np.inf, 3e38], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert num_nonfinite(values) == num_nonfinite(bits) == 3


@pytest.mark.slow
@pytest.mark.realmodel
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gemma(dtype, gemma_dir, jigsaw_csv, tmp_path, capsys):
    """200 comments, the residual stream and the MLP's neurons: every value, the poolings, and what several ranks write.

    Values are compared relative to the largest of a module's in a text, because Gemma's residual stream goes up to
    thousands.
    """
    flags = ["--num-positive", "100", "--num-negative", "100", "--dtype", dtype, "--modules", *MODULES]
    given = ["collect", "--model", str(gemma_dir), "--data", jigsaw_csv, "--concepts", "toxic", *flags]
    store, began = tmp_path / "s.zarr", time.monotonic()
    assert main([*given, "--store", str(store), "--pooling", "tokens", *POOLINGS]) == 0
    seconds = time.monotonic() - began
    tree = aura_dist.open_store(store)
    table = read_table(jigsaw_csv, ["text", "toxic"]).columns["text"]
    plain = hf.AutoModelForCausalLM.from_pretrained(gemma_dir, dtype=getattr(torch, dtype))
    tokenizer, seen = hf.AutoTokenizer.from_pretrained(gemma_dir), {}
    for site in tree["activations"]:
        module = plain.get_submodule(site.removesuffix(":input"))
        if site.endswith(":input"):
            module.register_forward_pre_hook(lambda _m, args, s=site: seen.__setitem__(s, args[0][0]))
        else:
            module.register_forward_hook(lambda _m, _a, out, s=site: seen.__setitem__(s, out[0]))
    offset, worst = tree["samples"]["offset"].values, 0.0
    values = {site: tree["activations"][site]["tokens"] for site in tree["activations"]}
    assert len(offset) == 201
    assert {site.endswith("mlp.down_proj:input") for site in values} == {True, False}
    with torch.no_grad():
        for number, row in list(enumerate(tree["samples"]["row"].values))[:: 1 if dtype == "float32" else 20]:
            inputs = tokenizer(table[row], return_tensors="pt", truncation=True, max_length=128)
            plain(**inputs)
            here = slice(offset[number], offset[number + 1])
            assert tree["tokens"]["input_ids"][here].values.tolist() == inputs["input_ids"][0].tolist()
            for site, acts_TD in seen.items():
                difference = np.abs(values[site][here].values - acts_TD.float().numpy()).max()
                worst = max(worst, float(difference / acts_TD.abs().max()))
    del plain
    num_tokens, num_neurons = tree["tokens"].sizes["token"], sum(v.shape[1] for v in values.values())
    raw = num_tokens * num_neurons * (4 if dtype == "float32" else 2)
    places = [store / activation_path(site) for site in values]
    size = sum(p.stat().st_size for place in places for p in place.rglob("*") if p.is_file())
    with capsys.disabled():
        print(f"\n{dtype}: {num_tokens:,} tokens at {num_neurons:,} neurons, largest difference {worst:.1e}")
        print(f"{raw / 1e9:.2f} GB raw, {size / 1e9:.2f} GB in files, collected in {seconds:.0f} s")
    assert worst <= (1e-5 if dtype == "float32" else 0.05)
    assert size / raw <= TOKENS_COMPRESSED[dtype], "what `plan` says"
    group = open_group(str(store))
    collected = {name: read_array(group, name) for name in response_names(group) if not name.endswith("/tokens")}
    for sharding in ("replicate", "tensor=2") if dtype == "float32" else ():
        other, began = tmp_path / f"{sharding}.zarr", time.monotonic()
        again = [*given, "--store", str(other), "--pooling", "tokens", *POOLINGS, "--sharding", sharding]
        run_ranks(2, again, timeout_seconds=600)
        largest = largest_difference(other, store)
        with capsys.disabled():
            seconds = time.monotonic() - began
            print(f"2 ranks, {sharding}: largest difference {largest:.1e}; {seconds:.0f} s with the comparison")
        assert largest <= 1e-5
        shutil.rmtree(other)  # some GB
    repool(group, StoreSpec.of(group), list(POOLINGS))  # in place of those that were collected
    for name, theirs in collected.items():
        np.testing.assert_array_equal(read_array(group, name, complete=True), theirs, err_msg=name)


def largest_difference(ours, theirs):
    """The largest difference of two stores' values at tokens, relative to a module's largest; all indices are equal."""
    groups = [open_group(str(store)) for store in (ours, theirs)]
    for path in ("samples/row", "samples/offset", "samples/place", *(f"tokens/{name}" for name in TOKEN_FIELDS)):
        np.testing.assert_array_equal(*(read_array(group, path) for group in groups), err_msg=path)
    assert response_names(groups[0]) == response_names(groups[1])
    tokens, largest = [StoredTokens.of(group) for group in groups], 0.0
    for site in (site.name for site in StoreSpec.of(groups[0]).token_sites):
        a, b = (one.values(site).read(slice(0, one.num_tokens)) for one in tokens)
        largest = max(largest, float(np.abs(a - b).max() / np.abs(b).max()))
    return largest
