"""Whether a device computes what a CPU computes, and whether its copies, its collectives and its errors are right."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.gpu.place import (
    NOT_HERE,
    Place,
    Row,
    alone,
    command,
    data_file,
    difference,
    falcon,
    small_model,
    small_models,
    texts,
)

CLOSE = 1e-4
_KINDS = ["all", "norm", "heads", "residual"]
_FEW_KINDS = ["mlp", "residual"]  # where all is small: making arrays takes most of the time


def kinds_of(place: Place, model: str) -> list[str]:
    """The kinds of sites that a checkpoint has."""
    config = json.loads((Path(model) / "config.json").read_text())
    own = "experts" if "moe" in config["model_type"] else "neurons"
    return [own, "heads" if own == "neurons" else "norm"] if place.tiny else [*_KINDS, own]


def store(place: Place) -> Iterator[Row]:
    """`collect` on the device against `collect` on the CPU, float32, and the AUROC of both."""
    data = data_file(place, 40)
    for name, model in small_models(place).items():
        paths = {device: place.folder / f"{name}-{device}.zarr" for device in ("cpu", "device")}
        modules = ["mlp"] if name == "real model" else kinds_of(place, model)
        for device, path in paths.items():
            where = "cpu" if device == "cpu" else _flag(place)
            how = [
                "--pooling",
                "max",
                *([] if place.tiny else ["mean", "last"]),
                "--tokens-per-batch",
                512,
                "--device",
                where,
            ]
            command(
                "collect", "--model", model, "--data", data, "--concepts", "toxic", "--modules", *modules, *how,
                "--store", path,
            )  # fmt: skip
        yield place.same(f"collect, {name}: {', '.join(modules)}", difference(paths["device"], paths["cpu"]), CLOSE)
        outside = auroc_outside(paths["device"], paths["cpu"])
        yield place.same(f"AUROC beyond what these differences explain, {name}", outside, 0.0)
    yield float32_products(place)


def auroc_outside(path: Path, reference: Path) -> float:
    """How far AUROCs are outside of the range in which differences of the responses can put them, at most."""
    import aura_dist

    ours, theirs = (aura_dist.open_store(str(p)) for p in (path, reference))
    labels = np.asarray(theirs["samples"]["label"].to_numpy()).reshape(-1)
    outside = [0.0]
    for site in theirs["activations"].children:
        found, expected = (s["activations"][site]["max"].to_numpy().astype(np.float64) for s in (ours, theirs))
        move = 1.001 * np.abs(found - expected).max(axis=0) * np.where(labels == 1, 1, -1)[:, None]
        # rounding keeps the order; of float32 a compiled kernel computes AUROC, of float64 NumPy, far more slowly
        bounds = [(expected + sign * move).astype(np.float32) for sign in (-1, 1)]
        auroc, low, high = (
            np.asarray(aura_dist.auroc(values, labels)) for values in (found.astype(np.float32), *bounds)
        )
        outside.append(np.maximum(low - auroc, auroc - high).max())
    return float(np.max(outside))


def float32_products(place: Place) -> Row:
    """TF32 changes the fourth digit; the product's loading turns it off, also where an environment turned it on."""
    import torch

    from aura_dist.models.load import ModelSource, load_causal
    from aura_dist.ranks.world import World

    load_causal(ModelSource(small_model(place, "llama"), None, "float32"), World(device=place.device))
    a, b = (torch.randn(512, 512, device=place.device) for _ in range(2))
    exact = a.double() @ b.double()
    return place.same("float32 products", float(((a @ b) - exact).abs().max() / exact.abs().max()), 1e-5)


def use(place: Place) -> Iterator[Row]:
    """An intervention in hooks, `generate`, `evaluate` and `export` on the device against the CPU, float32."""
    data, folder = data_file(place, 40), place.folder
    model = small_model(place, "llama")
    _random_map(model).save(folder / "aura")
    command("export", "--model", model, "--intervention", folder / "aura", "--out", folder / "exported")
    plain, hooked, folded = (
        [_logits(directory, device, map_) for device in ("cpu", place.device)]
        for directory, map_ in ((model, None), (model, folder / "aura"), (folder / "exported", None))
    )
    yield place.same("logits", _error(plain[1], plain[0]), CLOSE)
    yield place.same("logits under the hooks", _error(hooked[1], hooked[0]), CLOSE)
    changed = _error(hooked[1], plain[1])
    yield place.holds("the hooks change the logits", f"{changed:.1e}", "> 0", changed > 0)
    error = _error(folded[1], hooked[1])
    yield place.holds("exported against hooks, on the device", f"{error:.1e}", f"≤ {CLOSE:.0e}", error <= CLOSE)
    yield _continued(place, model)
    measured = []
    for device in ("cpu", _flag(place)):
        out = folder / f"{device}.json"
        where = ["--model", model, "--device", device, "--intervention", folder / "aura"]
        command("evaluate", *where, "--perplexity-texts", data, "--out", out)
        measured.append(json.loads(out.read_text())["perplexity"]["token_weighted"])
    yield place.same("perplexity", abs(measured[1] / measured[0] - 1), CLOSE)


