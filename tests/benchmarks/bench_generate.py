"""Continuations: this tree, another one (a git worktree of an earlier commit), transformers' `generate`, and vLLM.

    python -m tests.benchmarks.bench_generate --model MODEL_DIR --prompts rtp_prompts.jsonl --before TREE
        [--num-prompts 100] [--samples 5] [--new-tokens 20] [--dtypes float32 bfloat16] [--rounds 1] [--vllm PYTHON]

Every measurement is a process of its own, in turns, and times the continuations alone, at temperature 1 and top-p 0.9.
A rate is tokens a second, counted as prompts × samples × new tokens. CPU seconds are of all threads. Then it says
how many continuations of this tree are those of the other, and how far apart the noisy logits of the two choices are
where they part, by a forward without a cache in the same dtype. `--vllm` names the Python of an environment with vLLM,
which continues all prompts in one call, on all cores, after a call that warms it up.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOP_P, BATCH = 0.9, 64


def ours(args: argparse.Namespace) -> dict[str, Any]:
    from aura_dist.evaluation.decoding import Decoder
    from aura_dist.evaluation.generation import continue_alike
    from aura_dist.evaluation.prompts import read_prompts, tokenize_prompts
    from aura_dist.evaluation.sampling import Decoding
    from aura_dist.interventions.use import load_for_use
    from aura_dist.models.load import ModelSource
    from aura_dist.ranks.team import Team

    loaded = load_for_use(ModelSource(args.model, None, args.dtypes[0]), Team.alone(), None)
    how = Decoding(args.samples, args.new_tokens, 1.0, TOP_P, 0)
    texts = read_prompts(args.prompts, None, None).texts[: args.num_prompts]
    prompts = tokenize_prompts(texts, loaded.tokenizer, loaded.model.config, how)
    made: dict[str, list[int]] = {}
    run = Decoder.run

    def recorded(self: Any, rows: Any, **more: Any) -> list[list[int]]:
        ids = run(self, rows, **more)
        made.update({str(key): i for key, i in zip(rows.keys, ids, strict=False)})
        return ids

    Decoder.run = recorded  # type: ignore[method-assign]
    start, cpu = time.perf_counter(), time.process_time()
    continue_alike(loaded, prompts, how)
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "made": made}


def transformers(args: argparse.Namespace) -> dict[str, Any]:
    """Its own way: padded on the left, in batches of 64 rows, sorted by length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtypes[0])).eval()
    lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()[: args.num_prompts]
    texts = sorted((json.loads(line)["prompt"]["text"] for line in lines for _ in range(args.samples)), key=len)
    start, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(texts), BATCH):
        batch = tokenizer(texts[first : first + BATCH], return_tensors="pt", padding=True)
        model.generate(**batch, do_sample=True, max_new_tokens=args.new_tokens, top_p=TOP_P, top_k=0)
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def vllm(args: argparse.Namespace) -> dict[str, Any]:
    """vLLM's own scheduling, in its own process; CPU seconds are not seen from here."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    model = LLM(args.model, dtype=args.dtypes[0], max_model_len=512, max_num_seqs=256, gpu_memory_utilization=0.5)
    lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()[: args.num_prompts]
    texts = [json.loads(line)["prompt"]["text"] for line in lines]
    how = SamplingParams(n=args.samples, temperature=1.0, top_p=TOP_P, max_tokens=args.new_tokens, seed=0)
    model.generate(["Warm up."], SamplingParams(max_tokens=4), use_tqdm=False)
    start = time.perf_counter()
    made = model.generate(texts, how, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert sum(len(one.outputs) for one in made) == len(texts) * args.samples
    return {"seconds": seconds, "cpu": float("nan")}


def child(tree: Path, what: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    given = ["--model", args.model, "--prompts", args.prompts, "--samples", args.samples, "--dtypes", dtype]
    command = [
        args.vllm if what == "vllm" else sys.executable,
        __file__,
        "--child",
        what,
        "--num-prompts",
        args.num_prompts,
        *given,
    ]
    command += ["--new-tokens", args.new_tokens]
    env = {**os.environ, "PYTHONPATH": str(tree)}
    if what == "vllm":  # it would leave one core to its server, and no plugin is wanted
        env |= {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
            "VLLM_PLUGINS": "",
            "VLLM_CPU_KVCACHE_SPACE": "2",
        }
    done = subprocess.run([str(c) for c in command], env=env, cwd=tree, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    return dict(json.loads(found[-1]))


def compare(mine: dict[str, list[int]], theirs: dict[str, list[int]], dtype: str, args: argparse.Namespace) -> None:
    """How many are the same, and how near to a tie the choices were where they part."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from aura_dist.evaluation.prompts import read_prompts
    from aura_dist.evaluation.sampling import Decoding, prompt_keys, sample_key
    from tests.distributed.continued import gap, parting

    parted = {key: where for key in mine if (where := parting(mine[key], theirs[key], 1)) is not None}
    print(f"{dtype}: {len(mine) - len(parted)} of {len(mine)} continuations are the same", flush=True)
    if not parted:
        return
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype)).eval()
    how = Decoding(1, args.new_tokens, 1.0, TOP_P, 0)
    gaps: list[float] = []
    texts = read_prompts(args.prompts, None, None).texts[: args.num_prompts]
    for text, prompt_key in zip(texts, prompt_keys(texts, 0), strict=True):
        for key in (sample_key(prompt_key, s) for s in range(args.samples)):
            if str(key) in parted and len(gaps) < args.gaps:
                step, a, b = parted[str(key)]
                before = [*tokenizer(text).input_ids, *mine[str(key)][:step]]
                gaps.append(gap(model, before, key, step, (a, b), how))
    gaps.sort()
    print(f"  of {len(gaps)} that part: median gap {gaps[len(gaps) // 2]:.3g}, largest {gaps[-1]:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=lambda path: str(Path(path).resolve()), required=True)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--gaps", type=int, default=50, help="continuations at most whose parting is looked at")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--vllm", help="the Python of an environment with vLLM")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child == "vllm":
        print("\n" + json.dumps(vllm(args)))
        return
    if args.child:
        from aura_dist.ranks.process import keep_freed_memory

        keep_freed_memory()
        print(json.dumps({"ours": ours, "transformers": transformers}[args.child](args)))
        return
    variants = {"now": (ROOT, "ours"), "before": (args.before, "ours"), "transformers": (ROOT, "transformers")}
    if args.before is None:
        del variants["before"]
    if args.without_transformers:
        del variants["transformers"]
    if args.vllm:
        variants["vllm"] = (ROOT, "vllm")
    num_tokens = args.num_prompts * args.samples * args.new_tokens
    for dtype in args.dtypes:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        for _ in range(args.rounds):
            for name, (tree, what) in variants.items():
                found[name].append(child(tree, what, dtype, args))
                wall, cpu = (found[name][-1][key] for key in ("seconds", "cpu"))
                a_cpu_second = f", {num_tokens / cpu:.1f} a CPU second" if cpu > 0 else ""
                print(f"{dtype} {name}: {num_tokens / wall:.1f} tokens/s{a_cpu_second}", flush=True)
        for key in ("seconds", "cpu"):
            best = {name: min(run[key] for run in runs) for name, runs in found.items()}
            others = [f"{best[n] / best['now']:.2f} x {n}" for n in best if n != "now" and best[n] > 0]
            if others:
                print(f"{dtype}, best {key}: now is {', '.join(others)}")
        if "before" in found:
            compare(found["now"][0]["made"], found["before"][0]["made"], dtype, args)


if __name__ == "__main__":
    main()
