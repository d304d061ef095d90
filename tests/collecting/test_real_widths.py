"""Two decoder layers of Falcon-40B's true shape under every strategy that shares out the weights: within the plan."""

import json
import time

import pytest
import torch
import transformers as hf

from aura_dist.cli import main
from tests.distributed.launch import Launch, launched
from tests.memory import SAMPLE_SECONDS, anonymous_bytes
from tests.models import tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# one sharding a line: ranks, flags; the host tier holds the embedding and one of the layers
SHARDINGS = {
    "dispatch": (1, ["--max-memory", "cpu=3GiB"]),
    "zero3": (2, ["--offload", "cpu"]),
    "fsdp": (2, []),
    "tensor=2": (2, []),
}


@pytest.fixture(scope="module")
def falcon_40b_layers(tmp_path_factory):
    """3.8 GB of random bfloat16 weights, in shards of 1 GB."""
    directory = tmp_path_factory.mktemp("falcon-40b")
    config = hf.FalconConfig(
        vocab_size=65024, hidden_size=8192, num_hidden_layers=2, num_attention_heads=128, num_kv_heads=8,
        new_decoder_architecture=True, parallel_attn=True, alibi=False, bias=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert model.transformer.h[0].mlp.dense_h_to_4h.weight.shape == (32768, 8192)
    model.save_pretrained(directory, max_shard_size="1GB")
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_peak_of_every_rank_is_within_the_plan(sharding, falcon_40b_layers, sentences_csv, tmp_path, capsys):
    num_ranks, more = SHARDINGS[sharding]
    flags = ["--model", str(falcon_40b_layers), "--data", str(sentences_csv), "--concepts", "toxic"]
    flags += ["--num-positive", "16", "--num-negative", "16", "--dtype", "bfloat16", "--device", "cpu"]
    flags += ["--sharding", sharding, *more]
    capsys.readouterr()  # a tokenizer's training talks
    assert main(["plan", *flags, "--world-size", str(num_ranks), "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)["anonymous_bytes"]
    folder = ["--offload-folder", str(tmp_path / "offload")] if sharding == "dispatch" else []
    peaks, seconds = peaks_of(num_ranks, ["collect", *flags, *folder, "--store", str(tmp_path / "store.zarr")])
    with capsys.disabled():
        measured = ", ".join(f"{p / 1e9:.2f}" for p in peaks)
        print(f"\n{sharding}: predicted {predicted / 1e9:.2f} GB a rank, measured {measured} GB, {seconds:.0f} s")
    assert max(peaks) <= predicted


def peaks_of(num_ranks, arguments):
    """Peak anonymous memory of every rank in bytes, and the seconds that the launch took."""
    peaks, start = [0] * num_ranks, time.monotonic()
    with launched(Launch(num_ranks, arguments)) as launch:
        pids = [rank.pid for rank in launch.ranks()]
        while any(process.is_alive() for process in launch._processes):
            peaks = [max(peak, anonymous_bytes(pid)) for peak, pid in zip(peaks, pids, strict=True)]
            time.sleep(SAMPLE_SECONDS)
        assert launch.wait(1) == [0] * num_ranks, launch.text()
    return peaks, time.monotonic() - start
