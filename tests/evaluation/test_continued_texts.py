"""Nothing stands where a text is continued: prompts, pre-prompts, chats, and lm-eval's tasks."""

import json

import pytest
import torch
import transformers as hf

from aura_dist.cli import main
from aura_dist.errors import ConfigError
from aura_dist.evaluation.perplexity import read_texts, tokenize_texts
from aura_dist.evaluation.prompts import chat_of_prompts, make_prefix, tokenize_prompts
from aura_dist.evaluation.sampling import Decoding
from tests.evaluation.test_measurements import plain_loop
from tests.models import tiny_causal, tiny_tokenizer
from tests.special_tokens import ADDED, CHATML, GEMMA, IDS, LLAMA_3, adding, saved, wordpiece

PROMPT, PREPROMPT = "You are such a", "Be nice."
HOW = Decoding(num_samples=1, max_new_tokens=8, temperature=0.0, top_p=1.0, seed=0)


@pytest.fixture(scope="module")
def model():
    return tiny_causal("llama")


@pytest.fixture(scope="module")
def ended(model, tmp_path_factory):
    """A model whose tokenizer adds <bos> and <eos>, and has a chat template that takes no system's turn."""
    tokenizer = adding("both")
    tokenizer.chat_template = GEMMA
    return saved(model, tokenizer, tmp_path_factory.mktemp("ended"))


def greedy(model, ids, count=8):
    made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count, eos_token_id=IDS["<eos>"])
    return made[0, len(ids) :].tolist()


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", [*ADDED, "wordpiece"])
def test_prompts_begin_once_and_do_not_end(kind, model):
    tokenizer = wordpiece() if kind == "wordpiece" else adding(kind)
    first = {"first": [0], "both": [0], "wordpiece": [0], "two first": [2, 0]}.get(kind, [])
    begun = {"wordpiece": "[CLS]", "two first": "<pad><bos>", "first": "<bos>", "both": "<bos>"}.get(kind, "")
    own, before = bare(tokenizer, PROMPT), bare(tokenizer, f"{PREPROMPT}\n")
    texts = [PROMPT, begun + PROMPT]
    plain = tokenize_prompts(texts, tokenizer, model.config, HOW)
    assert plain.ids == [first + own] * 2
    for preprompt in (f"{PREPROMPT}\n", f"{begun}{PREPROMPT}\n"):
        prefix = make_prefix(preprompt, tokenizer)
        led = tokenize_prompts(texts, tokenizer, model.config, HOW, prefix=prefix)
        assert led.ids == [first + before + own] * 2
    alone = tokenize_prompts([PROMPT], tokenizer, model.config, HOW)
    assert (alone.changed is None) == (kind in ("first", "two first", "none")), "else old continuations would stay"
    assert (plain.changed is None) == (kind == "none")


