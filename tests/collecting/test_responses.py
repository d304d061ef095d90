"""What is stored equals the plain transformers model run one sentence at a time, for real model classes."""

import csv

import numpy as np
import pytest
import torch
import transformers as hf

import aura_dist
from aura_dist.cli import main
from aura_dist.sites.pooling import POOLINGS
from tests.models import DEMO_SENTENCES, ODD_CONFIGS
from tests.poolings import pool_plainly

TOLERANCE = 1e-4
DENSE = [
    "gpt2", "falcon-rotary", "falcon-alibi", "falcon-40b-style", "mpt", "llama", "mistral", "gemma3", "opt", "bloom",
    "qwen3", "phi3",
]  # fmt: skip


@torch.no_grad()
def plain_responses(directory, texts, sites, poolings, dtype=torch.float32, max_tokens=128, skip_bos=False, **forward):
    """(site, pooling) → [N, D] by a forward hook on the causal language model, no batch, no padding."""
    model = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(directory)
    seen: dict[str, torch.Tensor] = {}
    for site in sites:
        # a copy: Falcon's parallel attention adds to the output of its MLP in place
        hook = lambda _module, _args, output, site=site: seen.__setitem__(site, output.clone())  # noqa: E731
        model.get_submodule(site).register_forward_hook(hook)
    rows: dict[tuple[str, str], list[np.ndarray]] = {(s, p): [] for s in sites for p in poolings}
    for text in texts:
        encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_tokens)
        model.base_model(**encoded, **forward)
        for site, acts in seen.items():
            acts_TD = acts.reshape(-1, acts.shape[-1])
            for pooling in poolings:
                first = 1 if skip_bos else 0
                counted_TD, ids_T = acts_TD[first:].float(), encoded["input_ids"][0, first:]
                rows[site, pooling].append(pool_plainly(counted_TD, pooling, ids_T).numpy())
    return {key: np.stack(values) for key, values in rows.items()}


def largest_difference(store, texts, expected) -> float:
    """Largest |ours − plain| over the plain value's size, or the site's mean size where the value is smaller."""
    worst = 0.0
    for (site, pooling), plain in expected.items():
        ours = store["activations"][site][pooling].values
        scale = np.maximum(np.abs(plain), np.abs(plain).mean())
        worst = max(worst, float((np.abs(ours - plain) / scale).max()))
    return worst


@pytest.fixture(scope="module")
def texts_csv(tmp_path_factory):
    """48 sentences of all lengths and four long texts, beyond the sliding windows."""
    with DEMO_SENTENCES.open() as file:
        rows = [(r["text"], r["toxic"]) for r in csv.DictReader(file)]
    long = [
        (" ".join(text for text, _ in rows[i : i + n]), str(n % 2)) for i, n in ((60, 4), (70, 5), (80, 6), (90, 9))
    ]
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "toxic"])
        table.writerows(rows[:48] + long)
    return path


def collected(directory, data, store, *more):
    command = ["--data", str(data), "--concepts", "toxic", "--store", str(store), "--tokens-per-batch", "300"]
    assert main(["collect", "--model", str(directory), *command, *more]) == 0
    view = aura_dist.open_store(store)
    with open(data) as file:
        table = list(csv.DictReader(file))
    rows = view["samples"]["row"].values
    assert sorted(rows) == list(range(len(table)))
    assert view["samples"]["label"].values[:, 0].tolist() == [int(table[r]["toxic"]) for r in rows]
    return view, [table[r]["text"] for r in rows]


@pytest.mark.parametrize("name", DENSE)
def test_every_pooling_of_every_module_equals_one_by_one(name, tiny_dir, texts_csv, tmp_path):
    view, texts = collected(
        tiny_dir(name), texts_csv, tmp_path / "s.zarr", "--modules", "all", "norm", "--pooling", *POOLINGS
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_dir(name))
    lengths = [len(i) for i in tokenizer(texts, truncation=True, max_length=128).input_ids]
    assert view["samples"]["num_tokens"].values.tolist() == lengths
    expected = plain_responses(tiny_dir(name), texts, list(view["activations"]), POOLINGS)
    assert largest_difference(view, texts, expected) < TOLERANCE


