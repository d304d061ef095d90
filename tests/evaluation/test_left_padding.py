"""Prompts of different lengths in one batch, and rows that come and go, against each prompt alone."""

from dataclasses import replace
from weakref import ref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from aura_dist.evaluation.cached import append_in_place, drop_columns, join
from aura_dist.evaluation.decoding import LEFT_PADDED, Decoder, Rows, takes_padding
from aura_dist.evaluation.prompts import TokenizedPrompts
from aura_dist.evaluation.sampling import Decoding, prompt_keys, sample_key
from tests.evaluation.test_decoding import HOW, late
from tests.models import LLAMA_LIKE, MIXTURE_CONFIGS, TINY_CONFIGS, tiny_causal

LENGTHS = (30, 3, 26, 11, 1)  # the window of sliding attention, 32 tokens, is passed by some rows before others
PADDED = [name for name in [*TINY_CONFIGS, *MIXTURE_CONFIGS] if takes_padding(tiny_causal(name))]
# types that no other test needs a tiny model of
MORE = ["cohere2", "gemma", "gemma2", "gpt_neox", "granite", "olmo2", "qwen2", "smollm3", "starcoder2"]


def tiny(name):
    if name not in MORE:
        return tiny_causal(name)
    torch.manual_seed(0)
    options = {**LLAMA_LIKE, "head_dim": 12} if "gemma" in name else LLAMA_LIKE
    if name in ("cohere2", "gemma2", "smollm3", "starcoder2"):
        options = {**options, "sliding_window": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.eval()


def prompts_of(lengths):
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 384, (length,), generator=draw).tolist() for length in lengths]


def rows_of(prompts, samples=(0, 1)):
    keys = prompt_keys([str(p) for p in prompts], seed=0)
    pairs = [(p, s) for p in range(len(prompts)) for s in samples]
    return Rows(prompts, [p for p, _ in pairs], [sample_key(keys[p], s) for p, s in pairs])


def alone(model, rows, stops):
    """Each continuation by itself, so that nothing is padded; tests/evaluation/test_decoding.py checks those."""
    decoder = Decoder(model, HOW, stops)
    pairs = zip(rows.prompt_of, rows.keys, strict=True)
    return [decoder.run(Rows([rows.prompt_ids[p]], [0], [key]))[0] for p, key in pairs]


def test_every_type_is_tested():
    assert {tiny_causal(name).config.model_type for name in PADDED} | set(MORE) == LEFT_PADDED


@pytest.mark.parametrize("name", [*PADDED, *MORE])
def test_logits_of_padded_rows_are_those_of_the_rows_alone(name):
    """At the edge of what float32 can tell, after the prompt and after each further token, past the window's length."""
    model, prompts, seen = tiny(name), prompts_of(LENGTHS), []
    decoder = Decoder(model, Decoding(1, 5, 0.0, 1.0, 0), [])
    original = decoder._forward
    decoder._forward = lambda *a: seen.append(original(*a)) or seen[-1]
    made = decoder.run(rows_of(prompts, samples=(0,)))
    assert len(seen) == 5
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([[*prompt, *made[row][:-1]]])
        with torch.no_grad():
            expected_TV = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        got_TV = torch.stack([logits_BV[row] for logits_BV, _ in seen])
        torch.testing.assert_close(got_TV, expected_TV, rtol=0, atol=2e-5 * float(expected_TV.abs().max()))


@pytest.mark.parametrize("device", ["cpu", "as a gpu"])
@pytest.mark.parametrize("name", ["gemma3", "falcon-alibi"])
def test_rows_come_and_go(name, device, monkeypatch):
    """Stop ids that many draws hit empty the batch row by row; prompts, longer and shorter, take the room."""
    model = tiny_causal(name)
    stops = list(range(0, 384, 12))
    parts = [rows_of(prompts_of(lengths)) for lengths in ((9, 14, 26), (30, 2), (5, 31), (17,))]
    waiting, put, asked = parts[1:], {}, []

    def more(room):
        asked.append(room)
        return waiting.pop(0) if waiting and len(waiting[0].keys) <= room else None

    expected = [ids for part in parts for ids in alone(model, part, stops)]
    if device != "cpu":
        late(monkeypatch)
    made = Decoder(model, HOW, stops).run(parts[0], more=more, put=put.update)
    assert not waiting
    assert max(asked) <= len(parts[0].keys)
    assert made == [put[number] for number in range(sum(len(part.keys) for part in parts))]
    assert made == expected
    assert len({len(ids) for ids in made}) > 3


def test_finished_rows_leave_the_batch():
    model, sizes = tiny_causal("llama"), []
    decoder = Decoder(model, HOW, list(range(0, 384, 8)))
    original = decoder._forward
    decoder._forward = lambda ids, *more: sizes.append(len(ids)) or original(ids, *more)
    decoder.run(rows_of(prompts_of(LENGTHS), samples=range(4)))
    assert sizes[1] > sizes[-1]
    assert sizes[1:] == sorted(sizes[1:], reverse=True)


def test_rows_that_end_as_they_join_leave_the_batch():
    model, sizes = tiny_causal("llama"), []
    stop, other = 1, 9
    # two of four rows end at once, and both of those that take their room
    chosen = iter([[stop, stop, other, other], [stop, stop]])
    decoder = Decoder(model, HOW, [stop], agreed=lambda ids: torch.tensor(next(chosen, [other] * len(ids))))
    model.register_forward_pre_hook(lambda module, inputs, more: sizes.append(len(more["input_ids"])), with_kwargs=True)
    waiting = [rows_of(prompts_of([6, 6]), samples=(0,))]
    made = decoder.run(rows_of(prompts_of([5] * 4), samples=(0,)), more=lambda room: waiting.pop() if waiting else None)
    assert made == [[], [], [other] * 12, [other] * 12, [], []]
    assert sizes == [4, 2] + [2] * 11


