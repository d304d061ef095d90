"""Texts → token ids → right-padded batches."""

import json

import numpy as np
import pytest
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from aura_dist.errors import ConfigError, InputError, ModelError
from aura_dist.text.tokenizer import load_tokenizer, tokenizer_digest
from aura_dist.text.tokens import TokenizedTexts, tokenize
from tests.models import VOCAB, tiny_tokenizer

BOS = 0
TEXTS = ["a", "such a long and winding text that goes on", "two words"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def tokens_of(texts, tokenizer, max_tokens=128, *, skip_special=False, skip_first=0):
    return tokenize(
        texts, tokenizer, max_tokens=max_tokens, skip_special=skip_special, skip_first=skip_first, source="d.csv"
    )


def test_ids_are_those_of_the_tokenizer_with_special_tokens(tokenizer):
    tokens = tokens_of(TEXTS, tokenizer)
    assert [i.tolist() for i in tokens.ids] == [tokenizer(t)["input_ids"] for t in TEXTS]
    assert all(i[0] == BOS for i in tokens.ids)
    assert tokens.num_tokens.tolist() == [len(tokenizer(t)["input_ids"]) for t in TEXTS]
    assert tokens.num_tokens.dtype == np.int32


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_on_the_right_whatever_the_tokenizer_does(side):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    tokens = tokens_of(TEXTS, tokenizer)
    batch = tokens.batch(slice(0, 3))
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.pool_mask.shape == (3, max(tokens.num_tokens))
    assert batch.input_ids.dtype == np.int64
    for ids, row, mask in zip(tokens.ids, batch.input_ids, batch.attention_mask, strict=True):
        assert row[: len(ids)].tolist() == ids.tolist()
        assert (row[len(ids) :] == 0).all()
        assert mask.tolist() == [True] * len(ids) + [False] * (len(row) - len(ids))
    assert (batch.pool_mask == batch.attention_mask).all()
    assert batch.num_tokens == tokens.num_tokens.sum()


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=8),
    st.booleans(),
    st.integers(0, 13),
)
def test_masks_mark_every_real_token_once(rows, skip_special, skip_first):
    # the padding id is an ordinary token here, as where a model has none of its own
    tokens = TokenizedTexts([np.array(r, dtype=np.int32) for r in rows], np.array([1, 4]), skip_special, skip_first)
    batch = tokens.batch(slice(0, len(rows)))
    assert [list(r[m]) for r, m in zip(batch.input_ids, batch.attention_mask, strict=True)] == rows
    counted = [[i for i in row[skip_first:] if not (skip_special and i in (1, 4))] for row in rows]
    assert [list(r[m]) for r, m in zip(batch.input_ids, batch.pool_mask, strict=True)] == counted


def test_batch_is_as_long_as_its_own_longest_row(tokenizer):
    tokens = tokens_of(TEXTS, tokenizer)
    batch = tokens.batch(slice(2, 3))
    assert batch.rows == slice(2, 3)
    assert batch.input_ids.shape == (1, tokens.num_tokens[2])


def test_special_tokens_are_seen_but_not_pooled(tokenizer):
    batch = tokens_of(["a<eos>b"], tokenizer, skip_special=True).batch(slice(0, 1))
    assert batch.attention_mask.all()
    assert batch.pool_mask[0].tolist() == [False, True, False, True]
    assert tokens_of(["a<eos>b"], tokenizer).batch(slice(0, 1)).pool_mask.all()


@pytest.mark.parametrize("length", [2, 5])
def test_texts_are_cut(length, tokenizer):
    whole, cut = tokens_of(TEXTS, tokenizer), tokens_of(TEXTS, tokenizer, length)
    assert [c.tolist() for c in cut.ids] == [w[:length].tolist() for w in whole.ids]


def test_no_limit_is_too_large(tokenizer):
    whole, cut = tokens_of(TEXTS, tokenizer), tokens_of(TEXTS, tokenizer, 10**30)
    assert [c.tolist() for c in cut.ids] == [w.tolist() for w in whole.ids]


def test_take_reorders(tokenizer):
    tokens = tokens_of(TEXTS, tokenizer, skip_special=True)
    taken = tokens.take([2, 0])
    assert [i.tolist() for i in taken.ids] == [tokens.ids[2].tolist(), tokens.ids[0].tolist()]
    assert taken.skip_special
    assert tokens_of(TEXTS, tokenizer, skip_first=1).take([0]).skip_first == 1


def test_text_with_no_token_after_the_first_ones_is_named(tokenizer):
    """The first tokens are those of the text as it is, the special one among them."""
    masks = [tokens_of(["ab", "abcdef"], tokenizer, skip_first=n).batch(slice(0, 2)).pool_mask for n in range(3)]
    assert [mask.sum() for mask in masks] == [masks[0].sum(), masks[0].sum() - 2, masks[0].sum() - 4]
    length = len(tokenizer("ab")["input_ids"])
    with pytest.raises(InputError, match=f"row 1: expected at least one token after the first {length}, got none"):
        tokens_of(["abcdef" * 9, "ab"], tokenizer, skip_first=length)
    with pytest.raises(
        InputError, match="row 0: expected at least one token that is not special after the first 1, got"
    ):
        tokens_of(["<eos>"], tokenizer, skip_first=1, skip_special=True)
    assert tokens_of(["<eos>"], tokenizer, skip_first=1).batch(slice(0, 1)).pool_mask.tolist() == [[False, True]]
    with pytest.raises(ConfigError, match="--skip-first-tokens: expected fewer than --max-tokens 8, got 8"):
        tokens_of(["abcdef" * 9], tokenizer, 8, skip_first=8)


