"""Ranks share an evaluation: the figures are those of one process, and no file, text or request is taken twice."""

import json
import re

import pytest

from aura_dist.cli import main
from tests.distributed.counted import run_counted, run_failing
from tests.distributed.intervened import random_gates, random_map
from tests.distributed.launch import Launch, launched, run_ranks

pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")
pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
pytestmark = pytest.mark.timeout(240)

NUM_TEXTS, NUM_PROMPTS, NUM_DOCUMENTS = 40, 6, 7


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Texts of many lengths, some longer than a batch; prompts; one task."""
    directory = tmp_path_factory.mktemp("files")
    texts = [f"{'A river runs to the sea. ' * (1 + i % 9)}{i},{i % 2}" for i in range(NUM_TEXTS)]
    (directory / "texts.csv").write_text("\n".join(["text,toxic", *texts]) + "\n")
    (directory / "prompts.csv").write_text("\n".join(["text", *(f"You are {i}" for i in range(NUM_PROMPTS))]) + "\n")
    rows = [{"question": f"{a} and 2 make", "choices": [str(a + 2), "none"], "answer": a % 2} for a in range(7)]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "few_sums.yaml").write_text(
        "task: few_sums\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {directory / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    return directory


@pytest.fixture(scope="module")
def evaluate(tiny_dir, files, tmp_path_factory):
    """`evaluate(name, out)`: arguments of an evaluation; under an intervention, if hooks reach the model.

    That of llama has gates.
    """
    maps = {}

    def arguments(name, out, *more):
        if name not in maps:
            maps[name] = tmp_path_factory.mktemp("maps") / name
            made = random_gates if name == "llama" else random_map
            made(str(tiny_dir(name))).save(maps[name])
        what = ["--model", tiny_dir(name), "--preprompt", "Be kind."]
        what += ["--intervention", maps[name]] if name != "jamba" else []
        what += ["--perplexity-texts", files / "texts.csv", "--perplexity-labels", "toxic", "--tokens-per-batch", "48"]
        what += ["--tasks", "few_sums", "--tasks-path", files, "--out", out]
        return ["evaluate", *map(str, what), *more]

    return arguments


@pytest.fixture(scope="module")
def alone(evaluate, tmp_path_factory):
    """`alone(name)`: the results of one process."""
    out = tmp_path_factory.mktemp("alone")

    def results(name, *more):
        path = out / f"{name}{'-'.join(more)}.json"
        if not path.exists():
            assert main(evaluate(name, path, *more)) == 0
        return json.loads(path.read_text())

    return results


@pytest.mark.parametrize(
    ("num_ranks", "sharding", "name"),
    [
        (2, "replicate", "llama"),
        (2, "fsdp", "gpt2"),
        (2, "zero3", "llama"),
        (4, "tensor=2", "llama"),
        (2, "fsdp", "jamba"),
    ],
)
def test_ranks_measure_what_one_process_does(num_ranks, sharding, name, evaluate, alone, tmp_path):
    effects = [] if name == "jamba" else ["--side-effects"]
    run_ranks(num_ranks, evaluate(name, tmp_path / "r.json", "--sharding", sharding, *effects))
    found, expected = json.loads((tmp_path / "r.json").read_text()), alone(name, *effects)
    if name == "llama":
        assert found["side_effects"]["gates"] == expected["side_effects"]["gates"]
        assert expected["side_effects"]["gates"]["open_texts"] > 0
    for key, value in expected.get("side_effects", {}).get("divergence", {}).items():
        assert found["side_effects"]["divergence"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert found["zero_shot"] == expected["zero_shot"]
    one, other = found["perplexity"], expected["perplexity"]
    if sharding == "replicate":
        assert one == other, "each batch is the same computation, whoever runs it"
    for part in ("positive", "negative"):
        assert one.pop(part) == pytest.approx(other.pop(part), rel=1e-6)
    texts, others = one.pop("per_text"), other.pop("per_text")
    assert texts["num_tokens"] == others["num_tokens"]
    assert texts["negative_log_likelihood"] == pytest.approx(others["negative_log_likelihood"], rel=1e-6)
    assert one.keys() == other.keys()
    for key, value in other.items():
        assert one[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), key


@pytest.mark.parametrize("sharding", ["replicate", "fsdp"])
def test_fewer_texts_and_documents_than_ranks(sharding, evaluate, files, tmp_path):
    (tmp_path / "one.csv").write_text("text\nA river runs to the sea.\n")

    def results(name, run, *more):
        arguments = evaluate("llama", tmp_path / name, "--limit", "1", *more)
        arguments[arguments.index(str(files / "texts.csv"))] = str(tmp_path / "one.csv")
        labels = arguments.index("--perplexity-labels")
        run(arguments[:labels] + arguments[labels + 2 :])
        return json.loads((tmp_path / name).read_text())

    expected = results("alone.json", main)
    found = results("ranks.json", lambda arguments: run_ranks(2, arguments), "--sharding", sharding)
    assert found["zero_shot"] == expected["zero_shot"]
    one, other = found["perplexity"], expected["perplexity"]
    assert one["num_texts"] == 1
    assert one["token_weighted"] == pytest.approx(other["token_weighted"], rel=1e-6)


def test_nothing_is_read_or_computed_twice(evaluate, files, tmp_path):
    prompts = ["--toxicity-prompts", str(files / "prompts.csv"), "--scorer", "profanity-check", "--num-samples", "1"]
    arguments = evaluate("llama", tmp_path / "r.json", *prompts, "--max-new-tokens", "2")
    run_ranks(2, [str(tmp_path), *arguments], run_counted)
    both = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    together = {kind: both[0][kind] + both[1][kind] for kind in both[0]}
    assert together["read"].count(str(files / "texts.csv")) == 1
    assert len(together["tokenized"]) == NUM_TEXTS + NUM_PROMPTS
    rows = sorted(row for start, stop, piece in together["rows"] if piece == 0 for row in range(start, stop))
    assert rows == list(range(NUM_TEXTS))
    assert len({tuple(turn) for turn in together["rows"]}) == len(together["rows"])
    assert max(piece for _, _, piece in together["rows"]) > 0, "some texts are read in pieces"
    assert sorted(together["requests"]) == [[d, choice] for d in range(NUM_DOCUMENTS) for choice in range(2)]
    assert all(noted["requests"] for noted in both)


@pytest.mark.parametrize("part", ["texts", "tasks"])
def test_rank_that_fails_in_the_middle_ends_the_evaluation(part, evaluate, tmp_path):
    with launched(Launch(2, [part, *evaluate("llama", tmp_path / "r.json")], run_failing)) as launch:
        assert launch.wait(200) == [2, 2], launch.text()
        errors = re.findall(r"error: .*", launch.text())  # it may follow a progress bar on the same line
    assert errors == ["error: this rank has had enough"]
    assert list(tmp_path.iterdir()) == []


def test_error_in_a_data_file_is_said_once(evaluate, files, tmp_path):
    (tmp_path / "texts.csv").write_text('text,toxic\n"  ",1\nGood.,0\n')
    arguments = evaluate("llama", tmp_path / "r.json")
    arguments[arguments.index(str(files / "texts.csv"))] = str(tmp_path / "texts.csv")
    with launched(Launch(2, arguments)) as launch:
        assert launch.wait(200) == [2, 2], launch.text()
        errors = re.findall(r"error: .*", launch.text())
    assert len(errors) == 1
    assert errors[0].endswith("row 0: expected a text in 'text', got an empty one")
    assert [p.name for p in tmp_path.iterdir()] == ["texts.csv"]
