"""Prompts that no fit sees: the first words of toxic comments that are kept out of it.

python configs/held_out_openings.py COMMENTS.csv OUT.jsonl --store STORE.zarr    # not among the store's rows
python configs/held_out_openings.py COMMENTS.csv OUT.jsonl --rest REST.csv       # before any store: fit on REST.csv

Further: [--number 150] [--words 10] [--beside RTP.jsonl]. COMMENTS.csv has the columns text and toxic. A line of OUT is
`{"prompt": {"text": …, "toxicity": 1.0}}`, as RealToxicityPrompts' are. The prompts of `--beside` come after them, with
their text and toxicity, null if that is not known.
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path

import numpy as np

import aura_dist
from aura_dist.errors import AuraError, InputError
from aura_dist.evaluation.prompts import PromptFile, read_prompts
from aura_dist.text.labels import check_texts, parse_labels
from aura_dist.text.table import Table, read_table


def opening(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def held_out(table: Table, seen: set[str], number: int, words: int) -> list[str]:
    """Openings of `number` toxic comments of at least `words` words, drawn with seed 0; at least one, each once.

    None of them is the opening of a comment that was `seen`.
    """
    texts = check_texts(table, "text")
    toxic = parse_labels(table, ["toxic"])[:, 0] == 1
    known = {opening(text, words) for text in seen}
    long = [t for t, is_toxic in zip(texts, toxic, strict=True) if is_toxic and len(t.split()) >= words]
    others = [one for one in dict.fromkeys(opening(text, words) for text in long) if one not in known]
    if not others:
        raise InputError(
            f"data {table.source!r}: expected toxic comments of at least {words} words that are not in the store, got "
            "none; collect fewer (--num-positive), or give --words"
        )
    chosen = np.random.default_rng(0).permutation(len(others))[:number]
    return [others[i] for i in chosen]


def write_rest(table: Table, taken: set[str], words: int, path: str) -> None:
    """The comments whose openings are not `taken`, with their labels."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "toxic"])
        pairs = zip(table.columns["text"], table.columns["toxic"], strict=True)
        writer.writerows(pair for pair in pairs if opening(pair[0], words) not in taken)


def read_records(path: str) -> PromptFile:
    """The prompts of a file of JSON lines; InputError for another kind of file, or as `read_prompts` raises it."""
    if Path(path).suffix.lower() not in (".jsonl", ".json", ".ndjson"):
        raise InputError(
            f"data {path!r}: expected prompts as JSON lines, such as RealToxicityPrompts' own, in a .jsonl"
        )
    return read_prompts(path, "prompt.text", None)


def write_prompts(texts: list[str], beside: str | None, out: Path) -> None:
    """Write the openings as prompts, and those of the file `beside` after them; raises as `read_records` does.

    A prompt without a toxicity gets null, because `evaluate` wants the key in all lines of a file, or in none.
    """
    prompts: list[tuple[str, float | None]] = [(text, 1.0) for text in texts]
    if beside:
        found = read_records(beside)
        known = (None if math.isnan(value) else value for value in found.toxicity.tolist())
        prompts += zip(found.texts, known, strict=True)
    lines = [json.dumps({"prompt": {"text": text, "toxicity": toxicity}}) for text, toxicity in prompts]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("comments", "out"):
        parser.add_argument(name)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--store")
    how.add_argument("--rest")
    parser.add_argument("--number", type=int, default=150)
    parser.add_argument("--words", type=int, default=10)
    parser.add_argument("--beside")
    args = parser.parse_args()
    table = read_table(args.comments, ["text", "toxic"])
    seen: set[str] = set()
    if args.store:
        store = aura_dist.open_store(args.store)
        if store.attrs["data"]["sha256"] != table.sha256:
            raise InputError(f"{args.comments}: expected the file that {args.store} was collected from, got another")
        rows = store["samples"]["row"].values.tolist()
        seen = {table.columns["text"][row] for row in rows}
    taken = held_out(table, seen, args.number, args.words)
    write_prompts(taken, args.beside, Path(args.out))
    if args.rest:
        write_rest(table, set(taken), args.words, args.rest)


if __name__ == "__main__":
    try:
        main()
    except (AuraError, OSError) as error:
        sys.exit(f"error: {error}")
