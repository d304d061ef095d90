"""Batches with a cache give what one prompt alone gives without, on every architecture."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from aura_dist.errors import ModelError
from aura_dist.evaluation import decoding, sampling
from aura_dist.evaluation.decoding import Decoder, Rows
from aura_dist.evaluation.prompts import TokenizedPrompts
from aura_dist.evaluation.sampling import Decoding, choose, prompt_keys, sample_key
from tests.models import HYBRID_CONFIGS, ODD_CONFIGS, TINY_CONFIGS, VOCAB, tiny_causal

HOW = Decoding(2, 12, 1.0, 0.9, 0)
STOP_ID, LENGTH = 1, 26  # the window of sliding attention, 32 tokens, is passed on the way


def late(monkeypatch):
    """As on a GPU: no value is read where that would wait, and which rows go on is read during the next step."""
    for module in (sampling, decoding):
        monkeypatch.setattr(module, "reading_waits", lambda tensor: True)
    monkeypatch.setattr(decoding, "_copied", _uncounted)


def _uncounted(state):
    """Its values; tests/evaluation/test_waits.py does not take this for a wait."""
    with torch._C.DisableTorchFunction():
        values = state.tolist()
    return lambda: values


@torch.no_grad()
def one_by_one(model, prompt, key):
    """A continuation, each token by a forward of all tokens before it."""
    ids = torch.tensor([prompt])
    for step in range(HOW.max_new_tokens):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
        token = choose(logits, HOW, torch.tensor([key]), step)
        if int(token) == STOP_ID:
            break
        ids = torch.cat([ids, token[None]], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", [*TINY_CONFIGS, *ODD_CONFIGS, *HYBRID_CONFIGS])
def test_batch_equals_one_prompt_alone(name):
    model = tiny_causal(name)
    prompts = torch.randint(3, 384, (3, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    keys = prompt_keys([str(p) for p in prompts], seed=0)
    batch = [(0, 0), (0, 1), (1, 0), (2, 1)]
    rows = Rows(prompts, [p for p, _ in batch], [sample_key(keys[p], s) for p, s in batch])
    got = Decoder(model, HOW, [STOP_ID]).run(rows)
    assert got == [one_by_one(model, prompts[p], sample_key(keys[p], s)) for p, s in batch]
    assert len({tuple(ids) for ids in got}) > 1


def spoilt(model, value, step):
    """`model`, whose logits of all rows but the first are `value` at one step."""
    steps = itertools.count()

    def spoil(module, inputs, logits):
        if next(steps) == step:
            logits[1:] = value
        return logits

    model.lm_head.register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 4, HOW.max_new_tokens - 1])
@pytest.mark.parametrize("device", ["cpu", "as a gpu"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_give_no_continuation(value, step, device, temperature, monkeypatch):
    """Greedy decoding would take them for a choice."""
    if device != "cpu":
        late(monkeypatch)
    put = []
    decoder = Decoder(spoilt(tiny_causal("llama"), value, step), replace(HOW, temperature=temperature), [VOCAB])
    with pytest.raises(ModelError, match="logits are NaN or infinite"):
        decoder.run(Rows([[5, 6, 7], [8, 9, 10]], [0, 1], [3, 4]), put=put.append)
    assert not put


@pytest.mark.parametrize("others_come_after", [1, 3, HOW.max_new_tokens])  # turns, the last when the first rows end
@pytest.mark.parametrize("device", ["cpu", "as a gpu"])
def test_rows_that_leave_were_checked(others_come_after, device, monkeypatch):
    """They end by their number of tokens, which is known before their last logits are."""
    if device != "cpu":
        late(monkeypatch)
    put, turns = [], itertools.count(1)
    last = HOW.max_new_tokens - 1 + (others_come_after < HOW.max_new_tokens)  # forward that ends them
    decoder = Decoder(spoilt(tiny_causal("llama"), math.nan, last), HOW, [VOCAB])

    def more(room):
        return Rows([[5, 6, 7]] * 2, [0, 1], [7, 8]) if next(turns) == others_come_after else None

    with pytest.raises(ModelError, match="logits are NaN or infinite"):
        decoder.run(Rows([[5, 6, 7]] * 2, [0, 1], [3, 4]), most=4, more=more, put=put.append)
    assert not put


@pytest.mark.parametrize("device", ["cpu", "as a gpu"])
def test_rows_whose_result_is_dropped_may_leave(device, monkeypatch):
    if device != "cpu":
        late(monkeypatch)
    chosen = iter([[STOP_ID, 9, 9], [9] * 3])
    decoder = Decoder(tiny_causal("llama"), HOW, [STOP_ID], agreed=lambda ids: torch.tensor(next(chosen)))
    rows = Rows([[5, 6, 7]] * 3, [0, 1, 2], [3, 4, 5])
    assert decoder.run(rows, counts=False)[0] == []


def test_the_head_takes_one_matrix():
    """Of a slice torch copies the head's weight for each prompt."""
    model, contiguous = tiny_causal("llama"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: contiguous.append(inputs[0].is_contiguous()))
    Decoder(model, HOW, [STOP_ID]).run(Rows([[5, 6, 7], [8, 9, 10]], [0, 1], [3, 4]))
    assert contiguous
    assert all(contiguous)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_the_head_takes_one_position_a_row(name):
    """Of a long prompt too: with a large vocabulary the head would be most of the work."""
    model, shapes = tiny_causal(name), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    prompts, never = [[5, 6, 7, 8], [9, 10, 11, 12]], VOCAB
    made = Decoder(model, HOW, [never]).run(Rows(prompts, [0, 0, 1], [3, 4, 5]))
    assert [len(ids) for ids in made] == [HOW.max_new_tokens] * 3
    width = head.weight.shape[1]
    assert shapes == [(2, 1, width)] + [(3, 1, width)] * (HOW.max_new_tokens - 1)


def test_step_is_taken_as_long_as_any_rank_needs_one():
    """And the ids that others have agreed upon are gone on with."""
    model, steps = tiny_causal("llama"), []
    decoder = Decoder(model, HOW, [STOP_ID], lambda alive: steps.append(alive) or True, lambda ids: ids * 0 + STOP_ID)
    assert decoder.run(Rows([[5, 6]], [0], [3])) == [[]]
    assert steps == [False] * (HOW.max_new_tokens - 1)
    decoder = Decoder(model, HOW, [STOP_ID], agreed=lambda ids: ids * 0 + 9)
    assert decoder.run(Rows([[5, 6]], [0], [3])) == [[9] * HOW.max_new_tokens]


def test_batches_are_of_equal_length_and_even():
    ids = [[0] * n for n in (3, 5, 3, 3, 5, 3)]
    prompts = TokenizedPrompts(ids, [b""] * 6)
    pairs = [(p, s) for p in range(6) for s in range(3)]
    batches = prompts.batches(pairs, rows_per_batch=5)
    assert sorted(pair for batch in batches for pair in batch) == pairs
    assert [len(batch) for batch in batches] == [3, 3, 4, 4, 4]
    assert all(len({len(ids[p]) for p, _ in batch}) == 1 for batch in batches)
    assert prompts.batches([], 5) == []
