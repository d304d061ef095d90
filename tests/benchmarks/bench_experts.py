"""A mixture of 32 experts, collected with `experts`: against the bare forward, and its peak memory against `plan`'s.

python tests/benchmarks/bench_experts.py --data jigsaw_toxicity.csv [--rows 200] [--dtype float32] [--repeats 5]
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from aura_dist.cli import main as aura_dist
from tests.benchmarks.bench_collect import main as bench_collect
from tests.memory import peak_of
from tests.models import tiny_tokenizer

CONFIG = {
    "vocab_size": 4000, "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
    "moe_intermediate_size": 512, "max_position_embeddings": 1024,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(Qwen3MoeConfig(**CONFIG)).save_pretrained(f"{scratch}/model")
        tiny_tokenizer().save_pretrained(f"{scratch}/model")
        what = ["--model", f"{scratch}/model", "--data", args.data, "--dtype", args.dtype, "--modules", "experts"]
        bench_collect([*what, "--rows", str(args.rows), "--repeats", str(args.repeats), "--skip-naive"])
        half = str(args.rows // 2)
        what += ["--concepts", "toxic", "--num-positive", half, "--num-negative", half, "--device", "cpu"]
        with contextlib.redirect_stdout(io.StringIO()) as plan:
            assert aura_dist(["plan", *what, "--json"]) == 0
        predicted = json.loads(plan.getvalue())["anonymous_bytes"]
        measured = peak_of(["collect", *what, "--store", f"{scratch}/store.zarr"], timeout_seconds=1800)
        print(f"peak {measured / 1e6:,.0f} MB, planned {predicted / 1e6:,.0f} MB: {predicted / measured:.2f}")


if __name__ == "__main__":
    main()
