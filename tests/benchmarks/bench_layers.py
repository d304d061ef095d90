"""`--sharding layers` against `dispatch` and the bare arithmetic, for random weights of Falcon-40B's widths.

python tests/benchmarks/bench_layers.py --folder BIG_DISK [--layers 20] [--rows 64] [--tokens 64] [--host-memory 6GiB]
    [--dispatch] [--ranks 1] [--megabytes-per-second 400 | --balanced]

The checkpoint stays in the folder for the next run; layers that another checkpoint there has are hard links to its
files. A layer is 1.38 GB, and `dispatch` writes what does not fit in `--host-memory` once more. With several `--ranks`
the rows are shared, each rank has one thread and its share of the memory, and `dispatch` is left out.
`--megabytes-per-second` slows down the reading of layers to that rate, within this benchmark alone. `--balanced` first
runs `layers` unhindered, and then with a reader that takes as long as that run computed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import psutil
import torch
import transformers as hf
from safetensors.torch import save_file

from aura_dist.models.identity import fingerprint
from aura_dist.models.load import ModelSource, load_config
from aura_dist.sites.find import decoder_layers_name
from tests.memory import anonymous_bytes
from tests.models import COMMON, tiny_tokenizer

INDEX = "model.safetensors.index.json"  # written last
WIDTHS = {"hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True}
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "for",
    "on",
    "that",
    "with",
    "as",
    "at",
    "by",
    "from",
    "this",
    "which",
    "or",
    "be",
    "are",
    "were",
    "it",
    "an",
    "not",
]
CHILD = """
import sys, time
from aura_dist.models.weights import Source, open_weights
rate, read = float(sys.argv.pop(1)) * 1e6, None
if rate:
    from aura_dist.models import layer_reader
    ahead = layer_reader._read_ahead
    def slow(tensors, places):
        begun, size = time.perf_counter(), sum(places[n][1].stop - places[n][1].start for n in tensors)
        ahead(tensors, places)
        time.sleep(max(0, size / rate - (time.perf_counter() - begun)))
    layer_reader._read_ahead = slow
    from accelerate.utils import OffloadedWeightsLoader
    get = OffloadedWeightsLoader.__getitem__
    def slow_get(self, key):
        begun, value = time.perf_counter(), get(self, key)
        if key not in self.state_dict:
            time.sleep(max(0, value.nbytes / rate - (time.perf_counter() - begun)))
        return value
    OffloadedWeightsLoader.__getitem__ = slow_get
from aura_dist.cli import main
sys.exit(main(sys.argv[1:]))
"""


def make_checkpoint(folder: Path, num_layers: int, width: int) -> Path:
    """Random weights, a file a layer, written one by one."""
    directory = folder / f"falcon-40b-widths-{num_layers}{f'-{width}' if width != 8192 else ''}"
    if (directory / INDEX).is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = hf.FalconConfig(
        **COMMON, **{**WIDTHS, "hidden_size": width}, num_hidden_layers=num_layers, alibi=False, bias=False
    )
    config.dtype = "bfloat16"
    config.architectures = ["FalconForCausalLM"]
    config.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    layers, files, where = decoder_layers_name(model), {}, {}
    for name, tensor in model.state_dict().items():
        within = name.removeprefix(f"{layers}.")
        files.setdefault(f"layer-{within.split('.')[0]}" if within != name else "outside", []).append((name, tensor))
    others = [index.parent for index in folder.glob(f"falcon-*/{INDEX}") if of_width(index.parent) == width]
    for file, tensors in files.items():
        where |= {name: f"{file}.safetensors" for name, _ in tensors}
        made_before = [other / f"{file}.safetensors" for other in others if (other / f"{file}.safetensors").is_file()]
        if made_before:
            (directory / made_before[0].name).unlink(missing_ok=True)
            os.link(made_before[0], directory / made_before[0].name)
            continue
        made = {}
        for name, tensor in tensors:
            std = tensor.shape[-1] ** -0.5 if tensor.ndim == 2 else 0.1
            made[name] = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(std=std)
        save_file(made, directory / f"{file}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index))
    return directory


def of_width(directory: Path) -> int:
    """The hidden size of a checkpoint."""
    return int(json.loads((directory / "config.json").read_text())["hidden_size"])


def drop_from_cache(directory: Path) -> None:
    """Let the next run read the checkpoint from the disk."""
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, arguments: list[str], rate: float, ranks: int) -> dict[str, float]:
    """Run `aura-dist ARGUMENTS`: seconds, peak of a rank's anonymous memory, bytes that all read from the disk."""
    child = folder / "child.py"
    child.write_text(CHILD)
    run = [sys.executable]
    if ranks > 1:
        run += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    begun, peak, read = time.perf_counter(), 0, {}
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([*run, str(child), str(rate), *arguments], env={**os.environ, **path}) as process:
        while process.poll() is None:
            with suppress(psutil.Error):
                parent = psutil.Process(process.pid)
                for one in parent.children() if ranks > 1 else [parent]:
                    peak = max(peak, anonymous_bytes(one.pid))
                    read[one.pid] = one.io_counters().read_bytes
            time.sleep(0.05)
        assert process.returncode == 0
    return {"seconds": time.perf_counter() - begun, "peak": peak, "read": sum(read.values())}


