"""Perplexity and generation against the plain transformers calls."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from aura_dist.cli import main
from aura_dist.errors import InputError
from aura_dist.evaluation.figures import summary
from aura_dist.evaluation.generation import continue_alike
from aura_dist.evaluation.perplexity import negative_log_likelihoods
from aura_dist.evaluation.prompts import tokenize_prompts
from aura_dist.evaluation.sampling import Decoding
from aura_dist.interventions.use import LoadedModel
from aura_dist.text.tokens import tokenize
from tests.models import save_tiny, tiny_causal, tiny_tokenizer

TEXTS = [
    "Short one.",
    "A sentence of middling length about nothing much.",
    "Word " * 30,
    "Rivers carry silt to the sea.",
]


def perplexity(model, tokens, tokens_per_batch):
    return SimpleNamespace(**summary(*negative_log_likelihoods(model, tokens, tokens_per_batch)))


def continuations(model, tokenizer, prompt, how):
    prompts = tokenize_prompts([prompt], tokenizer, model.config, how)
    return continue_alike(LoadedModel(model, tokenizer, "", None), prompts, how)[0]


@pytest.mark.parametrize("name", ["gpt2", "falcon-alibi", "llama", "gemma3", "opt"])
def test_perplexity_equals_a_loop_over_sentences(name):
    model, tokenizer = tiny_causal(name), tiny_tokenizer()
    sums, counts = [], []
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt").input_ids
            loss = model(input_ids=ids, labels=ids).loss
            counts.append(ids.shape[1] - 1)
            sums.append(float(loss) * counts[-1])
    tokens = tokenize(TEXTS, tokenizer, max_tokens=128, skip_special=False, source="texts")
    measured = perplexity(model, tokens, tokens_per_batch=64)
    assert measured.token_weighted == pytest.approx(np.exp(sum(sums) / sum(counts)), rel=1e-4)
    assert measured.mean_over_sentences == pytest.approx(np.exp(np.array(sums) / counts).mean(), rel=1e-4)
    assert (measured.num_texts, measured.num_tokens) == (4, sum(counts))


def test_texts_of_one_token_are_left_out():
    model, tokenizer = tiny_causal("llama"), tiny_tokenizer(special_bos=False)
    one = tokenize(["a", "A longer text."], tokenizer, max_tokens=128, skip_special=False, source="t")
    assert one.num_tokens[0] == 1
    assert perplexity(model, one, 64).num_texts == 1
    with pytest.raises(InputError, match="at least two tokens"):
        perplexity(model, one.take([0]), 64)


def decoding(**changes):
    return Decoding(**{"num_samples": 2, "max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9, "seed": 3, **changes})


def test_greedy_is_the_argmax_loop():
    model, tokenizer = tiny_causal("llama"), tiny_tokenizer()
    ids = tokenizer("You are", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    start = len(tokenizer("You are").input_ids)
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    got = continuations(model, tokenizer, "You are", decoding(temperature=0.0))
    assert got == [expected, expected]


def test_checkpoints_own_sampling_settings_do_not_leak_in():
    model, tokenizer = tiny_causal("gpt2"), tiny_tokenizer()
    plain = continuations(model, tokenizer, "You are", decoding())
    greedy = continuations(model, tokenizer, "You are", decoding(temperature=0.0))
    model.generation_config = hf.GenerationConfig(
        temperature=0.01,
        top_k=1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        do_sample=True,
        num_beams=3,
        max_length=9,
    )
    assert continuations(model, tokenizer, "You are", decoding()) == plain
    assert continuations(model, tokenizer, "You are", decoding(temperature=0.0)) == greedy


def test_draws_depend_on_the_seed_alone():
    model, tokenizer = tiny_causal("llama"), tiny_tokenizer()
    first = continuations(model, tokenizer, "You are", decoding())
    torch.rand(7)
    assert continuations(model, tokenizer, "You are", decoding()) == first
    assert continuations(model, tokenizer, "You are", decoding(seed=4)) != first


def test_strength_zero_generates_and_measures_the_same(tiny_dir, sentences_csv, tmp_path, capsys):
    data = ["--data", sentences_csv, "--concepts", "toxic", "--num-positive", "9", "--num-negative", "9"]
    model, store = ["--model", str(tiny_dir("opt"))], ["--store", str(tmp_path / "s.zarr")]
    assert main(["collect", *model, *data, *store]) == 0
    assert main(["score", *store]) == 0
    assert main(["fit", *store, "--concept", "toxic", "--out", str(tmp_path / "aura")]) == 0
    capsys.readouterr()
    zero = ["--intervention", str(tmp_path / "aura"), "--strength", "0"]
    assert main(["generate", *model, *zero, "--prompt", "You are", "Thank you"]) == 0
    lines = [line.split("|", 1) for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [text for name, text in lines if "plain" in name] == [text for name, text in lines if "aura" in name]
    shown = []
    for more in (zero, []):
        measure = ["--perplexity-texts", sentences_csv, "--out", str(tmp_path / "r.json")]
        assert main(["evaluate", *model, *measure, *more]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_one_token_texts_are_counted_as_left_out():
    model, tokenizer = tiny_causal("llama"), tiny_tokenizer(special_bos=False)
    texts = ["a", "A longer text.", "b", "c", "Another one."]
    both = tokenize(texts, tokenizer, max_tokens=128, skip_special=False, source="t")
    measured = perplexity(model, both, 64)
    assert (measured.num_texts, measured.num_left_out) == (2, 3)
    alone = perplexity(model, both.take([1, 4]), 64)
    assert (alone.token_weighted, alone.mean_over_sentences) == (measured.token_weighted, measured.mean_over_sentences)


@pytest.mark.parametrize("name", ["gpt2", "falcon-alibi", "gemma3"])
def test_greedy_is_generate_and_leaves_its_settings_alone(name):
    model, tokenizer = tiny_causal(name), tiny_tokenizer()
    before = model.generation_config.to_dict()
    encoded = tokenizer("You are", return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert continuations(model, tokenizer, "You are", decoding(temperature=0.0, num_samples=3)) == [expected] * 3
    assert model.generation_config.to_dict() == before


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """`spoilt(value)`: a tiny Llama whose head has one row times that."""

    def save(value):
        directory = save_tiny("llama", tmp_path_factory.mktemp("spoilt"))
        weights = load_file(directory / "model.safetensors")
        weights["lm_head.weight"][5] *= value
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return str(directory)

    return save


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON")


@pytest.mark.parametrize(
    ("value", "num_nonfinite", "warning"),
    [
        (float("nan"), 480, "logits are NaN or infinite in 480 of 480 texts: their perplexity is null"),
        (1e5, 0, "a perplexity is beyond what a float64 holds: null"),
    ],
)
def test_perplexity_that_is_no_number_is_null(value, num_nonfinite, warning, spoilt, sentences_csv, tmp_path, capsys):
    results, command = tmp_path / "r.json", ["evaluate", "--model", spoilt(value), "--perplexity-texts", sentences_csv]
    assert main([*command, "--out", str(results)]) == 0
    read = json.loads(results.read_text(), parse_constant=refuse_constant)["perplexity"]
    assert (read["token_weighted"], read["mean_over_sentences"]) == (None, None)
    assert (read["num_texts"], read["num_nonfinite"]) == (480, num_nonfinite)
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_generation_stops_at_logits_that_are_no_numbers(temperature, spoilt, capsys):
    command = ["generate", "--model", spoilt(float("nan")), "--prompt", "You", "--temperature", temperature]
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the model's logits are NaN or infinite; check")


def test_failed_measurement_leaves_no_file_and_takes_none(tiny_dir, tmp_path, capsys):
    texts = tmp_path / "texts.csv"
    texts.write_text("text\na\n")
    out = tmp_path / "r.json"
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    tiny_tokenizer(special_bos=False).save_pretrained(tmp_path / "model")
    command = ["evaluate", "--model", str(tmp_path / "model"), "--perplexity-texts", str(texts), "--out", str(out)]
    assert main(command) == 2
    assert "expected a text of at least two tokens" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "texts.csv"]
    earlier = '{"schema": 1}'
    out.write_text(earlier)
    assert main(command) == 2
    assert out.read_text() == earlier
    texts.write_text("text\nA whole sentence.\n")
    assert main(command) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "r.json", "texts.csv"]


def test_padding_beyond_the_vocabulary_is_not_generated():
    model, tokenizer = tiny_causal("llama"), tiny_tokenizer()
    expected = continuations(model, tokenizer, "You are", decoding(num_samples=20, max_new_tokens=30))
    assert len({len(t) for t in expected}) > 1
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert continuations(model, tokenizer, "You are", decoding(num_samples=20, max_new_tokens=30)) == expected


def test_number_of_samples():
    model, tokenizer = tiny_causal("llama"), tiny_tokenizer()
    texts = continuations(model, tokenizer, "You are", decoding(num_samples=5))
    assert len(texts) == 5
    assert len(set(texts)) > 1
