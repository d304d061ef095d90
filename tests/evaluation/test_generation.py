"""Continuations by any number of ranks, in any batches, after any interruption, are the same continuations."""

import json
import os
import signal
import time

import pytest
import torch

from aura_dist.cli import main
from aura_dist.evaluation.sampling import Decoding
from aura_dist.interventions.hooks import intervene
from tests.distributed.continued import agree, assert_same_but_for_ties, gap, parting, read
from tests.distributed.intervened import random_gates, random_map
from tests.distributed.launch import Launch, launched, run_ranks
from tests.models import tiny_causal, tiny_tokenizer

pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
pytestmark = pytest.mark.timeout(240)

STOP_ID, NUM_SAMPLES = 1, 4
HOW = Decoding(NUM_SAMPLES, 8, 1.0, 0.9, 5)
DECODING = ["--num-samples", str(NUM_SAMPLES), "--max-new-tokens", "8", "--seed", "5", "--scorer", "profanity-check"]
TEXTS = [f"{start} {'and more ' * (i % 4)}{i}" for i, start in enumerate(["You are", "They said", "The river"] * 12)]


@pytest.fixture(scope="module")
def prompts_csv(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    path.write_text("\n".join(["text,toxicity", *(f"{text},{i % 2}" for i, text in enumerate(TEXTS))]) + "\n")
    return str(path)


def intervention_of(name, tiny_dir):
    """One with gates, of Llama."""
    return (random_gates if name == "llama" else random_map)(str(tiny_dir(name)))


@pytest.fixture(scope="module")
def evaluate(tiny_dir, prompts_csv, tmp_path_factory):
    """`evaluate(name, out)`: the arguments of an evaluation under an intervention."""
    maps = {}

    def arguments(name, out, *more):
        if name not in maps:
            maps[name] = tmp_path_factory.mktemp("maps") / name
            intervention_of(name, tiny_dir).save(maps[name])
        model = ["--model", str(tiny_dir(name)), "--intervention", str(maps[name])]
        return ["evaluate", *model, "--toxicity-prompts", prompts_csv, *DECODING, "--out", str(out), *more]

    return arguments


@pytest.fixture(scope="module")
def alone(evaluate, tmp_path_factory):
    """Name of a model → results of one process."""
    out = tmp_path_factory.mktemp("alone")
    for name in ("llama", "gpt2", "mpt"):
        assert main(evaluate(name, out / f"{name}.json")) == 0
    return out


def figures(results):
    document = json.loads(results.read_text())
    return {k: v for k, v in document["toxicity"].items() if k != "continuations"}


def compare(got, alone, name, tiny_dir):
    tokenizer = tiny_tokenizer()
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    with intervene(tiny_causal(name), intervention_of(name, tiny_dir)) as model:
        mine, theirs = read(got), read(alone / f"{name}.json")
        assert_same_but_for_ties(mine, theirs, model, prompts, TEXTS, HOW, STOP_ID)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mpt"])
@pytest.mark.parametrize("rows", ["5", "1000"])
def test_batch_size_does_not_matter(name, rows, evaluate, alone, tiny_dir, tmp_path):
    assert main(evaluate(name, tmp_path / "r.json", "--continuations-per-batch", rows)) == 0
    compare(tmp_path / "r.json", alone, name, tiny_dir)


@pytest.mark.parametrize(
    ("num_ranks", "sharding", "name"),
    [
        (2, "replicate", "llama"),
        (2, "fsdp", "gpt2"),
        (2, "tensor", "mpt"),
        (2, "zero3", "llama"),
        (4, "tensor=2", "llama"),
    ],
)
def test_ranks_do_not_matter(num_ranks, sharding, name, evaluate, alone, tiny_dir, tmp_path):
    arguments = evaluate(name, tmp_path / "r.json", "--sharding", sharding, "--continuations-per-batch", "9")
    run_ranks(num_ranks, arguments)
    compare(tmp_path / "r.json", alone, name, tiny_dir)
    assert figures(tmp_path / "r.json")["overall"].keys() == figures(alone / f"{name}.json")["overall"].keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.continuations.jsonl", "r.json"]


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again(signal_number, evaluate, alone, tmp_path):
    arguments = evaluate("llama", tmp_path / "r.json", "--continuations-per-batch", "2")
    with launched(Launch(2, arguments)) as launch:
        while launch.is_running() and sum(map(num_lines, tmp_path.glob("*.part-*"))) < 20:
            time.sleep(0.01)
        for rank in launch.ranks():
            os.kill(rank.pid, signal_number)
        codes = launch.wait(60)
    assert set(codes) == {128 + signal.SIGTERM if signal_number == signal.SIGTERM else -signal.SIGKILL}
    parts = sorted(tmp_path.glob("*.part-*"))
    made = sum(map(num_lines, parts))
    assert 20 <= made < len(TEXTS) * NUM_SAMPLES, "it was in the middle"
    with parts[0].open("a") as file:
        file.write('{"settings": "torn')
    assert main(arguments) == 0
    assert figures(tmp_path / "r.json") == figures(alone / "llama.json")
    assert json.loads((tmp_path / "r.json").read_text())["seconds"]["num_generated"] == len(TEXTS) * NUM_SAMPLES - made
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.continuations.jsonl", "r.json"]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "r.json").read_text())["seconds"]["num_generated"] == 0


def num_lines(path):
    return path.read_bytes().count(b"\n")


def test_other_settings_are_not_gone_on_with(evaluate, tmp_path):
    figures_of = []
    for strength in ("1", "0.5"):
        assert main(evaluate("llama", tmp_path / "r.json", "--strength", strength)) == 0
        document = json.loads((tmp_path / "r.json").read_text())
        assert document["seconds"]["num_generated"] == len(TEXTS) * NUM_SAMPLES
        figures_of.append([r["ids"] for r in read(tmp_path / "r.json").values()])
    assert figures_of[0] != figures_of[1]


def test_more_samples_go_on_with_those_there(evaluate, tmp_path):
    assert main(evaluate("llama", tmp_path / "r.json")) == 0
    first = read(tmp_path / "r.json")
    again = evaluate("llama", tmp_path / "r.json")
    again[again.index("--num-samples") + 1] = str(NUM_SAMPLES + 1)
    assert main(again) == 0
    both = read(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["seconds"]["num_generated"] == len(TEXTS)
    assert {pair: both[pair]["ids"] for pair in first} == {pair: r["ids"] for pair, r in first.items()}


def test_ranks_of_a_row_worker_agree():
    run_ranks(4, ["fsdp=2,tensor=2"], agree)


def test_gap_tells_a_tie_from_what_is_none():
    """The check of near ties itself: equal choices have no gap, others have, and what cannot be drawn is no tie."""
    model, ids = tiny_causal("llama"), [0, 5, 9, 33]
    everything = Decoding(1, 4, 1.0, 1.0, 0)
    assert gap(model, ids, 3, 0, (7, 7), everything) == 0
    assert gap(model, ids, 3, 0, (7, 8), everything) > 1e-3
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    least = int(logits.argmin())
    assert gap(model, ids, 3, 0, (int(logits.argmax()), least), Decoding(1, 4, 1.0, 0.5, 0)) == float("inf")
    assert parting([1, 2], [1, 2], 0) is None
    assert parting([1, 2], [1], 0) == (1, 2, 0)