def best_rate(rows: int) -> float:
    """FLOP/s of the MLP's first product in bfloat16, the best of five."""
    a, b = torch.randn(rows, 8192, dtype=torch.bfloat16), torch.randn(32768, 8192, dtype=torch.bfloat16)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        a @ b.T
        times.append(time.perf_counter() - begun)
    return 2 * a.numel() * 32768 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--host-memory", default="6GiB")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--dispatch", action="store_true")
    parser.add_argument("--megabytes-per-second", type=float, default=0.0)
    parser.add_argument("--balanced", action="store_true")
    parser.add_argument("--width", type=int, default=8192)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model = make_checkpoint(args.folder, args.layers, args.width)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    texts = [" ".join(WORDS[(i * 7 + j * (i + 3)) % len(WORDS)] for j in range(60)) for i in range(args.rows)]
    lines = [f"{text},{i % 2}" for i, text in enumerate(texts)]
    (args.folder / "texts.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    common = [
        "--model", str(model), "--data", str(args.folder / "texts.csv"), "--concepts", "label", "--dtype", "bfloat16",
        "--max-tokens", str(args.tokens), "--tokens-per-batch", str(args.tokens_per_batch), "--overwrite",
    ]  # fmt: skip
    source = ModelSource(str(model), None, "bfloat16")
    fingerprint(source, load_config(source))  # kept in the user's cache, so that no run reads the weights for it
    ways = {"layers": ["--sharding", "layers", "--host-memory", args.host_memory]}
    if args.dispatch and args.ranks == 1:
        offload = ["--max-memory", f"cpu={args.host_memory}", "--offload-folder", str(args.folder / "offloaded")]
        ways["dispatch"] = ["--sharding", "dispatch", *offload]
    if args.balanced:
        seconds = run_one(args, model, size, "layers", [*common, *ways["layers"]], 0.0)
        args.megabytes_per_second = size / seconds / 1e6
        print(f"now a reader of {args.megabytes_per_second:.0f} MB/s, which takes {seconds:.0f} s too", flush=True)
    for name, how in ways.items():
        seconds_now = run_one(args, model, size, name, [*common, *how], args.megabytes_per_second)
        if args.balanced:
            print(f"{name}: {seconds_now / seconds:.2f} times the longer of reading and computing; aim at most 1.15")


def run_one(args: argparse.Namespace, model: Path, size: int, name: str, arguments: list[str], rate: float) -> float:
    """Collect from a cold cache, and print what it took; returns the seconds without start and loading."""
    drop_from_cache(model)
    store = args.folder / f"{name}.zarr"
    found = measure(args.folder, ["collect", *arguments, "--store", str(store)], rate, args.ranks)
    times = json.loads((store / "progress" / "zarr.json").read_text())["attributes"]["times"]
    arithmetic = times["tokens"] * 2 * (size // 2) / best_rate(args.tokens_per_batch)
    print(
        f"{name}: {found['seconds']:.0f} s, of which {times['seconds']:.0f} s running {times['tokens']} tokens, "
        f"{arithmetic / times['seconds']:.2f} of the bare arithmetic ({arithmetic:.0f} s); peak anonymous memory "
        f"{found['peak'] / 1e9:.2f} GB; read {found['read'] / 1e9:.2f} GB of {size / 1e9:.2f} GB, "
        f"{found['read'] / size:.2f} times",
        flush=True,
    )
    return float(times["seconds"])


if __name__ == "__main__":
    main()
