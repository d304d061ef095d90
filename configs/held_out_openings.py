"""Prompts that no fit has seen: the first words of toxic comments whose rows are not in a store.

python configs/held_out_openings.py STORE.zarr COMMENTS.csv OUT.jsonl [--number 150] [--words 10] [--beside RTP.jsonl]

A line is `{"prompt": {"text": …, "toxicity": 1.0}}`, as RealToxicityPrompts' are; those of `--beside` come after them.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import aura_dist
from aura_dist.data.labels import check_texts, parse_labels
from aura_dist.data.table import read_table
from aura_dist.errors import AuraError, InputError


def openings(store: str, comments: str, number: int, words: int) -> list[str]:
    """`number` openings of `words` words, drawn (seed 0) from the toxic comments that have as many; at least one.

    A comment that stands in the file twice, once as a row of the store, has been seen too.
    """
    table = read_table(comments, ["text", "toxic"])
    texts = check_texts(table, "text")
    seen = {texts[row] for row in aura_dist.open_store(store)["samples"]["row"].values.tolist()}
    toxic = parse_labels(table, ["toxic"])[:, 0] == 1
    unseen = [text.split() for text, is_toxic in zip(texts, toxic, strict=True) if is_toxic and text not in seen]
    others = [" ".join(text[:words]) for text in unseen if len(text) >= words]
    if not others:
        raise InputError(
            f"data {comments!r}: expected toxic comments of at least {words} words that are not in {store!r}, got "
            "none; collect fewer (--num-positive), or give --words"
        )
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
        # not splitlines: JSON may hold other line breaks within a text
        lines += [line for line in Path(args.beside).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (AuraError, OSError) as error:
        sys.exit(f"error: {error}")