def test_attention_of_a_mixture_of_experts(tiny_dir, texts_csv, tmp_path):
    view, texts = collected(tiny_dir("qwen3-moe"), texts_csv, tmp_path / "s.zarr", "--modules", "all", "norm")
    assert not view.attrs["uncaptured"]
    expected = plain_responses(tiny_dir("qwen3-moe"), texts, list(view["activations"]), ["max"])
    assert largest_difference(view, texts, expected) < TOLERANCE


def test_special_tokens_left_out(tiny_dir, texts_csv, tmp_path):
    poolings = ["--pooling", "max", "mean", "--skip-special-tokens"]
    view, texts = collected(tiny_dir("llama"), texts_csv, tmp_path / "s.zarr", *poolings)
    expected = plain_responses(tiny_dir("llama"), texts, list(view["activations"]), ["max", "mean"], skip_bos=True)
    assert largest_difference(view, texts, expected) < TOLERANCE


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_odd_architectures(name, tiny_dir, texts_csv, tmp_path):
    view, texts = collected(tiny_dir(name), texts_csv, tmp_path / "s.zarr", "--modules", "all", "norm")
    expected = plain_responses(tiny_dir(name), texts, list(view["activations"]), ["max"])
    assert largest_difference(view, texts, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "falcon-rotary", "gemma3", "minicpm3", "recurrent-gemma"])
def test_layers_after_the_last_captured_one_are_not_loaded(name, tiny_dir, texts_csv, tmp_path, monkeypatch):
    from aura_dist.models import on_disk
    from aura_dist.models.load import load_base

    loaded = []

    def load(*args, **kwargs):
        loaded.append(load_base(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(on_disk, "load_base", load)
    view, texts = collected(tiny_dir(name), texts_csv, tmp_path / "s.zarr", "--modules", "*.0.*")
    assert not any(".1." in parameter for parameter, _ in loaded[0].named_parameters())
    expected = plain_responses(tiny_dir(name), texts, list(view["activations"]), ["max"])
    assert largest_difference(view, texts, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "stored", "rounding"), [("bfloat16", "float32", 2**-8), ("float16", "float16", 2**-11)]
)
def test_half_precision_models(dtype, stored, rounding, tiny_dir, texts_csv, tmp_path):
    options = ["--dtype", dtype, "--pooling", "max", "mean"]
    view, texts = collected(tiny_dir("llama"), texts_csv, tmp_path / "s.zarr", *options)
    site = view["activations"]["model.layers.0.mlp.gate_proj"]
    assert site["max"].dtype == stored
    assert site["mean"].dtype == "float32"
    torch_dtype = getattr(torch, dtype)
    expected = plain_responses(tiny_dir("llama"), texts, list(view["activations"]), ["max", "mean"], torch_dtype)
    # a batch's products round in another order, and three layers carry that on: some units of the last place
    assert largest_difference(view, texts, expected) < 24 * rounding


@pytest.mark.realmodel
def test_gemma_on_real_comments(gemma_dir, jigsaw_csv, tmp_path):
    with open(jigsaw_csv) as file:
        rows = list(csv.reader(file))
    data = tmp_path / "comments.csv"
    with data.open("w", newline="") as file:
        csv.writer(file).writerows(rows[:65])
    view, texts = collected(gemma_dir, data, tmp_path / "s.zarr")
    expected = plain_responses(gemma_dir, texts, list(view["activations"]), ["max"], logits_to_keep=1)
    difference = largest_difference(view, texts, expected)
    print(f"largest relative difference {difference:.2e}")
    assert difference < TOLERANCE
