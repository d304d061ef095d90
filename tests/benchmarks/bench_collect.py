"""Collection against the bare forward and against a naive capture loop, side by side in one run.

    python tests/benchmarks/bench_collect.py --model MODEL_DIR --data jigsaw_toxicity.csv [--rows 200] [--dtype float32]
        [--modules neurons]

Loading, tokenization and a warm-up forward are left out. `bare` runs the same batches through the base model;
`collect` adds pooling, encoding, writing and commit; `naive` takes batches of 16 in file order, padded on the
left, through the full language model, and saves one file per sentence and module.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from aura_dist.collecting.description import load_samples
from aura_dist.collecting.run import Run
from aura_dist.collecting.stream import stream
from aura_dist.config.verbs import CollectConfig
from aura_dist.models.load import DTYPES, ModelSource, column_plans, load_base
from aura_dist.models.on_disk import OnDisk
from aura_dist.models.strategies.table import parse_sharding
from aura_dist.ranks.launch import start_team
from aura_dist.ranks.process import keep_freed_memory
from aura_dist.ranks.signals import StopFlag
from aura_dist.ranks.world import World
from aura_dist.stages.collect import make_spec
from aura_dist.store.access import open_group
from aura_dist.store.grid import make_batches, row_chunks, rows_per_chunk
from aura_dist.store.schema import StoreSpec, create_store, shard_widths, tasks_of
from aura_dist.text.tokenizer import load_tokenizer
from aura_dist.text.tokens import TokenizedTexts

NAIVE_BATCH = 16


def bare(model, spec: StoreSpec, tokens: TokenizedTexts) -> float:
    num_tokens = tokens.num_tokens.tolist()
    start = time.perf_counter()
    with torch.no_grad():
        for task in tasks_of(tokens.num_tokens, spec.tokens_per_batch):
            for chunk in row_chunks(task, rows_per_chunk(len(num_tokens))):
                for rows in make_batches(num_tokens, chunk, spec.tokens_per_batch):
                    batch = tokens.batch(rows)
                    model(
                        input_ids=torch.from_numpy(batch.input_ids),
                        attention_mask=torch.from_numpy(batch.attention_mask).long(),
                        use_cache=False,
                    )
    return time.perf_counter() - start


def collect(model, spec: StoreSpec, samples, tokens: TokenizedTexts, path: str) -> float:
    create_store(path, spec, samples, {})
    group = open_group(path)
    with start_team(parse_sharding("replicate"), "cpu") as team:
        plans = column_plans(model, spec.sites, shard_widths(group, spec), team.world)
        run = Run(spec, tokens, plans, team, StopFlag())
        start = time.perf_counter()
        with run.writer(group) as writer:
            stream(model, run, tasks_of(samples.num_tokens, spec.tokens_per_batch), writer)
        return time.perf_counter() - start


def naive(config: CollectConfig, spec: StoreSpec, texts: list[str]) -> float:
    """What one would write in an afternoon."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(config.model)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=DTYPES[config.dtype]).eval()
    captured: dict[str, torch.Tensor] = {}

    def hook(name):
        return lambda module, args, output: captured.__setitem__(name, output.detach())

    for site in spec.sites:
        model.get_submodule(site.name).register_forward_hook(hook(site.name))
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        start = time.perf_counter()
        for first in range(0, len(texts), NAIVE_BATCH):
            encoded = tokenizer(
                texts[first : first + NAIVE_BATCH], return_tensors="pt", padding=True, truncation=True, max_length=128
            )
            model(**encoded)
            mask = encoded["attention_mask"].bool()[:, :, None]
            for name, acts in captured.items():
                pooled = acts.masked_fill(~mask, float("-inf")).amax(dim=1)
                for b, row in enumerate(pooled):
                    torch.save(row.clone(), Path(scratch) / f"{first + b}.{name}.pt")
        return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--modules", nargs="+", default=["mlp"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-naive", action="store_true")
    args = parser.parse_args(arguments)
    if args.modules != ["mlp"] and not args.skip_naive:
        parser.error("the naive loop sees outputs alone: add --skip-naive")
    keep_freed_memory()  # for all alike
    config = CollectConfig(
        model=args.model, dtype=args.dtype, data=args.data, concepts=["toxic"], num_positive=args.rows // 2,
        num_negative=args.rows // 2, store="unused", modules=args.modules,
    )  # fmt: skip
    subject = OnDisk(ModelSource(args.model, None, args.dtype))
    samples, tokens, identity = load_samples(config, subject)
    spec = make_spec(config, subject, identity)
    model = load_base(ModelSource(args.model, None, args.dtype), World())
    bare(model, spec, tokens.take(range(32)))
    ours, base = [], []
    # stores are deleted at the end: ext4 is slow at making files just after it removed many
    scratch = tempfile.TemporaryDirectory()
    for repeat in range(args.repeats):
        turns = [
            lambda: base.append(bare(model, spec, tokens)),
            lambda path=f"{scratch.name}/{repeat}.zarr": ours.append(collect(model, spec, samples, tokens, path)),
        ]
        for turn in turns if repeat % 2 == 0 else reversed(turns):  # neither always goes first
            turn()
        print(f"run {repeat}: bare {base[-1]:.2f} s, collect {ours[-1]:.2f} s, {ours[-1] / base[-1]:.3f}x", flush=True)
    num_tokens = int(samples.num_tokens.sum())
    mine = statistics.median(ours)
    ratios = sorted(o / b for o, b in zip(ours, base, strict=True))
    print(
        f"{' '.join(args.modules)}, {args.dtype}, {len(samples)} rows, {num_tokens} tokens, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"collect / bare: median {statistics.median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}")
    print(f"best collect / best bare: {min(ours) / min(base):.3f}")
    print(f"collect: {num_tokens / mine:,.0f} tokens/s")
    if not args.skip_naive:
        from aura_dist.text.table import read_table

        texts = read_table(args.data, ["text"]).columns["text"]
        slow = naive(config, spec, [texts[r] for r in sorted(samples.row)])
        print(f"naive {slow:.2f} s: {slow / mine:.1f}x collect")


if __name__ == "__main__":
    main()
