"""What runs on GPUs alone, as far as a CPU can show it: stand-ins for devices, and torch's meta device for one."""

import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed import HashStore
from transformers import PreTrainedModel

from aura_dist.cli import main
from aura_dist.collecting.capture import Capture
from aura_dist.errors import BudgetError, ConfigError
from aura_dist.evaluation.decoding import Decoder
from aura_dist.models.in_memory import InMemory
from aura_dist.models.layer_reader import LayerReader
from aura_dist.models.layerwise import closing, executor_of
from aura_dist.models.load import ModelSource, load_causal
from aura_dist.models.strategies import dispatch, split
from aura_dist.models.strategies.table import STRATEGIES, parse_sharding
from aura_dist.models.waiting import Waiting
from aura_dist.planning.shortage import explained, smaller
from aura_dist.ranks import launch
from aura_dist.ranks.device import use_exact_float32
from aura_dist.ranks.layout import Layout
from aura_dist.ranks.world import Place, World
from tests.models import tiny_causal

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
    assert launch._backends(world, store, range(2, 4)) == backends
    assert launch._backends(replace(world, device="cpu"), store, range(2, 4)) == "gloo"


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


def precisions():
    cudnn = torch.backends.cudnn
    return [part.fp32_precision for part in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)]


@pytest.fixture
def precisions_as_before():
    cudnn = torch.backends.cudnn
    parts = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, cudnn.conv, cudnn.rnn
    before = [part.fp32_precision for part in parts]

    def set_back(precisions):
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = True
        torch.backends.fp32_precision = "none"
        for part, precision in zip(parts, precisions, strict=True):
            part.fp32_precision = precision

    set_back(["none"] * len(parts))  # as in a new process, whatever other tests have set
    yield
    set_back(before)


def older_way():
    torch.set_float32_matmul_precision("high")


def newer_way():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def for_all():
    torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize("turn_on", [older_way, newer_way, for_all])
def test_tf32_is_off_while_a_model_in_memory_runs_however_it_was_turned_on(turn_on, precisions_as_before):
    turn_on()
    before = precisions()
    assert "tf32" in before
    with InMemory(tiny_causal("gpt2"), None).base(World(), 1):
        assert precisions() == ["ieee"] * 3
    assert precisions() == before
    use_exact_float32()
    assert precisions() == ["ieee"] * 3


def test_hidden_states_of_a_gpu_take_whole_page_locked_blocks(monkeypatch):
    hidden = torch.zeros(65, device="meta")  # 260 bytes, of which torch makes 512
    locked = SimpleNamespace(copy_=lambda tensor, non_blocking: tensor)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: locked)
    monkeypatch.setattr(Waiting, "_write", lambda self, tensor: 0)
    waiting = Waiting("meta", device_bytes=0, host_bytes=600)
    for batch in range(2):
        waiting.put(batch, "hidden", hidden)
    assert [kept["hidden"].where for kept in waiting._kept.values()] == ["host", "file"]


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


def test_too_little_memory_for_the_weights(tiny_dir, sentences_csv, tmp_path, monkeypatch, refused):
    """Not every allocator raises `OutOfMemoryError`."""

    def full(*args, **kwargs):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", full)
    on, words = flags(tiny_dir, sentences_csv, tmp_path)
    refused(words, r"out of memory on cpu while texts run \(CUDA error.*expected room for --tokens-per-batch 512")
    refused(
        ["generate", *on, "--prompt", "You"], "while loading .*expected room for the weights; use another --sharding"
    )
    fit = ["fit", "--sequential", *on, "--data", sentences_csv, "--concept", "toxic", "--method", "linear-act"]
    refused([*fit, "--out", tmp_path / "map"], "while loading .*expected room for the weights")


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
    for text in ("DefaultCPUAllocator: can't allocate memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"):
        told = pytest.raises(BudgetError, match=r"out of memory on cuda while x .*: use less")
        with told, explained("x", "cuda", lambda: "use less"):
            raise RuntimeError(text)
    assert smaller("--num-samples", 1).startswith("expected room for --num-samples 1; use another --sharding, or")


def test_the_first_forward_says_nothing_of_the_speed_of_layers(tiny_dir):
    """On a GPU it loads libraries, for a second or so, and waves would be small for it."""
    sharding = parse_sharding("layers")
    model = load_causal(ModelSource(str(tiny_dir("llama")), None, "float32"), World(sharding.layout(1)))
    with closing(model):
        executor = executor_of(model)
        pauses = [0.5]
        model.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(pauses.pop() if pauses else 0))
        ids = torch.arange(5, 29).view(2, 12)
        executor.prepare({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert not pauses
        assert executor._tokens_per_second > 2 * ids.numel() / 0.25


def test_embeddings_that_are_away_do_not_say_where_the_input_goes(tiny_dir, tmp_path, sentences_csv):
    on, _ = flags(tiny_dir, sentences_csv, tmp_path)
    away = ["--sharding", "dispatch", "--max-memory", "cpu=1KB", "--offload-folder", tmp_path / "away"]
    words = ["generate", *on, *away, "--prompt", "You are", "--max-new-tokens", 2]
    assert main([str(word) for word in words]) == 0
