"""Seconds that the perplexity of some texts takes on one rank of one thread, and on two: side by side, in turns.

python tests/benchmarks/bench_perplexity.py [--model MODEL_DIR] [--data TEXTS.csv] [--texts 400] [--repeats 3]

By default a random Llama of 19 million weights reads the bundled sentences, several of them a text. Start and loading
are left out. Prints the ratio, and the largest relative difference of the figures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers as hf

from aura_dist.text.table import read_table
from tests.models import COMMON, DEMO_SENTENCES, tiny_tokenizer

SENTENCES_A_TEXT = 8


def save_model(directory: Path) -> str:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        **COMMON, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
        max_position_embeddings=1024,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def save_texts(source: str, number: int, path: Path) -> str:
    """The first texts of a file; of the bundled sentences, several joined."""
    texts = read_table(source, ["text"]).columns["text"]
    if source == str(DEMO_SENTENCES):
        joined = ([texts[(7 * i + k) % len(texts)] for k in range(1 + i % SENTENCES_A_TEXT)] for i in range(number))
        texts = [" ".join(sentences) for sentences in joined]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:number]))
    return str(path)


def measured(num_ranks: int, arguments: list[str], out: Path) -> tuple[float, dict[str, float]]:
    """Seconds, and the figures."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    subprocess.run(
        [sys.executable, *launcher, "-m", "aura_dist", "evaluate", *arguments, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    results = json.loads(out.read_text())
    return results["seconds"]["perplexity"], {k: v for k, v in results["perplexity"].items() if isinstance(v, float)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--data", default=str(DEMO_SENTENCES))
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    ratios, apart = [], 0.0
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        model = args.model or save_model(scratch / "model")
        arguments = ["--model", model, "--perplexity-texts", save_texts(args.data, args.texts, scratch / "texts.jsonl")]
        for repeat in range(args.repeats):
            order = (1, 2) if repeat % 2 == 0 else (2, 1)
            found = {n: measured(n, arguments, scratch / f"{n}.json") for n in order}
            (one, figures), (two, others) = found[1], found[2]
            ratios.append(one / two)
            apart = max(apart, *(abs(others[k] / value - 1) for k, value in figures.items()))
            print(f"one rank {one:.2f} s, two ranks {two:.2f} s: {ratios[-1]:.2f}x", flush=True)
    print(f"{args.texts} texts, median ratio {statistics.median(ratios):.2f}, figures differ by at most {apart:.1e}")


if __name__ == "__main__":
    main()
