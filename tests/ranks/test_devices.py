"""What runs on GPUs alone, as far as a CPU can show it: stand-ins for devices, and torch's meta device for one."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from aura_dist.cli import main
from aura_dist.collecting.capture import Capture
from aura_dist.errors import BudgetError, ConfigError
from aura_dist.evaluation.decoding import Decoder
from aura_dist.models.layer_reader import LayerReader
from aura_dist.models.strategies import dispatch, split
from aura_dist.models.strategies.table import STRATEGIES, parse_sharding
from aura_dist.planning.shortage import explained, smaller
from aura_dist.ranks import launch
from aura_dist.ranks.layout import Layout
from aura_dist.ranks.world import Place, World

NO_ROOM = "CUDA out of memory. Tried to allocate 20.00 GiB"


@pytest.mark.parametrize(
    ("devices", "backends"),
    [
        (["a 1", "a 2"], "cpu:gloo,cuda:nccl"),
        (["a 1", "b 1"], "cpu:gloo,cuda:nccl"),
        (["a 1", "a 1"], "cpu:gloo,cuda:gloo"),
        (["", ""], "cpu:gloo,cuda:nccl"),  # the driver does not say
    ],
)
def test_ranks_that_share_a_gpu_use_gloo(devices, backends, monkeypatch):
    store = HashStore()
    world = World(Layout("fsdp", 4, fsdp=2), global_rank=2, device="cuda:0")
    store.set("device/3", devices[1])
    monkeypatch.setattr(launch, "identity", lambda device: devices[0])
    assert launch._backends(world, store) == backends
    assert launch._backends(replace(world, device="cpu"), store) == "gloo"


def test_libraries_find_the_number_of_the_gpu_in_local_rank(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert launch._device_of(Place(3, 8, 3), "cuda") == "cuda:0"
    assert (os.environ["LOCAL_RANK"], chosen) == ("0", [0])


def test_a_process_that_is_alone_has_a_local_rank_where_forwards_are_collective(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "")  # so that it is taken away at the end
    del os.environ["LOCAL_RANK"]
    with launch.start_team(parse_sharding("zero3"), "cpu"):
        assert os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize("name", ["zero3", "fsdp", "tensor"])
def test_cpu_beside_a_gpu_is_refused_where_a_library_would_take_the_gpu(name, monkeypatch):
    monkeypatch.setattr(split, "accelerator", lambda: "xpu")
    with pytest.raises(ConfigError, match=r"--device cpu: expected cuda or auto, .* ONEAPI_DEVICE_SELECTOR=opencl:cpu"):
        STRATEGIES[name].load(None, World(parse_sharding(name).layout(2)), {})


def test_dispatch_leaves_gpus_alone_with_device_cpu(monkeypatch):
    placements = []
    checkpoint = SimpleNamespace(read=lambda **placement: placements.append(placement))
    monkeypatch.setattr(dispatch, "accelerator", lambda: "cuda")
    load = STRATEGIES["dispatch"].load
    load(checkpoint, World(), {})
    load(checkpoint, World(), {"max_memory": {"cpu": 5}})
    load(checkpoint, World(device="cuda"), {})
    limits = [placement["max_memory"] for placement in placements]
    assert [None if limit is None else set(limit) for limit in limits] == [{"cpu"}, {"cpu"}, None]
    with pytest.raises(ConfigError, match="--max-memory 1: expected cpu or disk with --device cpu"):
        load(checkpoint, World(), {"max_memory": {1: 5, "cpu": 5}})


def test_a_layer_that_is_read_again_keeps_its_buffers_on_the_device(monkeypatch):
    """The meta device stands for a GPU: its tensors have no index, and cannot be put into page-locked memory either."""

    class Beside:
        def __init__(self, device):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def record_event(self):
            return "copied"

    monkeypatch.setattr(torch, "get_device_module", lambda d: SimpleNamespace(Stream=Beside, stream=lambda s: s))
    reader = object.__new__(LayerReader)
    reader._device, reader._stream = torch.device("meta", 0), None
    layer = nn.Module()
    layer.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    assert layer.table.device != reader._device
    assert reader._to_device(layer) == "copied"


def flags(tiny_dir, sentences_csv, tmp_path):
    on = ["--model", tiny_dir("llama"), "--device", "cpu"]
    data = ["--data", sentences_csv, "--concepts", "toxic", "--num-positive", 32, "--num-negative", 32]
    return on, ["collect", *on, *data, "--store", tmp_path / "s.zarr", "--tokens-per-batch", 512]


def test_too_little_memory_is_one_line_that_names_what_fits(tiny_dir, sentences_csv, tmp_path, monkeypatch, refused):
    forward = Capture._forward

    def limited(self, batch):
        if batch.input_ids.size > 256:
            raise torch.OutOfMemoryError(NO_ROOM)
        forward(self, batch)

    monkeypatch.setattr(Capture, "_forward", limited)
    _, words = flags(tiny_dir, sentences_csv, tmp_path)
    refused(words, r"out of memory on cpu while texts run \(CUDA .*\): expected room .* try --tokens-per-batch 256, ")
    assert main([str(word) for word in [*words[:-1], 256, "--overwrite"]]) == 0
    monkeypatch.setattr("aura_dist.stages.collect.free_memory", lambda: 10**6)
    refused([*words, "--overwrite"], r"expected room for --tokens-per-batch 512; no number of ranks fits")


def test_too_little_memory_in_continuations_and_in_texts(tiny_dir, sentences_csv, tmp_path, monkeypatch, refused):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError(NO_ROOM)

    monkeypatch.setattr(Decoder, "_prefill", full)
    monkeypatch.setattr("aura_dist.evaluation.perplexity._nll", full)
    on, _ = flags(tiny_dir, sentences_csv, tmp_path)
    refused(["generate", *on, "--prompt", "You", "--num-samples", 4], "while continuing .* try --num-samples 2$")
    out = ["--out", tmp_path / "r.json"]
    refused(["evaluate", *on, "--perplexity-texts", sentences_csv, *out], "perplexity .* try --tokens-per-batch 1024$")


def test_what_is_no_lack_of_memory_stays_as_it_is():
    with pytest.raises(RuntimeError, match=r"^shapes$"), explained("x", "cpu", lambda: ""):
        raise RuntimeError("shapes")
    told = pytest.raises(BudgetError, match=r"out of memory on cuda while x .*: use less")
    with told, explained("x", "cuda", lambda: "use less"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert smaller("--num-samples", 1).startswith("expected room for --num-samples 1; use another --sharding, or")


def test_embeddings_that_are_away_do_not_say_where_the_input_goes(tiny_dir, tmp_path, sentences_csv):
    on, _ = flags(tiny_dir, sentences_csv, tmp_path)
    away = ["--sharding", "dispatch", "--max-memory", "cpu=1KB", "--offload-folder", tmp_path / "away"]
    words = ["generate", *on, *away, "--prompt", "You are", "--max-new-tokens", 2]
    assert main([str(word) for word in words]) == 0
