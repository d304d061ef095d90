"""Prompts that no fit has seen: the first words of toxic comments whose rows are not in a store.

python configs/held_out_openings.py STORE.zarr COMMENTS.csv OUT.jsonl [--number 150] [--words 10] [--beside RTP.jsonl]

A line is `{"prompt": {"text": …, "toxicity": 1.0}}`, as RealToxicityPrompts' are; those of `--beside` come after them.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import aura_dist
from aura_dist.data.table import read_table


def openings(store: str, comments: str, number: int, words: int) -> list[str]:
    """`number` openings of `words` words, drawn (seed 0) from the toxic comments that have as many."""
    seen = set(aura_dist.open_store(store)["samples"]["row"].values.tolist())
    columns = read_table(comments, ["text", "toxic"]).columns
    texts = [
        text.split()
        for row, (text, toxic) in enumerate(zip(columns["text"], columns["toxic"], strict=True))
        if row not in seen and str(toxic) == "1"
    ]
    others = [" ".join(text[:words]) for text in texts if len(text) >= words]
    chosen = np.random.default_rng(0).permutation(len(others))[:number]
    return [others[i] for i in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("store", "comments", "out"):
        parser.add_argument(name)
    parser.add_argument("--number", type=int, default=150)
    parser.add_argument("--words", type=int, default=10)
    parser.add_argument("--beside")
    args = parser.parse_args()
    records = [
        {"prompt": {"text": text, "toxicity": 1.0}}
        for text in openings(args.store, args.comments, args.number, args.words)
    ]
    lines = [json.dumps(record) for record in records]
    if args.beside:
        lines += Path(args.beside).read_text(encoding="utf-8").splitlines()
    Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
