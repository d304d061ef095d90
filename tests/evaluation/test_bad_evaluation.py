"""What a user can get wrong in an evaluation: exit code 2, one line, before a model is loaded, and nothing is left."""

import json
import re

import pytest

from aura_dist.cli import main
from tests.distributed.intervened import random_map

pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")

FILES = {
    "prompts.csv": "text\nYou are\nThey said\n",
    "others.csv": "text\nYou are\nWe said\n",
    "none.csv": "text\n",
    "none.jsonl": "",
    "empty.csv": 'text\nYou are\n"  "\n',
    "long.csv": "text\n" + "word " * 300 + "\n",
    "records.jsonl": '{"prompt": {"txt": "a"}}\n',
    "scores.csv": "text,toxicity\na,0.5\nb,high\n",
    "broken.json": "{",
    "alien.json": '{"perplexity": 3}',
    "space.txt": " \n",
    "one-side.csv": "text,rude\nYou are kind,1\nThey said it,1\nNobody knows,\n",
}
TOXICITY = "--toxicity-prompts {}/prompts.csv --scorer profanity-check --num-samples 2 --max-new-tokens 4"


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_dir):
    directory = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (directory / name).write_text(content)
    (directory / "tasks").mkdir()
    (directory / "tasks" / "mine.yaml").write_text(
        "task: my_sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: nowhere.jsonl\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    )
    arguments = TOXICITY.replace("{}", str(directory)).split()
    assert main(["evaluate", "--model", str(tiny_dir("llama")), *arguments, "--out", str(directory / "base.json")]) == 0
    return directory


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "expected at least one of --toxicity-prompts, --perplexity-texts and --tasks, got none"),
        ("--toxicity-prompts {}/none.csv", "none.csv': expected at least one row, got none"),
        ("--toxicity-prompts {}/none.jsonl", "none.jsonl': expected at least one row, got none"),
        ("--toxicity-prompts {}/nowhere.csv", "nowhere.csv': no such file"),
        ("--toxicity-prompts {}/empty.csv", "row 1: expected a text in 'text', got an empty one"),
        ("--toxicity-prompts {}/records.jsonl", "expected a column 'text', found prompt, prompt.txt"),
        ("--toxicity-prompts {}/prompts.csv --prompt-column body", "expected a column 'body', found text"),
        ("--toxicity-prompts {}/prompts.csv --prompt-toxicity-column t", "expected a column 't', found text"),
        ("--toxicity-prompts {}/scores.csv", "row 1: expected a number in 'toxicity', got 'high'"),
        (
            "--toxicity-prompts {}/long.csv --scorer profanity-check",
            "--max-new-tokens with the prompt: expected at most 256, the model's positions",
        ),
        ("--toxicity-prompts {}/prompts.csv --scorer {}/tasks", "cannot be loaded"),
        ("--toxicity-prompts {}/prompts.csv --num-samples 0", "--num-samples: expected an integer of at least 1"),
        ("--toxicity-prompts {}/prompts.csv --top-tokens -1", "--top-tokens: expected an integer of at least 0"),
        (TOXICITY + " --baseline {}/nowhere.json", "expected a JSON file as `evaluate` writes it"),
        (TOXICITY + " --baseline {}/broken.json", "expected a JSON file as `evaluate` writes it"),
        (TOXICITY + " --baseline {}/alien.json", "expected schema 1 as `evaluate` writes it, got None"),
        (TOXICITY.replace("/prompts", "/others") + " --baseline {}/base.json", "expected the same prompts in both"),
        (TOXICITY + " --seed 9 --baseline {}/base.json", "expected the same settings in both"),
        ("--tasks arc_eazy", "got 'arc_eazy'; did you mean arc_easy or "),
        ("--tasks my_sum --tasks-path {}/tasks", "got 'my_sum'; did you mean my_sums or "),
        ("--tasks my_sums --tasks-path {}/nowhere", "expected a directory of YAML tasks, found none"),
        ("--tasks my_sums --tasks-path {}/tasks", "lm-eval failed: "),
        ("--perplexity-texts {}/prompts.csv --perplexity-labels rude", "expected a column 'rude', found text"),
        (
            "--perplexity-texts {}/one-side.csv --perplexity-labels rude",
            "concept 'rude': expected rows of both classes, got 2 positive and 0 negative",
        ),
        ("--perplexity-texts {}/prompts.csv --limit 3", "--limit: expected it with --tasks, got it without"),
        ("--tasks arc_easy --baseline {}/base.json", "--baseline: expected it with --toxicity-prompts"),
        ("--perplexity-texts {}/prompts.csv --preprompt {}/space.txt", "got nothing but space"),
    ],
)  # fmt: skip
def test_settings(arguments, message, refused, files, tiny_dir, tmp_path):
    words = arguments.replace("{}", str(files)).split()
    refused(["evaluate", "--model", tiny_dir("llama"), *words, "--out", tmp_path / "r.json"], re.escape(message))
    assert list(tmp_path.iterdir()) == []