def _random_map(model: Any) -> Any:
    """Scales of the MLP linears of a model, or of a checkpoint."""
    import aura_dist
    from aura_dist.models.load import ModelSource, load_config, skeleton
    from aura_dist.sites.find import find_sites

    whole = skeleton(load_config(ModelSource(model, None, "float32"))) if isinstance(model, str) else model
    rng = np.random.default_rng(0)
    sites = [site for site in find_sites(whole).sites if site.kind == "mlp"]
    return aura_dist.Intervention({s.name: rng.uniform(0.0, 0.6, s.width).astype(np.float32) for s in sites})


def _continued(place: Place, model: str) -> Row:
    """Greedy and sampled continuations; a near tie may fall otherwise on a device, and then the rest differs."""
    from aura_dist.config.verbs import GenerateConfig
    from aura_dist.stages import generate

    prompts = texts(place, 3 if place.tiny else 12, 8)
    found: list[list[Any]] = []
    for device in ("cpu", _flag(place)):
        how = {"max_new_tokens": 12, "num_samples": 2, "device": device}
        settings = [{**how, "temperature": heat, "seed": 1} for heat in (0.0, 1.0)]
        made = [generate.run(GenerateConfig(model=model, prompt=prompts, **s)) for s in settings]
        found.append([text for results in made for result in results for text in result["plain"]])
    share = float(np.mean([a == b for a, b in zip(*found, strict=True)]))
    return place.same(f"continuations that differ, of {len(found[0])}", 1 - share, 0.05)


def _logits(directory: object, device: str, intervention: Path | None) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    import aura_dist

    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).to(device).eval()
    ids = torch.arange(5, 65, device=device).view(2, 30)
    map_ = None if intervention is None else aura_dist.Intervention.load(str(intervention))
    with torch.no_grad(), nullcontext() if map_ is None else aura_dist.intervene(model, map_):
        return np.asarray(model(input_ids=ids).logits.cpu().numpy())


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def copies(place: Place) -> Iterator[Row]:
    """Copies beside the forward against copies that are waited for, bit for bit, and the page-locked buffers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from aura_dist.collecting.run import Run
    from aura_dist.store.writer import NUM_BUFFERS

    directory = small_model(place, "llama")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).to(place.device).eval()
    number = 20 if place.tiny else 600
    batches = {"many small batches": 64, "few large batches": 16384}
    buffers: list[Any] = []
    make = Run._buffer

    def noted(run: Run) -> Any:
        buffers.append(make(run))
        return buffers[-1]

    for name, tokens_per_batch in batches.items():

        def run(how: str, limit: int = tokens_per_batch) -> Path:
            import aura_dist

            path = place.folder / f"{how}-{limit}.zarr"
            aura_dist.collect(
                model, texts(place, number), [i % 2 for i in range(number)], tokenizer=tokenizer, store=str(path),
                modules=_FEW_KINDS if place.tiny else _KINDS, pooling=["max"] if place.tiny else ["max", "mean"],
                tokens_per_batch=limit,
            )  # fmt: skip
            return path

        buffers.clear()
        with mock.patch.object(Run, "_buffer", noted):
            beside = [run(f"beside-{repeat}") for repeat in range(1 if place.tiny else 3)]
        with waiting_copies(place):
            waited = run("waited")
        error = max(difference(path, waited) for path in beside)
        yield place.same(f"{name}: beside the forward against waited for", error, 0.0)
        each = len(buffers) / len(beside)
        yield place.holds(f"{name}: buffers of a run", f"{each:g}", f"= {NUM_BUFFERS}", each == NUM_BUFFERS)
    locked = [torch.from_numpy(values).is_pinned() for buffer in buffers for values in buffer.values()]
    if place.gpu:
        yield place.holds("arrays in page-locked memory", f"{np.mean(locked):.0%}", "100%", all(locked))
    else:
        yield place.needs_gpu("arrays in page-locked memory", "100%")


def waiting_copies(place: Place) -> Any:
    """Context in which copies run in the forward's own stream, and each batch is waited for."""
    from aura_dist.collecting.capture import Capture

    run = Capture.run

    def waited(self: Capture, *args: Any, **kwargs: Any) -> None:
        run(self, *args, **kwargs)
        place.wait()

    context = ExitStack()
    context.enter_context(mock.patch.object(Capture, "run", waited))
    context.enter_context(mock.patch.object(Capture, "_beside_forward", _in_the_forwards_stream))
    return context


