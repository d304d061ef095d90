"""Continuations of Gemma 3 270M by other batches and by two ranks: the same but for near ties."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from aura_dist.cli import main
from aura_dist.evaluation.prompts import read_prompts
from aura_dist.evaluation.sampling import Decoding
from tests.conftest import REAL_DATA
from tests.distributed.continued import assert_same_but_for_ties, read
from tests.distributed.launch import run_ranks

pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.realmodel, pytest.mark.timeout(3000)]

HOW = Decoding(5, 20, 1.0, 0.9, 0)
STOP_ID = 1


def test_batches_and_ranks_do_not_matter(gemma_dir, tmp_path):
    prompts = REAL_DATA / "rtp_prompts.jsonl"
    if not prompts.is_file():
        pytest.skip(f"the real prompts are not at {prompts}")
    model = ["--model", str(gemma_dir), "--toxicity-prompts", str(prompts)]
    command = ["evaluate", *model, "--num-samples", "5", "--scorer", "profanity-check", "--out"]
    assert main([*command, str(tmp_path / "alone.json")]) == 0
    assert main([*command, str(tmp_path / "batches.json"), "--continuations-per-batch", "7"]) == 0
    run_ranks(2, [*command, str(tmp_path / "ranks.json")], timeout_seconds=1500)
    tokenizer, plain = AutoTokenizer.from_pretrained(gemma_dir), AutoModelForCausalLM.from_pretrained(gemma_dir)
    texts = read_prompts(str(prompts), None, None).texts
    ids = [tokenizer(text).input_ids for text in texts]
    for other in ("batches", "ranks"):
        mine, theirs = read(tmp_path / "alone.json"), read(tmp_path / f"{other}.json")
        assert_same_but_for_ties(mine, theirs, plain, ids, texts, HOW, STOP_ID)
