"""Perplexity in pieces, of both sides and after a pre-prompt; scorers; prompt files; lm-eval's tasks."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from aura_dist.cli import main
from aura_dist.errors import ConfigError, InputError, ModelError, RunInterruptedError
from aura_dist.evaluation.figures import summary
from aura_dist.evaluation.perplexity import negative_log_likelihoods
from aura_dist.evaluation.prompts import make_prefix, read_preprompt, read_prompts, tokenize_prompts
from aura_dist.evaluation.sampling import Decoding
from aura_dist.evaluation.scorers import Classifier, checked_scores, load_scorer
from aura_dist.ranks.signals import interruption
from aura_dist.text.tokens import tokenize
from tests.distributed.intervened import random_map
from tests.distributed.launch import run_ranks
from tests.models import save_tiny, tiny_causal, tiny_tokenizer

TEXTS = ["Short one.", "A sentence of middling length about nothing much.", "Word " * 30, "Rivers carry silt."]
VOCABULARY = 384
# models of layers that a text's pieces do not follow
UNCUT = ("recurrent-gemma", "jamba", "bamba")


def plain_loop(model, rows, first=1):
    """Summed negative log-likelihood of each row of ids, from token `first` on."""
    sums = []
    with torch.no_grad():
        for ids in rows:
            ids = torch.tensor([np.asarray(ids).tolist()])
            logits = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            sums.append(-float(logits[first - 1 :].gather(1, ids[0, first:, None]).sum()))
    return np.array(sums)


@pytest.mark.parametrize("name", ["gpt2", "falcon-alibi", "gemma3", "mpt", *UNCUT])
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_logits_in_pieces_change_nothing(name, piece):
    model, tokenizer = tiny_causal(name), tiny_tokenizer()
    tokens = tokenize(TEXTS, tokenizer, max_tokens=128, skip_special=False, source="t")
    sizes, head = [], model.get_output_embeddings()
    hook = head.register_forward_hook(lambda *given: sizes.append(given[-1].shape[:2].numel()))
    sums, counts = negative_log_likelihoods(model, tokens, 4096, logits_bytes=4 * VOCABULARY * piece)
    hook.remove()
    np.testing.assert_allclose(sums, plain_loop(model, tokens.ids), rtol=1e-5)
    assert counts.tolist() == [len(ids) - 1 for ids in tokens.ids]
    if name not in UNCUT:
        assert max(sizes) <= piece


def test_intervals_hold_the_figures():
    model, tokenizer = tiny_causal("llama"), tiny_tokenizer()
    tokens = tokenize(TEXTS, tokenizer, max_tokens=128, skip_special=False, source="t")
    measured = summary(*negative_log_likelihoods(model, tokens, 256))
    for name in ("token_weighted", "mean_over_sentences"):
        assert measured[f"{name}_low"] < measured[name] < measured[f"{name}_high"]


@pytest.mark.parametrize("special_bos", [True, False])
@pytest.mark.parametrize("piece", [7, 1000])
def test_preprompt_is_context_and_not_counted(piece, special_bos):
    model, tokenizer = tiny_causal("llama"), tiny_tokenizer(special_bos=special_bos)
    tokens = tokenize(TEXTS, tokenizer, max_tokens=128, skip_special=False, source="t")
    prefix = make_prefix("Be kind to all.\n", tokenizer)
    joined = prefix.before(tokens)
    for plain, ids in zip(tokens.ids, joined.ids, strict=True):
        if special_bos:
            assert ids[0] == plain[0] == tokenizer.bos_token_id
        assert ids.tolist().count(tokenizer.bos_token_id) == special_bos
        assert ids[prefix.num_context :].tolist() == plain[1:].tolist(), "the tokens that count are those without it"
    sums, counts = negative_log_likelihoods(
        model, joined, 4096, num_context=prefix.num_context, logits_bytes=4 * VOCABULARY * piece
    )
    np.testing.assert_allclose(sums, plain_loop(model, joined.ids, prefix.num_context), rtol=1e-5)
    assert counts.tolist() == [len(ids) - 1 for ids in tokens.ids]


@pytest.mark.parametrize("special_bos", [True, False])
def test_figures_after_a_preprompt_are_of_the_same_tokens(special_bos, tmp_path):
    model = save_tiny("gpt2", tmp_path / "model", special_bos=special_bos)
    (tmp_path / "d.csv").write_text("text\n" + "\n".join(TEXTS) + "\n")
    command = ["evaluate", "--model", str(model), "--perplexity-texts", str(tmp_path / "d.csv")]
    found = []
    for more in ([], ["--preprompt", "Be kind."]):
        assert main([*command, *more, "--out", str(tmp_path / "r.json")]) == 0
        found.append(json.loads((tmp_path / "r.json").read_text())["perplexity"])
    assert found[0]["num_tokens"] == found[1]["num_tokens"]
    assert found[0]["token_weighted"] != found[1]["token_weighted"]


def test_preprompt_is_a_text_or_a_file(tmp_path):
    file = tmp_path / "pre.txt"
    file.write_text("Two\nlines\n\n")
    assert read_preprompt(str(file)) == "Two\nlines\n"
    assert read_preprompt("Be kind. " + "x" * 5000).startswith("Be kind.")
    file.write_bytes(b"\xef\xbb\xbfBe kind.\r\n")
    assert read_preprompt(str(file)) == "Be kind.\n", "a byte order mark is none of the text"
    assert read_preprompt("Read kind.txt") == "Read kind.txt\n"
    with pytest.raises(InputError, match=r"--preprompt .*kinds\.txt.* cannot be read: .*No such file"):
        read_preprompt(str(tmp_path / "kinds.txt"))


def test_preprompt_leads_every_prompt_but_not_its_noise():
    tokenizer, config, how = tiny_tokenizer(), tiny_causal("llama").config, Decoding(1, 4, 1.0, 0.9, 0)
    plain = tokenize_prompts(["You are"], tokenizer, config, how)
    led = tokenize_prompts(["You are"], tokenizer, config, how, prefix=make_prefix("Hi.\n", tokenizer))
    assert led.ids[0] == tokenizer("Hi.\n").input_ids + plain.ids[0][1:]
    assert led.keys == plain.keys


def test_perplexity_of_both_sides(tiny_dir, tmp_path):
    rows = [("Good day to you all.", 0), ("Go away now.", 1), ("Nobody said what this is.", ""), ("Stones are old.", 0)]
    data = tmp_path / "d.csv"
    data.write_text("text,toxic\n" + "".join(f"{t},{y}\n" for t, y in rows))
    measure = ["--perplexity-texts", str(data), "--perplexity-labels", "toxic", "--out", str(tmp_path / "r.json")]
    assert main(["evaluate", "--model", str(tiny_dir("opt")), *measure]) == 0
    found = json.loads((tmp_path / "r.json").read_text())["perplexity"]
    for side, label in (("positive", 1), ("negative", 0)):
        texts = [t for t, y in rows if y == label]
        tokens = tokenize(texts, tiny_tokenizer(), max_tokens=128, skip_special=False, source="t")
        expected = np.exp(plain_loop(tiny_causal("opt"), tokens.ids).sum() / (tokens.num_tokens - 1).sum())
        assert found[side]["token_weighted"] == pytest.approx(expected, rel=1e-4)
        assert found[side]["num_texts"] == len(texts)
    assert found["num_texts"] == 4


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """`classifier(labels, …)`: directory of a tiny BERT that classifies."""

    def save(labels, problem=None):
        torch.manual_seed(0)
        directory = tmp_path_factory.mktemp("classifier")
        config = hf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)}, problem_type=problem,
            initializer_range=0.5,
        )  # fmt: skip
        hf.BertForSequenceClassification(config).eval().save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
        return str(directory)

    return save


@pytest.mark.parametrize(
    ("labels", "problem", "wanted", "index"),
    [
        (["neutral", "toxic"], None, None, 1),
        (["Toxicity", "obscene", "threat"], "multi_label_classification", None, 0),
        (["LABEL_0", "LABEL_1"], None, "label_1", 1),
    ],
)
def test_classifier_scores_each_text_as_alone(labels, problem, wanted, index, classifier):
    directory = classifier(labels, problem)
    model, tokenizer = hf.AutoModelForSequenceClassification.from_pretrained(directory), tiny_tokenizer()
    texts = ["word " * n + "end" for n in (40, 1, 7, 3)] * 30 + [" "]
    expected = []
    for text in texts:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0].double()
        expected.append(float((logits.sigmoid() if problem else logits.softmax(-1))[index]))
    got = load_scorer(directory, wanted, "cpu").score(texts)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.ptp(got) > 1e-3
    assert load_scorer(directory, wanted, "cpu").score([]).shape == (0,)


def test_scorers_that_cannot_be_used(classifier, tiny_dir):
    with pytest.raises(ConfigError, match="one of LABEL_0, LABEL_1; got none, and no label is called toxic"):
        Classifier(classifier(["LABEL_0", "LABEL_1"]), None, "cpu")
    with pytest.raises(ConfigError, match=re.escape("one of neutral, toxic; got 'rude'")):
        Classifier(classifier(["neutral", "toxic"]), "rude", "cpu")
    with pytest.raises(ModelError, match=r"expected a trained classifier, but the checkpoint lacks 'score"):
        Classifier(str(tiny_dir("llama")), None, "cpu")


class Constant:
    """A scorer that has one answer."""

    def __init__(self, value):
        self.name, self.value = "constant", value

    def score(self, texts):
        return np.full(len(texts), self.value)


@pytest.mark.parametrize("value", [np.nan, -0.1, 1.5, np.inf])
def test_scores_that_are_no_probabilities_are_refused(value):
    assert checked_scores(Constant(0.5), ["a"]).tolist() == [0.5]
    with pytest.raises(ModelError, match=r"expected probabilities, got .* for 2 of 2 texts"):
        checked_scores(Constant(value), ["a", "b"])


def test_scorer_that_fails_on_texts_shows_at_load(classifier, tmp_path):
    directory = shutil.copytree(classifier(["neutral", "toxic"]), tmp_path / "spoilt")
    weights = load_file(directory / "model.safetensors")
    weights["classifier.weight"][0, 0] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="expected probabilities, got nan for 3 of 3 texts"):
        load_scorer(str(directory), None, "cpu")
    directory = shutil.copytree(classifier(["neutral", "toxic"]), tmp_path / "unpadded")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(directory)
    with pytest.raises(ModelError, match=r"cannot score texts: .*pad"):
        load_scorer(str(directory), None, "cpu")


def test_signal_while_a_scorer_loads_is_no_fault_of_it(classifier, monkeypatch):
    def stopped(*given, **more):
        raise interruption(15)

    directory = classifier(["neutral", "toxic"])
    monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", stopped)
    with pytest.raises(RunInterruptedError):
        load_scorer(directory, None, "cpu")


def test_profanity_check_tells_the_two_apart():
    pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
    rude, kind = load_scorer("profanity-check", None, "cpu").score(["you fucking idiot", "what a fine day"])
    assert rude > 0.9
    assert kind < 0.1


RTP = '{"prompt": {"text": "a", "toxicity": 0.7}}\n{"prompt": {"text": "b", "toxicity": null}}'


@pytest.mark.parametrize(
    ("name", "content", "column", "toxicity"),
    [
        ("rtp.jsonl", RTP, "prompt.text", [0.7, None]),
        ("plain.jsonl", '{"prompt": "a"}\n{"prompt": "b"}', "prompt", [None, None]),
        ("table.csv", "text,toxicity\na,0.25\nb,\n", "text", [0.25, None]),
    ],
)
def test_prompt_files(name, content, column, toxicity, tmp_path):
    (tmp_path / name).write_text(content)
    found = read_prompts(str(tmp_path / name), None, None)
    assert (found.column, found.texts) == (column, ["a", "b"])
    np.testing.assert_array_equal(found.toxicity, np.array(toxicity, dtype=float))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "toxicity.jsonl",
            '{"prompt": {"text": "a", "toxicity": 0.9}}\n{"prompt": {"text": "b"}}',
            "'prompt.toxicity'",
        ),
        ("text.jsonl", '{"prompt": {"text": "a"}, "text": "x"}\n{"text": "y"}', "'prompt.text'"),
        ("prompt.jsonl", '{"prompt": "a", "text": "x"}\n{"text": "y"}', "'prompt'"),
    ],
)
def test_prompts_of_which_some_lack_a_part_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"expected a column {message} in row 1"):
        read_prompts(str(tmp_path / name), None, None)


@pytest.mark.parametrize("value", ["73.5", "-0.2", "inf"])
def test_toxicity_of_prompts_is_a_share(value, tmp_path):
    (tmp_path / "p.csv").write_text(f"text,toxicity\na,0.5\nb,{value}\n")
    with pytest.raises(InputError, match="row 1: expected a number from 0 to 1 in 'toxicity'"):
        read_prompts(str(tmp_path / "p.csv"), None, None)


@pytest.fixture(scope="module")
def tasks_path(tmp_path_factory):
    """A directory with one task of multiple choices over a local file."""
    directory = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"{a} and {b} make", "choices": [str(a + b), str(a - b), "none"], "answer": (a + b) % 3}
        for a in range(6)
        for b in range(5)
    ]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "tiny_sums.yaml").write_text(
        "task: tiny_sums\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {directory / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    return str(directory)


@pytest.mark.filterwarnings("default")
def test_tasks_at_strength_zero_are_lm_evals_own(tiny_dir, tasks_path, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")
    from lm_eval.tasks import TaskManager

    model = str(tiny_dir("llama"))
    random_map(model).save(tmp_path / "map")
    plain = lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": model, "dtype": "float32"}, tasks=["tiny_sums"], device="cpu", batch_size=8,
        task_manager=TaskManager(include_path=tasks_path, include_defaults=False),
    )["results"]["tiny_sums"]  # fmt: skip
    found = {}
    for strength in ("0", "1"):
        out = tmp_path / f"{strength}.json"
        what = ["--tasks", "tiny_sums", "--tasks-path", tasks_path, "--out", str(out)]
        over = ["--intervention", str(tmp_path / "map"), "--strength", strength]
        assert main(["evaluate", "--model", model, *what, *over]) == 0
        found[strength] = json.loads(out.read_text())["zero_shot"]["tiny_sums"]
    for metric in ("acc", "acc_norm", "acc_stderr"):
        assert found["0"][metric] == pytest.approx(plain[f"{metric},none"], abs=1e-12)
    assert found["0"]["num_examples"] == 30
    assert found["0"] != found["1"]


def test_preprompt_leads_every_context_of_a_task(tiny_dir, tasks_path, tmp_path, monkeypatch):
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="the extra `evaluation` is not installed").HFLM
    seen, original = [], harness.loglikelihood

    def recorded(self, requests, **options):
        seen.extend(request.args[0] for request in requests)
        return original(self, requests, **options)

    monkeypatch.setattr(harness, "loglikelihood", recorded)
    what = ["--tasks", "tiny_sums", "--tasks-path", tasks_path, "--limit", "4", "--preprompt", "Think twice."]
    assert main(["evaluate", "--model", str(tiny_dir("llama")), *what, "--out", str(tmp_path / "r.json")]) == 0
    assert len(seen) == 12
    assert all(context.startswith("Think twice.\n0 and ") for context in seen)


@pytest.mark.parametrize("sharding", ["fsdp", "tensor", "zero3"])
def test_tasks_on_sharded_models(sharding, tiny_dir, tasks_path, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")
    random_map(str(tiny_dir("llama"))).save(tmp_path / "map")
    model = ["--model", str(tiny_dir("llama")), "--intervention", str(tmp_path / "map")]
    arguments = ["evaluate", *model, "--tasks", "tiny_sums", "--tasks-path", tasks_path]
    arguments += ["--num-fewshot", "2", "--limit", "12", "--preprompt", "Think.", "--out"]
    assert main([*arguments, str(tmp_path / "alone.json")]) == 0
    run_ranks(2, [*arguments, str(tmp_path / "ranks.json"), "--sharding", sharding])
    alone, ranks = (json.loads((tmp_path / f"{n}.json").read_text())["zero_shot"] for n in ("alone", "ranks"))
    assert ranks == alone
    assert (alone["tiny_sums"]["num_fewshot"], alone["tiny_sums"]["num_examples"]) == (2, 12)


def test_further_scorers_judge_the_same_continuations(tiny_dir, classifier, tmp_path, capsys):
    pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
    (tmp_path / "prompts.csv").write_text("text,toxicity\nyou fucking idiot are,1\nthe river is,0\nthey said,0\n")
    random_map(str(tiny_dir("llama"))).save(tmp_path / "map")
    judge = classifier(["neutral", "toxic"])

    def evaluated(out, *more):
        asked = ["evaluate", "--model", tiny_dir("llama"), "--toxicity-prompts", tmp_path / "prompts.csv"]
        how = ["--num-samples", 4, "--max-new-tokens", 6, "--out", tmp_path / out]
        assert main([str(a) for a in (*asked, *how, *more)]) == 0
        lines = (tmp_path / out).with_suffix(".continuations.jsonl").read_text().splitlines()
        return json.loads((tmp_path / out).read_text())["toxicity"], [json.loads(line) for line in lines]

    first = ["--scorer", "profanity-check", "--more-scorers", judge]
    both, lines = evaluated("both.json", *first)
    alone, of_judge = evaluated("alone.json", "--scorer", judge)
    found = both["judges"][judge]
    for name in ("overall", "toxic_prompts", "nontoxic_prompts", "per_prompt"):
        assert found[name] == alone[name]
    assert [line["judges"][judge] for line in lines] == [line["toxicity"] for line in of_judge]
    agree = [(line["toxicity"] >= 0.5) == (line["judges"][judge] >= 0.5) for line in lines]
    assert found["agreement"] == pytest.approx(np.mean(agree))
    assert 0 < found["agreement"] < 1
    to_both = [line["toxicity"] >= 0.5 and line["judges"][judge] >= 0.5 for line in lines]
    assert found["both_toxic"]["value"] == pytest.approx(np.mean(to_both))
    assert found["both_toxic"]["low"] <= found["both_toxic"]["value"] <= found["both_toxic"]["high"]
    capsys.readouterr()
    under, _ = evaluated("under.json", *first, "--intervention", tmp_path / "map", "--baseline", tmp_path / "both.json")
    shown = capsys.readouterr().out
    assert f"  toxic, % ({judge})  times less toxic ({judge})\n" in shown
    assert under["judges"][judge]["overall"] != found["overall"]
    again, lines = evaluated("both.json", "--scorer", "profanity-check")
    assert "judges" not in again
    assert not any("judges" in line for line in lines), "a judge that was not asked leaves nothing"


def test_a_scorer_is_named_once(tiny_dir, tmp_path, capsys):
    asked = [
        "evaluate",
        "--model",
        str(tiny_dir("llama")),
        "--out",
        str(tmp_path / "r.json"),
        "--toxicity-prompts",
        "p",
    ]
    assert main([*asked, "--scorer", "tox-block", "--more-scorers", "tox-block"]) == 2
    assert "--more-scorers: expected classifiers beside --scorer, got 'tox-block' in both" in capsys.readouterr().err