def _in_the_forwards_stream(capture: Any, values_BD: Any) -> Any:
    return nullcontext()


def static(place: Place) -> Iterator[Row]:
    """transformers' static cache, for which it compiles the forward on a GPU, with and without an intervention."""
    import torch
    from transformers import AutoModelForCausalLM

    import aura_dist

    if place.gpu and not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        yield Row("static cache", "needs a C compiler, because transformers compiles the forward", "–", NOT_HERE)
        return
    model = AutoModelForCausalLM.from_pretrained(small_model(place, "llama")).to(place.device).eval()
    map_ = _random_map(model)
    ids = torch.arange(5, 13, device=place.device)[None]

    def tokens(**how: Any) -> list[int]:
        made = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=2, **how)
        return list(map(int, made[0]))

    plain, fixed = tokens(), tokens(cache_implementation="static")
    if place.gpu:
        compiled = hasattr(model, "_compiled_call")  # else the rows below would say nothing
        yield place.holds("the forward was compiled", str(compiled), "True", compiled)
    with aura_dist.intervene(model, map_):
        hooked, both = tokens(), tokens(cache_implementation="static")
    after = tokens(cache_implementation="static")
    yield place.holds("static cache, plain", str(fixed == plain), "as without", fixed == plain)
    yield place.holds("static cache under hooks", str(both == hooked), "as without", both == hooked)
    yield place.holds("the hooks change the text", str(hooked != plain), "True", hooked != plain)
    yield place.holds("static cache after the hooks", str(after == plain), "as before", after == plain)


def memory(place: Place) -> Iterator[Row]:
    """Too large a batch is one line that names a setting, and with that setting there is room."""
    import transformers as hf

    from aura_dist.cli import main
    from aura_dist.store.grid import rows_per_chunk
    from tests.models import COMMON, tiny_tokenizer

    model = place.folder / "wide"
    width = 16384 if place.tiny else 32768
    config = hf.LlamaConfig(
        **COMMON, hidden_size=256, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=256,
    )  # fmt: skip
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    number = 128 if place.tiny else 256
    most = rows_per_chunk(number) * 128  # a whole row chunk at once
    data = place.folder / "long.csv"
    data.write_text("text,toxic\n" + "".join(f"{'you are such a person ' * 60},{i % 2}\n" for i in range(number)))
    words = ["collect", "--model", model, "--data", data, "--concepts", "toxic", "--device", _flag(place)]
    words += ["--store", place.folder / "wide.zarr", "--tokens-per-batch", most]
    with little_memory(place, 1.4e9 if place.tiny else 3e9):
        said = StringIO()
        with redirect_stderr(said):
            code = main([str(word) for word in words])
        lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        told = re.search(r"--tokens-per-batch (\d+)(?=[^;]*$)", lines[0]) if lines else None
        print(said.getvalue())
        one = code == 2 and len(lines) == 1 and lines[0].startswith("error: out of memory on ")
        yield place.holds("too large a batch", f"code {code}, {len(lines)} line", "code 2, 1 line", one)
        named = int(told[1]) if told else most
        yield place.holds("the line names a smaller batch", str(named), f"< {most}", named < most)
        if told is not None:
            code = main([str(word) for word in [*words[:-1], told[1], "--overwrite"]])
            yield place.holds(f"with --tokens-per-batch {told[1]}", f"code {code}", "code 0", code == 0)


def little_memory(place: Place, num_bytes: float) -> Any:
    """Context in which the device, or on a CPU this process, has about so many bytes left."""
    context = ExitStack()
    if place.gpu:
        import torch

        torch.zeros(1, device=place.device)  # the context of this process comes first
        free, _ = place.torch.mem_get_info()
        context.enter_context(_ballast(place, int(free - num_bytes)))
        return context
    import resource

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(num_bytes), limits[1]))
    context.callback(resource.setrlimit, resource.RLIMIT_DATA, limits)
    return context


