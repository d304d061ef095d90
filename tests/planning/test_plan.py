"""plan: what it says against what collect makes; what fits; refusals in one line."""

import json

import numpy as np
import pytest
import transformers as hf
import zarr

from aura_dist.cli import main
from aura_dist.collecting.description import load_samples
from aura_dist.config.settings import resolve
from aura_dist.config.verbs import CollectConfig, PlanConfig
from aura_dist.models.load import ModelSource
from aura_dist.models.on_disk import OnDisk
from aura_dist.models.strategies.table import STRATEGIES
from aura_dist.stages import plan
from tests.models import save_tiny

ROWS = ["--num-positive", "500", "--num-negative", "2000"]


@pytest.fixture(scope="module")
def falcon_40b(tmp_path_factory):
    """A config.json of Falcon-40B's shape: no weights, no tokenizer."""
    directory = tmp_path_factory.mktemp("falcon-40b")
    hf.FalconConfig(
        hidden_size=8192, num_hidden_layers=60, num_attention_heads=128, num_kv_heads=8, vocab_size=65024,
        new_decoder_architecture=True, alibi=False, bias=False,
    ).save_pretrained(directory)  # fmt: skip
    return ["--model", str(directory), "--dtype", "bfloat16", *ROWS]


@pytest.fixture(scope="module")
def falcon_shallow(tmp_path_factory):
    """The same with two layers."""
    directory = tmp_path_factory.mktemp("falcon-shallow")
    hf.FalconConfig(
        hidden_size=8192, num_hidden_layers=2, num_attention_heads=128, num_kv_heads=8, vocab_size=65024,
        new_decoder_architecture=True, alibi=False, bias=False,
    ).save_pretrained(directory)  # fmt: skip
    return ["--model", str(directory), "--dtype", "bfloat16", *ROWS]