def test_text_without_a_token_that_counts_is_named(tokenizer):
    with pytest.raises(InputError, match=r"data 'd.csv': row 1: expected at least one token that is not special"):
        tokens_of(["a", "<eos>"], tokenizer, skip_special=True)
    assert len(tokens_of(["a", "<eos>"], tokenizer).ids) == 2
    with pytest.raises(InputError, match="row 0: expected at least one token, got none"):
        tokens_of([""], tiny_tokenizer(special_bos=False))


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_room_for_special_tokens_alone_is_refused(max_tokens):
    """The tokenizer would not cut at all below that, and leave nothing but special tokens at it."""
    tokenizer = tiny_tokenizer()
    specials = [("<bos>", 0), ("<eos>", 1)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=specials)
    message = f"--max-tokens: expected more than 2, the special tokens that the tokenizer adds .*, got {max_tokens}"
    with pytest.raises(ConfigError, match=message):
        tokens_of(TEXTS, tokenizer, max_tokens)
    assert tokens_of(TEXTS, tokenizer, 3).num_tokens.tolist() == [3, 3, 3]
    bare = tokens_of(TEXTS, tiny_tokenizer(special_bos=False), max_tokens)
    assert bare.num_tokens.max() == max_tokens


def test_text_that_the_tokenizer_cannot_take_is_named():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokens_of(["a b", "b"], tokenizer).num_tokens.tolist() == [2, 1]
    with pytest.raises(InputError, match=r"data 'd.csv': row 1: the model's tokenizer cannot take it: .*UNK"):
        tokens_of(["a b", "a z", "z"], tokenizer)


def test_padding_beyond_the_vocabulary_is_not_used():
    """A checkpoint whose tokenizer got a padding token that the model was not resized for."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCAB
    tokens = tokens_of(TEXTS, tokenizer)
    assert tokens.batch(slice(0, 3)).input_ids.max() == tokens.largest_id < VOCAB


def test_digest_of_token_ids():
    tokens = tokens_of(TEXTS, tiny_tokenizer())
    assert tokens.digest() == tokens_of(TEXTS, tiny_tokenizer()).digest()
    others = [
        tokens.take([1, 0, 2]),
        tokens.take([0, 1]),
        tokens_of(TEXTS, tiny_tokenizer(), 5),
        tokens_of(TEXTS, tiny_tokenizer(), skip_special=True),
        tokens_of(TEXTS, tiny_tokenizer(special_bos=False)),
    ]
    moved = [np.concatenate([tokens.ids[0], tokens.ids[1][:1]]), tokens.ids[1][1:], tokens.ids[2]]
    others.append(TokenizedTexts(moved, tokens.special_ids, skip_special=False))
    assert len({tokens.digest(), *(o.digest() for o in others)}) == 7


def test_tokenizer_without_padding_gets_masked_zeros():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    batch = tokens_of(TEXTS, tokenizer).batch(slice(0, 3))
    assert (batch.input_ids[~batch.attention_mask] == 0).all()


def test_digest_does_not_depend_on_earlier_calls():
    tokenizer = tiny_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(TEXTS, padding="max_length", truncation=True, max_length=9)
    assert tokenizer_digest(tokenizer) == before
    assert len(before) == 64


def test_digest_tells_tokenizers_apart():
    assert tokenizer_digest(tiny_tokenizer()) == tokenizer_digest(tiny_tokenizer())
    larger = tiny_tokenizer()
    larger.add_tokens(["zyx"])
    cut_left, other_special = tiny_tokenizer(), tiny_tokenizer()
    cut_left.truncation_side = "left"
    other_special.pad_token = None
    others = (tiny_tokenizer(special_bos=False), larger, cut_left, other_special)
    assert len({tokenizer_digest(t) for t in (tiny_tokenizer(), *others)}) == 5


def test_digest_of_a_tokenizer_without_backend():
    class Slow(hf.PreTrainedTokenizer):
        def __init__(self, vocab):
            self.vocab = vocab
            super().__init__()

        def get_vocab(self):
            return self.vocab

        def __len__(self):
            return len(self.vocab)

    assert tokenizer_digest(Slow({"a": 0, "b": 1})) == tokenizer_digest(Slow({"b": 1, "a": 0}))
    assert tokenizer_digest(Slow({"a": 0, "b": 1})) != tokenizer_digest(Slow({"a": 1, "b": 0}))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "nonsense"}}), None],
    ids=["not JSON", "a list", "unknown kind", "none"],
)
def test_broken_tokenizers_are_named(content, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=f"--model '{tmp_path}': its tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_saved_tokenizer_is_loaded(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(load_tokenizer(str(tmp_path))) == tokenizer_digest(tokenizer)
