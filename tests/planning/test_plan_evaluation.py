"""What `sweep --dry-run` says of an evaluation against what its forwards do."""

import json

import pytest
from torch.utils.flop_counter import FlopCounterMode

from aura_dist.cli import main
from aura_dist.config.settings import resolve
from aura_dist.config.verbs import EvaluateConfig
from aura_dist.evaluation.generation import continue_alike
from aura_dist.evaluation.perplexity import negative_log_likelihoods, read_texts, tokenize_texts
from aura_dist.evaluation.prompts import make_prefix, read_prompts, tokenize_prompts
from aura_dist.evaluation.sampling import Decoding
from aura_dist.interventions.use import LoadedModel
from aura_dist.models.load import ModelSource, load_causal
from aura_dist.planning.seconds import LanguageModelCost, Step, continuing
from aura_dist.planning.work import ForwardCost
from aura_dist.ranks.world import World
from aura_dist.stages.plan import answer, plan_evaluation
from aura_dist.text.tokenizer import load_tokenizer

PREPROMPT = "Be kind."


@pytest.fixture
def inputs(tmp_path):
    """Settings of prompts and texts, of several lengths each."""
    prompts, texts = tmp_path / "prompts.jsonl", tmp_path / "texts.csv"
    words = ["You are", "The train was late again", "I think that", "It rained all day and all night"]
    prompts.write_text("".join(json.dumps({"prompt": {"text": text}}) + "\n" for text in words))
    texts.write_text("text\nThe library opens at nine.\nIt rained.\nNobody came to the house by the river today.\n")
    return {
        "toxicity_prompts": str(prompts), "num_samples": 3, "max_new_tokens": 5, "perplexity_texts": str(texts),
        "out": "none.json", "preprompt": PREPROMPT,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-rotary", "opt"])
def test_operations_are_those_of_the_real_forwards(name, tiny_dir, inputs):
    config = resolve(EvaluateConfig, {"model": str(tiny_dir(name)), **inputs})
    source = ModelSource(config.model, None, "float32")
    model, tokenizer = load_causal(source, World()), load_tokenizer(config.model, None)
    # eager: the counter of torch leaves out the fused attention of a CPU
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = []
    loaded, prefix = LoadedModel(model, tokenizer, "", None), make_prefix(f"{PREPROMPT}\n", tokenizer)
    how = Decoding(3, 5, 1.0, 0.9, 0)
    file = read_texts(config.perplexity_texts, "text", None)
    prompts = read_prompts(config.toxicity_prompts, None, None).texts
    with FlopCounterMode(display=False) as counter:
        tokens = tokenize_texts(file, loaded.tokenizer, loaded.model.config, prefix, config.max_tokens)
        negative_log_likelihoods(model, tokens, config.tokens_per_batch, num_context=prefix.num_context)
        continue_alike(loaded, tokenize_prompts(prompts, tokenizer, model.config, how, prefix=prefix), how)
    assert plan_evaluation(config).flops == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_a_forward_takes_as_long_as_its_operations_or_as_reading_the_weights():
    cost = LanguageModelCost(ForwardCost(0, 0, 0, 0, token_flops=2e9, square_flops=1e3), 1e9, read_bytes=10**9)
    few, many = Step(1, 1, 10, 1), Step(1000, 1, 10, 1000)
    assert cost.seconds(few, tflops=100, read_rate=1e12) == pytest.approx(1e-3)
    assert cost.seconds(many, tflops=100, read_rate=1e12) == pytest.approx(1000 * (3e9 + 11e3) / 1e14)
    steps = list(continuing([(2, 6, 7)], num_tokens=3))
    assert steps == [Step(2, 7, 0, 2), Step(6, 1, 7, 6), Step(6, 1, 8, 6)]
    assert list(continuing([(2, 6, 7)], num_tokens=1)) == steps[:1]


def test_seconds_follow_the_stated_rate_and_say_what_they_are_of(tiny_dir, inputs):
    settings = {**inputs, "model": str(tiny_dir("llama")), "tasks": ["arc_easy"]}
    found = [
        answer("evaluate", {**settings, "tflops": tflops, "device": device, "world_size": 1})
        for tflops, device in ((1e-9, "cpu"), (2e-9, "cuda"))
    ]
    assert found[0]["seconds"] == pytest.approx(2 * found[1]["seconds"], rel=1e-6)
    assert [f["gpu"] for f in found] == [False, True]
    assert found[0]["left_out"] == "zero-shot tasks"
    assert found[0]["seconds"] == pytest.approx(
        plan_evaluation(resolve(EvaluateConfig, settings)).flops / 1e3, rel=1e-6
    )


def test_collections_are_answered_as_plan_prints_them(tiny_dir, sentences_csv, capsys):
    model, data = str(tiny_dir("llama")), sentences_csv
    settings = {"model": model, "data": data, "concepts": ["toxic"], "num_positive": 20, "world_size": 2}
    flags = ["--data", data, "--concepts", "toxic", "--num-positive", "20", "--world-size", "2", "--json"]
    capsys.readouterr()
    assert main(["plan", "--model", model, *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = answer("collect", {**settings, "pooling": ["max"], "overwrite": True})
    assert found["seconds"] == 2 * (printed["compute_seconds"] + printed["stream_seconds"])
    assert (found["store_bytes"], found["gpu"]) == (printed["store"]["compressed_bytes"], False)
    small = answer("collect", {**settings, "host_memory": "1MB"})
    assert small["refused"].startswith("--host-memory 1MB: expected room for")
    assert small["seconds"] == found["seconds"]


@pytest.mark.parametrize("stage", ["collect", "evaluate"])
def test_job_that_cannot_be_planned_is_answered_with_the_reason(stage, monkeypatch):
    missing = {"model": "none/such", "perplexity_texts": "texts.csv"}
    missing |= {"data": "data.csv", "concepts": ["toxic"]} if stage == "collect" else {}
    assert answer(stage, missing)["refused"].startswith("--model 'none/such'")
    monkeypatch.setattr("aura_dist.stages.plan.resolve", lambda *a: 1 / 0)
    assert answer(stage, missing) == {"refused": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize("sharding", ["replicate", "tensor=2"])
@pytest.mark.parametrize("what", ["perplexity_texts", "toxicity_prompts"])
def test_ranks_share_the_work(tiny_dir, inputs, sharding, what):
    settings = {"model": str(tiny_dir("llama")), "out": "none.json", what: inputs[what]}
    config = resolve(EvaluateConfig, {**settings, "sharding": sharding})
    assert plan_evaluation(config, 1e-9, 4) == plan_evaluation(config, 1e-9, 2)