def planned(capsys, *arguments, code=0):
    """(report, error) of `plan --json`."""
    capsys.readouterr()
    assert main(["plan", *arguments, "--json"]) == code
    out, err = capsys.readouterr()
    return (json.loads(out) if out else None), err


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def count_files(store):
    return sum(f.is_file() for f in store.rglob("*"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_plan_says_what_collect_makes(dtype, tmp_path, sentences_csv, capsys):
    model = save_tiny("llama", tmp_path / "model")
    flags = ["--model", str(model), "--data", sentences_csv, "--concepts", "toxic", "--num-positive", "40"]
    flags += ["--num-negative", "30", "--pooling", "max", "mean", "--tokens-per-batch", "256"]
    flags += ["--device", "cpu", "--dtype", dtype]
    report, _ = planned(capsys, *flags)
    assert main(["collect", *flags, "--store", str(tmp_path / "s.zarr")]) == 0
    store = report["store"]
    assert store["num_files"] == count_files(tmp_path / "s.zarr")
    assert main(["score", "--store", str(tmp_path / "s.zarr")]) == 0
    assert store["num_files"] + store["score_files"] == count_files(tmp_path / "s.zarr")
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    arrays = [a for _, a in group["activations"].members(max_depth=None) if isinstance(a, zarr.Array)]
    batches = report["batches"]
    assert store["num_rows"] == 70
    assert store["num_arrays"] == len(arrays)
    assert store["num_neurons"] * 2 == sum(a.shape[1] for a in arrays)
    assert store["raw_bytes"] == sum(a.nbytes for a in arrays)
    assert store["num_chunks"] == sum(a.nchunks for a in arrays)
    assert report["num_tasks"] == group["progress/done"].shape[0]
    assert batches["num_tokens"] == int(np.sum(group["samples/num_tokens"][:]))
    assert report["gate_bytes"].keys() == {"tokens"}  # gates of units need a further pooling


@pytest.mark.parametrize("extra", [{}, {"match_length": True, "num_negative": 20}, {"clean_negatives": ["toxic"]}])
def test_rows_are_those_of_collect(extra, tiny_dir, sentences_csv):
    settings = {"model": str(tiny_dir("llama")), "data": sentences_csv, "concepts": ["toxic"], "store": "s"}
    settings |= {"num_positive": 20, "max_tokens": 12} | extra
    config = resolve(CollectConfig, settings)
    samples, _, _ = load_samples(config, OnDisk(ModelSource(config.model, None, config.dtype)))
    num_tokens, shortest, _ = plan.find_rows(
        resolve(PlanConfig, settings), hf.AutoConfig.from_pretrained(tiny_dir("llama"))
    )
    assert num_tokens.tolist() == samples.num_tokens.tolist()
    assert shortest == samples.num_tokens[0]


def test_without_data_rows_are_an_upper_bound(falcon_shallow, capsys):
    report, _ = planned(capsys, *falcon_shallow)
    assert report["rows"].startswith("upper bound: every row with 128 tokens (no --data)")
    assert report["batches"]["num_tokens"] == 2500 * 128
    report, _ = planned(capsys, *falcon_shallow, "--data", "nowhere.csv")
    assert "nowhere.csv" in report["rows"]
    assert "nowhere.csv" in refused(capsys, *falcon_shallow[:4], "--data", "nowhere.csv")
    assert "expected --data, or --num-positive and --num-negative" in refused(capsys, *falcon_shallow[:4])


def test_neurons_of_falcon_40b(falcon_40b, capsys):
    report, _ = planned(capsys, *falcon_40b)
    assert report["kinds"]["mlp"] == [120, 60 * (32768 + 8192)]
    assert report["store"]["num_files"] + report["store"]["score_files"] <= 6_000
    assert report["kinds"]["attention"] == [120, 60 * (8192 + 16 * 64 + 8192)]
    assert report["weights_bytes"] == pytest.approx(82.6e9, rel=0.01)  # 41.3 billion parameters without the head
    # 2 operations a weight of a linear layer and token
    linear = 60 * (8192 * (8192 + 1024) + 8192**2 + 2 * 8192 * 32768)
    assert report["batches"]["flops"] == pytest.approx(2 * linear * 320_000, rel=0.02)
    assert report["compute_seconds"] == pytest.approx(report["batches"]["flops"] / (report["tflops"] * 1e12))


def test_falcon_40b_on_eight_gpus_of_80_gb(falcon_40b, capsys):
    limits = ["--world-size", "8", "--device-memory", "80GB", "--host-memory", "1TB"]
    report, error = planned(capsys, *falcon_40b, *limits, code=2)
    fits = {name: largest for name, _, _, largest in report["fits"]}
    assert fits.pop("replicate") is None
    assert set(fits.values()) == {4096}
    assert "expected room for 8" in error
    assert "what fits is --sharding fsdp=2" in error
    report, _ = planned(capsys, *falcon_40b, *limits, "--sharding", "fsdp=2")
    assert report["device_bytes"] < 80e9


def test_falcon_40b_on_one_gpu_of_24_gb(falcon_40b, capsys):
    limits = ["--device-memory", "24GB", "--host-memory", "128GB"]
    report, error = planned(capsys, *falcon_40b, *limits, code=2)
    fits = {name: largest for name, _, _, largest in report["fits"]}
    assert fits == {"replicate": None, "zero3": None, "zero3 --offload cpu": 4096, "dispatch": 4096, "layers": 4096}
    assert "what fits is --sharding zero3 --offload cpu" in error
    report, _ = planned(capsys, *falcon_40b, *limits, "--sharding", "dispatch")
    assert report["device_bytes"] <= 24e9
    assert report["stream_seconds"] > 0
    report, _ = planned(
        capsys, *falcon_40b, "--device-memory", "24GB", "--host-memory", "32GB", "--sharding", "dispatch"
    )
    assert report["memory"]["disk"] > 30e9
    assert report["host_bytes"] <= 32e9


def test_falcon_40b_layer_by_layer_where_nothing_else_fits(falcon_40b, capsys):
    limits = ["--device-memory", "8GB", "--host-memory", "32GB", "--world-size", "2"]
    report, error = planned(capsys, *falcon_40b, *limits, code=2)
    assert [name for name, _, _, largest in report["fits"] if largest] == ["layers"]
    assert "what fits is --sharding layers" in error
    by_layer = [*falcon_40b, *limits, "--sharding", "layers"]
    report, _ = planned(capsys, *by_layer, "--wave-tokens", "50000", "--disk-rate", "10GB")
    assert report["reading"]["num_waves"] == 4
    assert report["reading"]["num_bytes"] == pytest.approx(4 * 81.5e9, rel=0.02)
    assert report["reading"]["seconds"] == pytest.approx(report["reading"]["num_bytes"] / 1e10)
    assert main(["plan", *by_layer, "--layer-cache", "copies"]) == 0
    out = capsys.readouterr().out
    assert "meanwhile each rank reads the layers once, 81.5 GB in 41 s" in out
    assert "--layer-cache takes 81.5 GB on the disk of each machine" in out


def test_smaller_batches_are_offered_first(falcon_shallow, capsys):
    limits = ["--device-memory", "5.5GB"]
    error = refused(capsys, *falcon_shallow, *limits)
    assert "the largest batch that fits is --tokens-per-batch " in error
    batch = error.split("--tokens-per-batch ")[1].split()[0]
    assert main(["plan", *falcon_shallow, *limits, "--tokens-per-batch", batch]) == 0
    assert main(["plan", *falcon_shallow, *limits, "--tokens-per-batch", str(int(batch) + 1)]) == 2


def test_text_has_a_line_for_every_strategy(falcon_shallow, capsys):
    assert main(["plan", *falcon_shallow, "--world-size", "4", "--device", "cuda"]) == 0
    out = capsys.readouterr().out
    for word in ("store", "memory", "FLOPs", "queue", *list(STRATEGIES)[:3]):
        assert word in out
    assert max(map(len, out.splitlines())) < 200


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--sharding", "fsdp=3", "--world-size", "4"], "expected fsdp 3 = 3 ranks a replica to divide the 4"),
        (["--sharding", "sideways"], "--sharding: expected one of replicate"),
        (["--device-memory", "plenty"], "--device-memory: expected a size such as 80GB"),
        (["--host-memory", "1XB"], "--host-memory: expected a size such as 80GB"),
        (["--device", "cpu", "--device-memory", "1GB"], "--device-memory: expected with a GPU"),
        (["--offload", "cpu"], "--offload: expected with --sharding zero3, got --sharding replicate"),
        (["--sharding", "zero3", "--offload", "tape"], "--offload: expected none, cpu or nvme:PATH, got 'tape'"),
        (["--sharding", "zero3", "--offload", "nvme"], "--offload: expected none, cpu or nvme:PATH, got 'nvme'"),
        (["--max-memory", "0=1GB"], "--max-memory: expected with --sharding dispatch"),
        (["--sharding", "dispatch", "--max-memory", "gpu=1GB"], "--max-memory: expected values such as"),
        (["--sharding", "dispatch", "--max-memory", "0=1GB", "0=2GB"], "each once, got '0=2GB'"),
        (["--ranks-per-host", "4", "--world-size", "2"], "--ranks-per-host: expected at most --world-size 2, got 4"),
        (["--max-tokens", "4096"], None),
        (["--modules", "*.nothing"], "matches nothing in FalconForCausalLM"),
        (["--host-memory", "1MB"], "--host-memory 1MB: expected room for"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, falcon_shallow, capsys):
    if message is None:
        assert main(["plan", *falcon_shallow, *settings]) == 0
        assert "every row with 2048 tokens" in capsys.readouterr().out
    else:
        assert message in refused(capsys, *falcon_shallow, *settings)


def test_tensor_parallelism_of_conv1d_is_refused_by_name(tiny_dir, capsys):
    flags = ["--model", str(tiny_dir("gpt2")), *ROWS, "--world-size", "2", "--sharding", "tensor"]
    assert "GPT2LMHeadModel: there is no plan for --sharding tensor: its Conv1D layers" in refused(capsys, *flags)


def test_users_plan_for_tensor_parallelism_counts(falcon_shallow, tmp_path, capsys):
    flags = [*falcon_shallow, "--world-size", "2", "--sharding", "tensor"]
    weights = planned(capsys, *flags, "--device", "cuda")[0]["memory"]["device"]["weights"]
    file = tmp_path / "plan.yaml"
    flags += ["--tensor-plan", str(file)]
    file.write_text("transformer.h.*.mlp.dense_h_to_4h: colwise\ntransformer.h.*.mlp.dense_4h_to_h: rowwise\n")
    mlp_alone = planned(capsys, *flags, "--device", "cuda")[0]["memory"]["device"]["weights"]
    split_less = 2 * 2 * 8192 * (8192 + 1024 + 8192) + 2 * 65024 * 8192  # bytes: attention of two layers, embeddings
    assert mlp_alone - weights == pytest.approx(split_less / 2, rel=0.01)
    file.write_text("transformer.h.*.mlp.nothing: colwise\n")
    assert "has no module 'transformer.h.*.mlp.nothing'" in refused(capsys, *flags)
    file.write_text("transformer.h.*.mlp.dense_h_to_4h: embedding_rowwise\n")
    assert "is split as 'embedding_rowwise', which is not by columns" in refused(capsys, *flags)


def test_section_of_collect_counts_for_plan(falcon_shallow, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("collect:\n  num_positive: 10\n  num_negative: 20\nplan:\n  num_negative: 5\n")
    report, _ = planned(capsys, "--config", str(file), *falcon_shallow[:4])
    assert report["store"]["num_rows"] == 15
