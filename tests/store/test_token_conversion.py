"""What `convert` writes of a store of tokens holds the store's own numbers, as other libraries read them."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

import aura_dist
from aura_dist.cli import main
from aura_dist.store import conversion, saelens
from aura_dist.store.access import open_group, read_array
from aura_dist.store.record import response_names
from aura_dist.store.tokens import StoredTokens

SITES = ["model.layers.0", "model.layers.1"]
SETTINGS = ["--modules", "*.layers.0", "*.layers.1", "--tokens-per-batch", "256", "--concepts", "toxic"]
SETTINGS += ["--num-positive", "70", "--num-negative", "70", "--max-tokens", "40"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def store(request, tiny_dir, sentences_csv, tmp_path_factory):
    place = tmp_path_factory.mktemp("stores") / "s.zarr"
    given = [
        "--model",
        str(tiny_dir("llama")),
        "--data",
        sentences_csv,
        "--dtype",
        request.param,
        "--store",
        str(place),
    ]
    assert main(["collect", *given, *SETTINGS, "--pooling", "mean", "tokens"]) == 0
    return place


@pytest.fixture(scope="module")
def tree(store):
    return aura_dist.open_store(store).load()


def convert(store, to, out, *more):
    return main(["convert", "--store", str(store), "--to", to, "--out", str(out), *more])


@pytest.mark.parametrize(("flags", "context"), [((), 40), (("--context", "64"), 64)])
def test_saelens(store, tree, tmp_path, monkeypatch, capsys, flags, context):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    monkeypatch.setattr(saelens, "_PART_BYTES", 100_000)
    assert convert(store, "saelens", tmp_path / "s", *flags) == 0
    num_rows, left = divmod(tree["tokens"].sizes["token"], context)
    assert (f"the last {left} of" in capsys.readouterr().err) == bool(left)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == SITES
    for site in SITES:
        loaded = datasets.load_from_disk(str(tmp_path / "s" / site))
        assert loaded.features[site] == datasets.Array2D((context, 48), "float32")
        assert loaded.features["token_ids"].length == context
        assert len(loaded) == num_rows
        loaded.set_format("torch", dtype=torch.float32)  # as SAELens does
        values = loaded[:][site].reshape(-1, 48).numpy()
        np.testing.assert_array_equal(values, tree["activations"][site]["tokens"].values[: num_rows * context])
        ids = loaded[:]["token_ids"].reshape(-1).numpy()
        np.testing.assert_array_equal(ids, tree["tokens"]["input_ids"].values[: num_rows * context])
        assert len(list((tmp_path / "s" / site).glob("*.arrow"))) > 1


def test_saelens_itself_loads_it(store, tree, tmp_path):
    training = pytest.importorskip("sae_lens.training.activations_store", reason="sae-lens is not installed")
    assert convert(store, "saelens", tmp_path / "s", "--modules", SITES[1]) == 0
    loaded = training.ActivationsStore(
        model=None, dataset=None, streaming=False, hook_name=SITES[1], hook_head_index=None, context_size=40, d_in=48,
        n_batches_in_buffer=2, total_training_tokens=400, store_batch_size_prompts=2, train_batch_size_tokens=20,
        prepend_bos=True, normalize_activations="none", device=torch.device("cpu"), dtype="float32",
        cached_activations_path=str(tmp_path / "s" / SITES[1]),
    )  # fmt: skip
    values, ids = loaded.get_raw_llm_batch()
    np.testing.assert_array_equal(values.reshape(-1, 48), tree["activations"][SITES[1]]["tokens"].values[:80])
    np.testing.assert_array_equal(ids.reshape(-1), tree["tokens"]["input_ids"].values[:80])


def test_datasets(store, tree, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    assert convert(store, "datasets", tmp_path / "d") == 0
    assert convert(store, "datasets", tmp_path / "t", "--pooling", "tokens", "--modules", SITES[1]) == 0
    load = datasets.load_dataset
    pooled, tokens = (
        load(str(tmp_path / n), split="train", cache_dir=str(tmp_path / "cache"))
        .with_format("numpy") for n in ("d", "t")
    )  # fmt: skip
    offset, ids = tree["samples"]["offset"].values, tree["tokens"]["input_ids"].values
    assert set(pooled.column_names) == {"row", "num_tokens", "toxic", "input_ids", *(f"{s}/mean" for s in SITES)}
    assert set(tokens.column_names) == {"row", "num_tokens", "toxic", "input_ids", f"{SITES[1]}/tokens"}
    for number, (a, b) in enumerate(zip(pooled, tokens, strict=True)):
        here = slice(offset[number], offset[number + 1])
        assert a["input_ids"].tolist() == b["input_ids"].tolist() == ids[here].tolist()
        values = tree["activations"][SITES[1]]["tokens"].values[here]
        np.testing.assert_array_equal(np.stack(b[f"{SITES[1]}/tokens"]), values)


def test_safetensors(store, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "_FILE_BYTES", 100_000)
    monkeypatch.setattr(conversion, "_TOKENS_AT_ONCE", 100)
    assert convert(store, "safetensors", tmp_path / "t", "--pooling", "mean", "tokens") == 0
    names = json.loads((tmp_path / "t" / "index.json").read_text())["weight_map"]
    read = {}
    for file in set(names.values()):
        with safe_open(tmp_path / "t" / file, "pt") as opened:
            read |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert read.keys() == names.keys()
    bits = open_group(str(store)).attrs["dtype"] == "bfloat16"
    for site in SITES:
        values = read[f"{site}/tokens"]
        assert values.dtype == (torch.bfloat16 if bits else torch.float32)
        np.testing.assert_array_equal(values.float(), tree["activations"][site]["tokens"])
        np.testing.assert_array_equal(read[f"{site}/mean"], tree["activations"][site]["mean"])
    for name in ("input_ids", "sample", "position", "counted"):
        np.testing.assert_array_equal(read[f"tokens/{name}"], tree["tokens"][name])
    np.testing.assert_array_equal(read["samples/offset"], tree["samples"]["offset"])


def test_a_store_is_copied_with_its_tokens(store, tree, tmp_path):
    assert main(["score", "--store", str(store), "--pooling", "max", "--statistics", "auroc"]) == 0
    assert convert(store, "store", tmp_path / "s.zarr") == 0
    copy = aura_dist.open_store(tmp_path / "s.zarr")
    for part in ("activations", "tokens", "samples"):
        for node in copy[part].subtree:
            assert node.to_dataset(inherit=False).equals(
                aura_dist.open_store(store)[node.path].to_dataset(inherit=False)
            )
    groups = [open_group(str(s)) for s in (store, tmp_path / "s.zarr")]
    assert response_names(groups[0]) == response_names(groups[1])
    assert read_array(groups[1], "progress/done").all()
    assert StoredTokens.of(groups[1]).num_tokens == tree["tokens"].sizes["token"]
    assert main(["score", "--store", str(tmp_path / "s.zarr"), "--statistics", "auroc"]) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--to saelens --out {out} --pooling mean", "--pooling: expected tokens alone with --to saelens, got 'mean'"),
        ("--to saelens --out {out} --context 100000", "--context: expected at most the"),
        ("--to datasets --out {out} --context 10", "--context: expected with --to saelens, got --to datasets"),
        ("--to safetensors --out {out} --pooling max", "expected some of the store's mean, tokens, got 'max'"),
    ],
)  # fmt: skip
def test_refused(words, expected, tiny_dir, sentences_csv, tmp_path, capsys):
    store = tmp_path / "s.zarr"
    given = ["--model", str(tiny_dir("llama")), "--data", sentences_csv, "--store", str(store)]
    assert main(["collect", *given, *SETTINGS, "--pooling", "mean", "--keep-tokens", "*.layers.1"]) == 0
    assert main(["convert", "--store", str(store), *words.format(out=tmp_path / "no").split()]) == 2
    assert expected in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


def test_a_store_without_tokens_is_no_cache(tiny_dir, sentences_csv, tmp_path, capsys):
    store = tmp_path / "s.zarr"
    given = ["--model", str(tiny_dir("llama")), "--data", sentences_csv, "--store", str(store)]
    assert main(["collect", *given, *SETTINGS]) == 0
    assert convert(store, "saelens", tmp_path / "no") == 2
    assert "collect with --pooling tokens, or with --keep-tokens" in capsys.readouterr().err
