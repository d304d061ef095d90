"""The contract of `plan`: the peak that `collect` reaches stays at or below what was predicted, and not far below."""

import csv
import json
import shutil

import pytest
import torch
import transformers as hf

from aura_dist.cli import main
from tests.memory import peak_of
from tests.models import tiny_tokenizer

MOST_ABOVE = 2.0
# a disk so slow that values of tokens wait to be written, as many as may
SLOW_DISK = """
import time
from aura_dist.store.writer import ChunkWriter
write = ChunkWriter._write_tokens
def slow(*given):
    time.sleep(0.4)
    write(*given)
ChunkWriter._write_tokens = slow
"""
LLAMA = {"num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 1024}
# name → a configuration; weights of 50 to 500 MB
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(
        vocab_size=4000, hidden_size=768, intermediate_size=3072, num_hidden_layers=6, **LLAMA
    ),
    "llama-wide": lambda: hf.LlamaConfig(
        vocab_size=32000, hidden_size=1536, intermediate_size=8192, num_hidden_layers=2, **LLAMA
    ),
    "falcon-40b-style": lambda: hf.FalconConfig(
        vocab_size=65024, hidden_size=512, num_hidden_layers=4, num_attention_heads=16, num_kv_heads=4,
        new_decoder_architecture=True, alibi=False, bias=False,
    ),
    "falcon-alibi": lambda: hf.FalconConfig(
        vocab_size=1000, hidden_size=768, num_hidden_layers=3, num_attention_heads=12, multi_query=True,
        parallel_attn=False, alibi=True, bias=True,
    ),
    "mpt": lambda: hf.MptConfig(vocab_size=1000, d_model=768, n_layers=3, n_heads=12, max_seq_len=1024),
    "bloom": lambda: hf.BloomConfig(vocab_size=1000, hidden_size=768, n_layer=3, n_head=12),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(
        vocab_size=1000, hidden_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=1024, decoder_sparse_step=2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def texts_csv(tmp_path_factory):
    """Texts of 10 to some 600 tokens."""
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "toxic"])
        writer.writerows([" ".join(["you are such a person"] * (2 + i)), i % 2] for i in range(64))
    return path


def compare(model, data, scratch, capsys, *settings, before=""):
    """(predicted, measured) peak of anonymous memory; `before` are lines of Python that run first."""
    flags = ["--model", str(model), "--data", str(data), "--concepts", "toxic", "--device", "cpu", *settings]
    capsys.readouterr()  # a tokenizer's training talks
    assert main(["plan", *flags, "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)["anonymous_bytes"]
    measured = peak_of(["collect", *flags, "--store", str(scratch / "store.zarr")], 900, before)
    with capsys.disabled():
        print(f"\npredicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB: {predicted / measured:.2f}")
    return predicted, measured


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "saved", "dtype", "tokens"),
    [
        ("llama", "float32", "float32", 128),
        ("llama", "float32", "bfloat16", 128),
        ("llama", "bfloat16", "bfloat16", 512),
        ("llama-wide", "bfloat16", "float32", 128),
        ("falcon-40b-style", "float32", "float32", 128),
        ("falcon-40b-style", "bfloat16", "float32", 512),
        ("falcon-alibi", "float32", "float32", 512),
        ("mpt", "float32", "float32", 512),
        ("bloom", "float32", "float32", 512),
        ("qwen3-moe", "float32", "float32", 128),
    ],
)
def test_measured_peak_is_within_the_plan(name, saved, dtype, tokens, texts_csv, tmp_path, capsys):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=getattr(torch, saved))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    del model
    settings = ["--dtype", dtype, "--max-tokens", str(tokens)]
    predicted, measured = compare(tmp_path / "model", texts_csv, tmp_path, capsys, *settings)
    assert measured <= predicted <= MOST_ABOVE * measured


def save_wide(place, dtype):
    """A model of two layers whose MLPs have 8,192 neurons, and 200 texts that are all cut at one length."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=4000, hidden_size=768, intermediate_size=8192, num_hidden_layers=2, **LLAMA
    )  # fmt: skip
    hf.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    text = " ".join(["you are such a person"] * 60)
    (place / "texts.csv").write_text("text,toxic\n" + "".join(f"{text},{i % 2}\n" for i in range(200)))
    return place / "model", place / "texts.csv"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_means_in_16_bits_stay_within_the_plan(tmp_path, capsys):
    """Of texts that are all cut at one length: the CPU sums a copy of the whole batch in float32."""
    model, texts = save_wide(tmp_path, "bfloat16")
    settings = ["--dtype", "bfloat16", "--pooling", "mean", "--tokens-per-batch", "16384"]
    predicted, measured = compare(model, texts, tmp_path, capsys, *settings)
    assert measured <= predicted <= MOST_ABOVE * measured


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("dtype", "batch", "kept"),
    [
        ("float32", "2048", ["--pooling", "tokens"]),
        ("float32", "16384", ["--pooling", "tokens"]),
        ("bfloat16", "16384", ["--pooling", "tokens"]),
        ("float32", "16384", ["--pooling", "max", "--keep-tokens", "neurons"]),
        ("bfloat16", "2048", ["--pooling", "mean", "--keep-tokens", "residual"]),
    ],
)
def test_tokens_stay_within_the_plan(dtype, batch, kept, tmp_path, capsys):
    """Batches of 2,048 tokens wait within the bound of 256 MB; one of 12,800 tokens of float32 neurons is above it."""
    model, texts = save_wide(tmp_path, dtype)
    settings = ["--dtype", dtype, "--modules", "residual", "neurons", "--tokens-per-batch", batch, *kept]
    predicted, measured = compare(model, texts, tmp_path, capsys, *settings, before=SLOW_DISK)
    shutil.rmtree(tmp_path / "store.zarr")  # up to 2 GB
    assert measured <= predicted <= MOST_ABOVE * measured


@pytest.mark.slow
@pytest.mark.realmodel
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", [[], ["--modules", "residual", "neurons", "--pooling", "tokens"]], ids=["", "tokens"])
def test_gemma_stays_within_the_plan(kept, dtype, gemma_dir, jigsaw_csv, tmp_path, capsys):
    sampling = ["--num-positive", "40", "--num-negative", "40", "--dtype", dtype, *kept]
    predicted, measured = compare(gemma_dir, jigsaw_csv, tmp_path, capsys, *sampling)
    assert measured <= predicted <= MOST_ABOVE * measured