def test_default_scorer_without_a_network(refused, files, tiny_dir, tmp_path):
    command = ["evaluate", "--model", tiny_dir("llama"), "--toxicity-prompts", files / "prompts.csv"]
    refused([*command, "--out", tmp_path / "r.json"], "--scorer 's-nlp/roberta_toxicity_classifier' cannot be loaded: ")


def test_intervention_for_another_model(refused, files, tiny_dir, tmp_path):
    meta = {"model": {"name": "llama", "fingerprint": "0" * 64}}
    fitted = random_map(str(tiny_dir("llama")))
    type(fitted)(fitted.scale, fitted.shift, meta).save(tmp_path / "map")
    words = [
        *TOXICITY.replace("{}", str(files)).split(),
        "--intervention",
        tmp_path / "map",
        "--out",
        tmp_path / "r.json",
    ]
    refused(["evaluate", "--model", tiny_dir("llama"), *words], "was made for 'llama' .* fit one for this model")
    refused(["evaluate", "--model", tiny_dir("gpt2"), *words], "does not fit GPT2LMHeadModel")
    assert [p.name for p in tmp_path.iterdir()] == ["map"]


@pytest.mark.parametrize(
    ("arguments", "out", "message"),
    [
        ("--toxicity-prompts {}/p.jsonl", "p.jsonl", "would overwrite --toxicity-prompts '.*p.jsonl'"),
        (
            "--toxicity-prompts {}/r.continuations.jsonl",
            "r.json",
            "would overwrite --toxicity-prompts '.*/r.con",
        ),
        ("--perplexity-texts {}/p.jsonl", "same.jsonl", "would overwrite --perplexity-texts '.*p.jsonl'"),
        ("--toxicity-prompts {}/p.jsonl --baseline {}/base.json", "base.json", "would overwrite --baseline"),
        ("--perplexity-texts {}/p.jsonl --preprompt {}/kind.txt", "kind.txt", "would overwrite --preprompt"),
        ("--perplexity-texts {}/p.jsonl --intervention {}", "intervention.json", "`evaluate` did not write"),
        ("--perplexity-texts {}/p.jsonl --model {}", "config.json", "`evaluate` did not write"),
    ],
)
def test_out_is_none_of_its_inputs(arguments, out, message, refused, files, tmp_path, monkeypatch):
    """Nothing is loaded, and every file stays as it was."""
    monkeypatch.setattr("aura_dist.stages.evaluate.load_for_use", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("aura_dist.stages.evaluate.load_scorer", lambda *_: pytest.fail("the scorer was loaded"))
    for name in ("p.jsonl", "r.continuations.jsonl"):
        (tmp_path / name).write_text('{"text": "You are"}\n{"text": "They said"}\n')
    (tmp_path / "same.jsonl").symlink_to(tmp_path / "p.jsonl")
    (tmp_path / "base.json").write_text((files / "base.json").read_text())
    (tmp_path / "kind.txt").write_text("Be kind.\n")
    for name in ("intervention.json", "config.json"):
        (tmp_path / name).write_text('{"method": "aura"}')
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    words = ["--model", "m", "--scorer", "profanity-check", *arguments.replace("{}", str(tmp_path)).split()]
    words = words[2:] if words.count("--model") == 2 else words
    refused(["evaluate", *words, "--out", tmp_path / out], message)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_baseline_that_lost_a_part(refused, files, tiny_dir, tmp_path):
    document = json.loads((files / "base.json").read_text())
    del document["toxicity"]["settings"]
    (tmp_path / "base.json").write_text(json.dumps(document))
    words = [*TOXICITY.replace("{}", str(files)).split(), "--baseline", tmp_path / "base.json"]
    command = ["evaluate", "--model", tiny_dir("llama"), *words, "--out", tmp_path / "r.json"]
    refused(command, "--baseline .*: expected results with toxicity as `evaluate` writes them, got none of 'settings'")
