"""Export of a large sharded checkpoint against `cp -r` of the same files to the same disk, side by side in one run.

    python tests/benchmarks/bench_export.py --scratch DIR [--gigabytes 8] [--dtype bfloat16] [--repeats 3]

The checkpoint is a random Llama with hidden size 4096 in shards of 2 GB, made on the spot and deleted at the end.
AurA-like scales on all MLP linears: two thirds of the bytes are folded. Both copies start with the source in the
page cache or not, as the memory allows, and end when the command returns.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from transformers import LlamaConfig

from aura_dist.interventions.artifact import Intervention
from aura_dist.models.load import skeleton
from aura_dist.models.weights import open_weights
from aura_dist.sites.find import find_sites
from tests.models import tiny_tokenizer

HIDDEN, INTERMEDIATE, VOCAB = 4096, 11008, 32000
SHARD_BYTES = 2 << 30


def make_checkpoint(directory: Path, num_bytes: int, dtype: torch.dtype) -> LlamaConfig:
    """A random checkpoint of about `num_bytes`, one shard in memory at a time."""
    from safetensors.torch import save_file

    per_layer = (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN) * dtype.itemsize
    layers = max(1, round((num_bytes - 2 * VOCAB * HIDDEN * dtype.itemsize) / per_layer))
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers, vocab_size=VOCAB,
        num_attention_heads=32, num_key_value_heads=32, dtype=dtype, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, tensor in skeleton(config).state_dict().items():
        if size + tensor.numel() * dtype.itemsize > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.shape
        size += tensor.numel() * dtype.itemsize
    weight_map, total = {}, 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: torch.empty(shape, dtype=dtype).uniform_(-0.02, 0.02) for n, shape in shard.items()}
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return config


# prints the seconds of the work itself: the start of Python and the imports are left out
EXPORT = """
import sys, time
from aura_dist.config.verbs import ExportConfig
from aura_dist.ranks.process import configure_logging
from aura_dist.ranks.process import keep_freed_memory
from aura_dist.stages import export
configure_logging()
keep_freed_memory()
start = time.perf_counter()
export.run(ExportConfig(model=sys.argv[1], intervention=sys.argv[2], out=sys.argv[3]))
print(time.perf_counter() - start)
"""


def timed(command: list[str]) -> tuple[float, float, int]:
    """Seconds of the process; seconds that it printed last, if any; peak anonymous memory in bytes."""
    peak, done = 0, threading.Event()
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            try:
                fields = Path(f"/proc/{process.pid}/status").read_text()
                peak = max(peak, 1024 * int(fields.split("RssAnon:")[1].split()[0]))
            except (OSError, IndexError):
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed = process.communicate()[0]
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    assert process.returncode == 0, command
    return seconds, float(printed.split()[-1]) if printed else seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", required=True, type=Path)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    scratch = args.scratch / "bench-export"
    scratch.mkdir(parents=True)
    try:
        config = make_checkpoint(scratch / "model", round(args.gigabytes * 1e9), getattr(torch, args.dtype))
        rng = np.random.default_rng(0)
        sites = find_sites(skeleton(config)).select(("mlp",))
        scale = {s.name: rng.uniform(0.4, 1, s.width).astype(np.float32) for s in sites}
        Intervention(scale, meta={"method": "random"}).save(scratch / "intervention")
        tensors = [t for f in sorted((scratch / "model").glob("*.safetensors")) for t in open_weights(f).tensors]
        total, largest = sum(t.stop - t.start for t in tensors), max(t.stop - t.start for t in tensors)
        print(
            f"{total / 1e9:.2f} GB in {args.dtype}, largest tensor {largest / 1e9:.2f} GB, {len(sites)} modules folded"
        )
        ours, theirs, peaks = [], [], []
        for repeat in range(args.repeats):
            theirs.append(timed(["cp", "-r", str(scratch / "model"), str(scratch / "copy")])[0])
            shutil.rmtree(scratch / "copy")
            names = [str(scratch / name) for name in ("model", "intervention", "out")]
            whole, seconds, peak = timed([sys.executable, "-c", EXPORT, *names])
            shutil.rmtree(scratch / "out")
            ours.append(seconds)
            peaks.append(peak)
            print(
                f"run {repeat}: cp -r {theirs[-1]:.2f} s, export {seconds:.2f} s ({whole:.2f} s with the start of "
                f"Python and imports): {theirs[-1] / seconds:.2f}x ({theirs[-1] / whole:.2f}x) the speed of cp; "
                f"peak RssAnon {peak / 1e9:.2f} GB",
                flush=True,
            )
        ratios = [t / o for t, o in zip(theirs, ours, strict=True)]
        print(f"export: {statistics.median(ratios):.2f}x the speed of cp -r (median)")
        print(f"at best: export {total / min(ours) / 1e9:.2f} GB/s, cp -r {total / min(theirs) / 1e9:.2f} GB/s")
        print(f"peak RssAnon {max(peaks) / 1e9:.2f} GB; limit 1.5 GB + {largest / 1e9:.2f} GB")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