def _ballast(place: Place, num_bytes: int) -> Any:
    """Context in which another process holds bytes of the device."""
    import multiprocessing

    spawn = multiprocessing.get_context("spawn")
    held, done = spawn.Event(), spawn.Event()
    process = spawn.Process(target=_hold, args=(place.device, num_bytes, held, done))
    process.start()
    assert held.wait(60), "the other process holds memory"
    context = ExitStack()
    context.callback(process.join, 30)
    context.callback(done.set)
    return context


def _hold(device: str, num_bytes: int, held: Any, done: Any) -> None:
    import torch

    ballast = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    held.set()
    done.wait(300)
    del ballast


def shared(place: Place) -> Iterator[Row]:
    """Each of two ranks runs this: both on one device, so that NCCL refuses and gloo takes over."""
    from transformers.distributed import DistributedConfig

    rank = os.environ["RANK"]
    if rank == "0":
        model, data = small_model(place, "llama"), data_file(place, 40)
        kinds = _FEW_KINDS if place.tiny else _KINDS
        base = ["--model", model, "--data", data, "--concepts", "toxic", "--modules", *kinds, "--device", _flag(place)]
        with alone():
            command("collect", *base, "--store", place.folder / "one.zarr")
        (place.folder / "ready.json").write_text(json.dumps(list(map(str, base))))
    base = _awaited(place.folder / "ready.json")
    for sharding in ("replicate", "tensor", "fsdp"):
        if sharding == "fsdp" and "fsdp_plan" not in DistributedConfig.__dataclass_fields__:
            yield Row("two ranks on one device, fsdp", "needs a later transformers", "–", NOT_HERE)
            continue
        path = place.folder / f"{sharding}.zarr"
        command("collect", *base, "--sharding", sharding, "--store", path)
        if rank == "0":
            yield place.same(f"two ranks on one device, {sharding}", difference(path, place.folder / "one.zarr"), CLOSE)


def _awaited(path: Path) -> list[str]:
    import time

    while not path.exists() or not (text := path.read_text()):
        time.sleep(0.05)
    return list(json.loads(text))


def collectives(place: Place) -> Iterator[Row]:
    """What the sharded strategies are built on, over the device's own collectives, in a world of one rank."""
    import copy

    import torch
    from torch.distributed import get_backend_config, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from aura_dist.models.strategies.table import parse_sharding
    from aura_dist.ranks.launch import start_team

    plain = falcon(place, 2).float()  # in bfloat16 a kernel for another alignment would differ by more than a fault
    ids = torch.arange(3, 67, device=place.device).view(2, 32)

    @torch.no_grad()
    def logits(model: Any) -> Any:
        return model(input_ids=ids, use_cache=False).logits.float().cpu().numpy()

    expected = logits(plain)
    with start_team(parse_sharding("zero3"), place.device):  # asks for a process group of one rank too
        backends = get_backend_config()
        mesh = init_device_mesh(place.device, (1,))
        split = copy.deepcopy(plain)
        for layer in split.transformer.h:
            fully_shard(layer, mesh=mesh)
        yield place.same(f"fsdp ({backends})", _error(logits(split), expected), CLOSE)
        cut = copy.deepcopy(plain)
        styles = {"mlp.dense_h_to_4h": ColwiseParallel(), "mlp.dense_4h_to_h": RowwiseParallel()}
        for layer in cut.transformer.h:
            parallelize_module(layer, mesh, styles)
        yield place.same(f"tensor ({backends})", _error(logits(cut), expected), CLOSE)


def zero3(place: Place) -> Iterator[Row]:
    """DeepSpeed's ZeRO 3 over the device's own collectives, in a world of one rank."""
    data, model = data_file(place, 40), small_model(place, "llama")
    base = ["collect", "--model", model, "--data", data, "--concepts", "toxic", "--device", _flag(place)]
    command(*base, "--store", place.folder / "one.zarr")
    for offload in ("none", "cpu"):
        path = place.folder / f"{offload}.zarr"
        command(*base, "--sharding", "zero3", *(["--offload", offload] if offload != "none" else []), "--store", path)
        yield place.same(f"zero3, offload {offload}", difference(path, place.folder / "one.zarr"), CLOSE)


def _flag(place: Place) -> str:
    """The device as `--device` spells it."""
    return "cuda" if place.gpu else "cpu"