@pytest.mark.parametrize("preprompt", [None, "Be nice.\n"])
@pytest.mark.parametrize("template", [LLAMA_3, CHATML])
def test_prompts_of_chats_open_the_answer(template, preprompt, model):
    tokenizer = adding("both")
    tokenizer.chat_template = template
    turns = [{"role": "system", "content": "Be nice."}] * (preprompt is not None)
    whole = tokenizer.apply_chat_template(
        [*turns, {"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )
    expected = whole if whole[0] == IDS["<bos>"] else [IDS["<bos>"], *whole]
    made = tokenize_prompts(
        [PROMPT, f"<bos>{PROMPT}"], tokenizer, model.config, HOW, chat=chat_of_prompts(tokenizer, preprompt)
    )
    assert made.ids == [expected] * 2
    assert made.changed is not None


@pytest.mark.parametrize("options", [[], ["--preprompt", PREPROMPT], ["--chat"]], ids=["plain", "preprompt", "chat"])
def test_continuations_are_those_of_transformers(options, ended, model, tmp_path, capsys):
    tokenizer = hf.AutoTokenizer.from_pretrained(ended)
    before = bare(tokenizer, f"{PREPROMPT}\n") if "--preprompt" in options else []
    ids = [IDS["<bos>"], *before, *bare(tokenizer, PROMPT)]
    if "--chat" in options:
        turns = [{"role": "user", "content": PROMPT}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    expected = greedy(model, ids)
    greedily = ["--model", ended, "--temperature", "0", "--max-new-tokens", "8", *options]
    assert main(["generate", *greedily, "--prompt", PROMPT]) == 0
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert f"|{' '.join(text.splitlines())}\n" in capsys.readouterr().out
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
    asked = ["--toxicity-prompts", str(tmp_path / "p.jsonl"), "--scorer", "profanity-check", "--num-samples", "1"]
    assert main(["evaluate", *greedily, *asked, "--out", str(tmp_path / "r.json")]) == 0
    line = json.loads((tmp_path / "r.continuations.jsonl").read_text())
    assert line["ids"] == expected
    results = json.loads((tmp_path / "r.json").read_text())
    assert ("chat" in results, results["toxicity"]["settings"].get("chat", False)) == ("--chat" in options,) * 2


def test_a_chat_is_not_compared_with_plain_prompts(ended, tmp_path, refused):
    pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    asked = ["--toxicity-prompts", str(tmp_path / "p.jsonl"), "--scorer", "profanity-check", "--num-samples", "1"]
    command = ["evaluate", "--model", ended, *asked, "--max-new-tokens", "2", "--out"]
    assert main([*command, str(tmp_path / "plain.json")]) == 0
    kept = (tmp_path / "plain.continuations.jsonl").read_text()
    assert main([*command, str(tmp_path / "plain.json")]) == 0
    assert (tmp_path / "plain.continuations.jsonl").read_text() == kept, "the same prompts go on where they were"
    chat = [*command, str(tmp_path / "chat.json"), "--chat"]
    refused([*chat, "--baseline", str(tmp_path / "plain.json")], "expected the same settings in both")
    refused([*chat, "--preprompt", "Hi."], "--preprompt: .* refuses a system's turn: .*; leave --preprompt out")
    texts = ["--perplexity-texts", str(tmp_path / "p.jsonl"), "--text-column", "prompt"]
    refused(
        ["evaluate", "--model", ended, *texts, "--chat", "--out", str(tmp_path / "x.json")], "--chat: expected it wi"
    )


def test_perplexity_is_of_the_texts_own_tokens(model, tmp_path):
    (tmp_path / "t.csv").write_text("text\nthe cat sat on the mat\n<bos>the cat sat on the mat\n")
    tokenizer = adding("both")
    own = bare(tokenizer, "the cat sat on the mat")
    file = read_texts(str(tmp_path / "t.csv"), "text", None)

    def found(prefix, longest):
        return [ids.tolist() for ids in tokenize_texts(file, tokenizer, model.config, prefix, longest).ids]

    assert found(None, 128) == [[0, *own]] * 2
    assert found(None, 5) == [[0, *own[:4]]] * 2
    before = bare(tokenizer, "Hi.\n")
    prefix = make_prefix("Hi.\n", tokenizer)
    assert found(prefix, 5) == [[0, *before, *own[:4]]] * 2


def harness(model, tokenizer, preprompt=None, chat=None):
    pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")
    from aura_dist.evaluation.harness import make_harness

    return make_harness(model, tokenizer, preprompt, chat)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@pytest.mark.parametrize("kind", ["first", "both", "last", "none"])
def test_answers_of_tasks_follow_the_context(kind, model):
    tokenizer = adding(kind)
    first = [0] if kind in ("first", "both") else []
    begun = "<bos>" if first else ""
    pairs = [("1 and 2 make", " 3"), ("the cat", " sat on"), (f"{begun}1 and 2 make", " 3")]
    found = harness(model, tokenizer).loglikelihood(requests("loglikelihood", *pairs))
    for (context, answer), (likelihood, _) in zip(pairs, found, strict=True):
        ids = first + bare(tokenizer, context.removeprefix("<bos>") + answer)
        start = len(first + bare(tokenizer, context.removeprefix("<bos>")))
        assert likelihood == pytest.approx(-plain_loop(model, [ids], start)[0], rel=1e-5)
    contexts = ["the cat sat", f"{begun}You are such a", "home"]
    asked = [(text, {"until": ["zzz"], "max_gen_toks": 6, "do_sample": False}) for text in contexts]
    made = harness(model, tokenizer).generate_until(requests("generate_until", *asked))
    for text, continuation in zip(contexts, made, strict=True):
        ids = greedy(model, first + bare(tokenizer, text.removeprefix("<bos>")), 6)
        assert continuation == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("longest", [256, 16])
@pytest.mark.parametrize("kind", ["first", "both", "none"])
def test_a_preprompt_leads_texts_whose_likelihood_is_asked(kind, longest, model):
    tokenizer = adding(kind)
    texts = ["the cat sat on a mat", "and saw that old dog run far away from home", "a"]
    made = harness(model, tokenizer, "Be kind.\n")
    made._max_length = longest
    found = made.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    context = ([0] if kind != "none" else []) + bare(tokenizer, "Be kind.\n")
    for text, likelihood in zip(texts, found, strict=True):
        own, room, expected = bare(tokenizer, text), longest - len(context), 0.0
        for start in range(0, len(own), room):
            scored = own[start : start + room]
            read = [*context, *own[max(0, start + len(scored) - room - 1) : start]]
            assert len(read) + len(scored) - 1 <= longest
            expected -= plain_loop(model, [read + scored], len(read))[0]
        assert likelihood == pytest.approx(expected, rel=1e-5)
    made._max_length = len(context)
    with pytest.raises(ConfigError, match="--preprompt: expected fewer tokens than the model's"):
        made.loglikelihood_rolling(requests("loglikelihood_rolling", ("a",)))


@pytest.fixture(scope="module")
def tasks_path(tmp_path_factory):
    """Tasks over a local file: multiple choices, and the likelihood of whole texts."""
    directory = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{a} and {b} make", "choices": [str(a + b), "none"]} for a in range(3) for b in range(2)]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {directory / 'rows.jsonl'}\ntest_split: test\n"
    )
    (directory / "sums.yaml").write_text(
        f"task: sums\n{shared}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\ndoc_to_choice: choices\n"
        "doc_to_target: 0\nmetric_list:\n  - metric: acc\n"
    )
    (directory / "whole.yaml").write_text(
        f"task: whole\n{shared}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{question}}}}'\n"
        "metric_list:\n  - metric: byte_perplexity\n"
    )
    return str(directory)


def test_tasks_of_a_chat(model, tasks_path, tmp_path, monkeypatch, refused):
    wrapper = pytest.importorskip("lm_eval.models.huggingface", reason="the extra `evaluation` is not installed").HFLM
    tokenizer = adding("first")
    tokenizer.chat_template = LLAMA_3
    where = saved(model, tokenizer, tmp_path / "model")
    seen, original = [], wrapper._loglikelihood_tokens

    def recorded(self, asked, *more, **options):
        seen.extend(context for _, context, _ in asked)
        return original(self, asked, *more, **options)

    monkeypatch.setattr(wrapper, "_loglikelihood_tokens", recorded)
    command = [
        "evaluate",
        "--model",
        where,
        "--tasks-path",
        tasks_path,
        "--limit",
        "1",
        "--out",
        str(tmp_path / "r.json"),
    ]
    assert main([*command, "--tasks", "sums", "--chat", "--preprompt", PREPROMPT]) == 0
    turns = [{"role": "system", "content": PREPROMPT}, {"role": "user", "content": "0 and 0 make"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert seen == [tokenizer(whole.rstrip(), add_special_tokens=False)["input_ids"]] * 2
    assert json.loads((tmp_path / "r.json").read_text())["chat"]["system"] == PREPROMPT
    refused([*command, "--tasks", "whole", "--chat"], "--chat: expected tasks that ask for an answer")


def test_a_preprompt_acts_on_whole_texts(ended, tasks_path, tmp_path, model):
    pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")
    what = ["--tasks", "whole", "--tasks-path", tasks_path, "--preprompt", PREPROMPT, "--out", str(tmp_path / "r.json")]
    assert main(["evaluate", "--model", ended, *what, "--limit", "2"]) == 0
    tokenizer = adding("both")
    context, texts = [0, *bare(tokenizer, f"{PREPROMPT}\n")], ["0 and 0 make", "0 and 1 make"]
    total = sum(plain_loop(model, [context + bare(tokenizer, text)], len(context))[0] for text in texts)
    found = json.loads((tmp_path / "r.json").read_text())["zero_shot"]["whole"]["byte_perplexity"]
    assert found == pytest.approx(2.718281828 ** (total / sum(map(len, texts))), rel=1e-4)


def test_a_few_prompts_of_very_different_lengths_are_all_continued(model, tmp_path):
    """However many rows share a forward; the longest prompts share none with the shortest."""
    pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    prompts = ["Hi.", "A sentence of middling length about nothing much.", "word " * 60, "Rivers.", "word " * 25]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    found = []
    for rows in ("1", "4", "128"):
        asked = ["--toxicity-prompts", str(tmp_path / "p.jsonl"), "--scorer", "profanity-check", "--num-samples", "3"]
        asked += ["--max-new-tokens", "6", "--continuations-per-batch", rows, "--out", str(tmp_path / f"{rows}.json")]
        assert main(["evaluate", "--model", str(tmp_path / "model"), *asked]) == 0
        lines = (tmp_path / f"{rows}.continuations.jsonl").read_text().splitlines()
        found.append([(line["prompt"], line["sample"], line["ids"]) for line in map(json.loads, lines)])
    assert len(found[0]) == 15
    assert found[0] == found[1] == found[2]