@pytest.mark.parametrize(("lengths", "masked"), [([5, 5], False), ([5, 6], True)])
def test_what_is_not_padded_has_no_mask(lengths, masked, monkeypatch):
    """With one, attention takes a slower kernel on a GPU."""
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def record(*args, attn_mask=None, **more):
        seen.append(attn_mask is not None)
        return attend(*args, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    Decoder(tiny_causal("llama"), replace(HOW, max_new_tokens=4), []).run(rows_of(prompts_of(lengths)))
    assert set(seen) == {masked}


def test_a_row_without_padding_left_has_no_mask_either(monkeypatch):
    """A shorter prompt left, so no column is padded any more."""
    seen, stop, other = [], 1, 9
    chosen = iter([[stop, other]])
    decoder = Decoder(tiny_causal("llama"), HOW, [stop], agreed=lambda ids: torch.tensor(next(chosen, [other])))
    forward = decoder._forward
    decoder._forward = lambda ids, start, *more: seen.append(start is not None) or forward(ids, start, *more)
    assert decoder.run(rows_of(prompts_of([4, 6]), samples=(0,))) == [[], [other] * 12]
    assert seen == [True] + [False] * 11


def test_rows_of_a_cache_join_at_their_last_column():
    config = tiny_causal("gemma3").config
    caches = [DynamicCache(config=config) for _ in range(2)]
    draw = torch.Generator().manual_seed(1)
    keys = [torch.randn((2, 2, columns, 12), generator=draw) for columns in (40, 5)]
    for cache, states in zip(caches, keys, strict=True):
        for layer in range(3):
            cache.update(states, -states, layer)
    join(caches[0], caches[1])
    assert caches[0].get_seq_length() == 40
    for layer in caches[0].layers:
        held = layer.keys.shape[-2]
        assert held == (31 if layer.is_sliding else 40)
        assert torch.equal(layer.keys[:2], keys[0][:, :, -held:])
        assert torch.equal(layer.keys[2:, :, -5:], keys[1])
        assert not layer.keys[2:, :, :-5].any()
        assert torch.equal(layer.values, -layer.keys)
    drop_columns(caches[0], 20)
    for layer in caches[0].layers:
        assert (layer.get_seq_length(), layer.keys.shape[-2]) == (20, 20)
        assert torch.equal(layer.keys[:2], keys[0][:, :, -20:])


def test_columns_are_appended_in_place_and_as_without():
    config = tiny_causal("gemma3").config
    plain, placed = (DynamicCache(config=config) for _ in range(2))
    draw = torch.Generator().manual_seed(1)
    moved = set()

    def step(columns):
        states = torch.randn((len(rows), 2, columns, 12), generator=draw)
        for layer in range(3):
            ours, theirs = (cache.update(states, -states, layer) for cache in (placed, plain))
            assert torch.equal(ours[0], theirs[0]), "keys"
            assert torch.equal(ours[1], theirs[1]), "values"
            assert torch.equal(placed.layers[layer].keys, plain.layers[layer].keys), "what stays"
        assert placed.get_seq_length() == plain.get_seq_length()
        moved.add(placed.layers[-1].keys.data_ptr())

    rows = [0, 1, 2]
    step(5)
    append_in_place(placed, 8)
    moved.clear()
    for _ in range(9):
        step(1)
    assert len(moved) == 1, "the last layer attends to all, and moved once"
    rows = [2, 0]
    for cache in (placed, plain):
        cache.batch_select_indices(torch.tensor(rows))
        drop_columns(cache, 3)
        other = DynamicCache(config=config)
        for layer in range(3):
            other.update(torch.ones(1, 2, 30, 12), torch.zeros(1, 2, 30, 12), layer)
        join(cache, other)
    rows = [2, 0, 3]
    for _ in range(12):  # past the sliding window
        step(1)


def test_memory_of_a_cache_is_free_as_soon_as_it_is_left():
    cache = DynamicCache(config=tiny_causal("gemma3").config)
    for layer in range(3):
        cache.update(torch.ones(1, 2, 5, 12), torch.ones(1, 2, 5, 12), layer)
    append_in_place(cache, 8)
    cache.update(torch.ones(1, 2, 1, 12), torch.ones(1, 2, 1, 12), 2)
    layer = ref(cache.layers[2])
    del cache
    assert layer() is None


def test_prompts_share_a_batch_where_padding_costs_little():
    ids = [[0] * n for n in (3, 5, 100, 90, 1000, 40, 3)]
    prompts = TokenizedPrompts(ids, [b""] * 7)
    pairs = [(p, s) for p in range(7) for s in range(2)]
    batches = prompts.batches(pairs, rows_per_batch=6, padded=True)
    assert sorted(pair for batch in batches for pair in batch) == pairs
    assert [[len(ids[p]) for p, _ in batch] for batch in batches] == [
        [1000] * 2, [100, 100, 90, 90, 40, 40], [5, 5, 3, 3, 3, 3],
    ]  # fmt: skip
    many = TokenizedPrompts([[0] * (1000 - n % 3) for n in range(70)], [b""] * 70)
    sizes = [len(batch) for batch in many.batches([(p, 0) for p in range(70)], 70, padded=True)]
    assert sum(sizes) == 70
    assert max(sizes) == 32
