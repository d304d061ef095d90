"""Texts → token ids → right-padded batches.

Padding is on the right, because a causal model's tokens never see what comes after them: positions start at 0 in every
row, and no model class needs position ids.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aura_dist.errors import ConfigError, InputError, brief
from aura_dist.text.added import added_tokens
from aura_dist.text.chat import Chat
from aura_dist.text.tokenizer import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# a tokenizer returns some 10 KB for each text, so only the ids of earlier texts are kept
TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class Batch:
    """Rows of the store, padded on the right to the longest."""

    rows: slice  # of the store's
    input_ids: NDArray[np.int64]  # [B, T]
    attention_mask: NDArray[np.bool_]  # [B, T]: True at real tokens
    pool_mask: NDArray[np.bool_]  # [B, T]: the same, without the tokens that are left out of pooling

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask.sum())


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of N texts, [T] each, and which of them are left out of pooling."""

    ids: list[NDArray[np.int32]]
    special_ids: NDArray[np.int64]
    skip_special: bool  # leave out tokens with a special id
    skip_first: int = 0  # leave out so many tokens at the start of each text, special ones among them

    @property
    def num_tokens(self) -> NDArray[np.int32]:
        """[N] token counts after truncation, special tokens included."""
        return np.array([len(i) for i in self.ids], dtype=np.int32)

    @property
    def largest_id(self) -> int:
        """The largest token id of all texts."""
        return max(int(i.max()) for i in self.ids)

    def digest(self) -> str:
        """sha256 of the token ids, row by row, and of the special ids that are left out of pooling."""
        left_out = self.special_ids if self.skip_special else self.special_ids[:0]
        digest = hashlib.sha256(left_out.astype("<i8").tobytes())
        digest.update(self.num_tokens.astype("<i4").tobytes())
        for ids in self.ids:
            digest.update(ids.astype("<i4").tobytes())
        return digest.hexdigest()

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "TokenizedTexts":
        """The texts of `rows`, in that order."""
        return replace(self, ids=[self.ids[r] for r in rows])

    def counted(self, rows: slice) -> NDArray[np.bool_]:
        """[token] whether poolings count each token of `rows`, padding left out."""
        batch = self.batch(rows)
        return batch.pool_mask[batch.attention_mask]

    def batch(self, rows: slice) -> Batch:
        """The texts of `rows`, padded with id 0, because a tokenizer's own padding id may be beyond the vocabulary."""
        chosen = self.ids[rows]
        shape = (len(chosen), max(map(len, chosen)))
        input_ids = np.zeros(shape, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.bool_)
        for b, ids in enumerate(chosen):
            input_ids[b, : len(ids)] = ids
            attention_mask[b, : len(ids)] = True
        pool_mask = attention_mask & ~np.isin(input_ids, self.special_ids) if self.skip_special else attention_mask
        if self.skip_first:
            pool_mask = pool_mask & (np.arange(shape[1]) >= self.skip_first)
        return Batch(rows, input_ids, attention_mask, pool_mask)


def tokenize(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_tokens: int,
    skip_special: bool,
    source: str,
    skip_first: int = 0,
    chat: Chat | None = None,
    ended: bool = True,
) -> TokenizedTexts:
    """Tokenize texts as the tokenizer does by default (special tokens added), cut at `max_tokens`.

    `chat` renders each text first. Without `ended`, and under `chat`, whose template says how a text ends, the last
    tokens that the tokenizer adds are left out.

    InputError if the tokenizer or the template cannot take a text, or a text has no token, or only tokens that are
    left out; ConfigError if `max_tokens` leaves room for special tokens alone, or `skip_first` leaves no token of any
    text.
    """
    if skip_first >= max_tokens:
        raise ConfigError(f"--skip-first-tokens: expected fewer than --max-tokens {max_tokens}, got {skip_first}")
    num_special = tokenizer.num_special_tokens_to_add()
    if max_tokens <= num_special:  # else nothing of the text would be left
        raise ConfigError(
            f"--max-tokens: expected more than {num_special}, the special tokens that the tokenizer adds to each text, "
            f"got {max_tokens}"
        )
    added = added_tokens(tokenizer)
    first, last = added.first, added.last if ended and chat is None else ()
    room = max_tokens - len(first) - len(last)
    # more than is kept, so that a cut shows, and so that first tokens that are left out make no text shorter
    limit = min(max_tokens + len(first) + len(added.last) + 1, np.iinfo(np.int32).max)  # the tokenizer takes no more
    ids, num_doubled, num_cut = [], 0, 0
    for whole in _encode(texts if chat is None else chat.render_all(texts, source), tokenizer, limit, source):
        own = added.own(whole)
        num_doubled, num_cut = num_doubled + added.doubled(whole), num_cut + (len(own) > room)
        kept = own[-room:] if tokenizer.truncation_side == "left" else own[:room]
        ids.append(np.asarray([*first, *kept, *last], dtype=np.int32))
    added.say_doubled(num_doubled if chat is None else sum(map(added.begins, texts)), len(texts), "texts")
    if num_cut and chat is not None:
        what = "%d of %d chats are cut at %d tokens: a part of the template may be missing"
        logger.info(what, num_cut, len(texts), max_tokens)
    special = np.array(special_ids(tokenizer), dtype=np.int64)
    for row, row_ids in enumerate(ids):
        counted = row_ids[skip_first:]
        if skip_special:
            counted = counted[~np.isin(counted, special)]
        if not len(counted):
            what = f"token{' that is not special' * skip_special}{f' after the first {skip_first}' * bool(skip_first)}"
            raise InputError(f"data {source!r}: row {row}: expected at least one {what}, got none")
    return TokenizedTexts(ids, special, skip_special, skip_first)


def _encode(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", limit: int, source: str) -> Iterator[list[int]]:
    """Token ids of each text; InputError names the first row that the tokenizer cannot take."""

    def encode(some: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = tokenizer(list(some), truncation=True, max_length=limit, verbose=False)["input_ids"]
        return encoded

    for start in range(0, len(texts), TEXTS_AT_ONCE):
        block = texts[start : start + TEXTS_AT_ONCE]
        try:
            yield from encode(block)
        except Exception as error:  # its backend raises a bare Exception
            for row, text in enumerate(block, start):
                try:
                    encode([text])
                except Exception as failure:
                    raise InputError(
                        f"data {source!r}: row {row}: the model's tokenizer cannot take it: {brief(failure)}"
                    ) from failure
            raise InputError(f"data {source!r}: the model's tokenizer cannot take it: {brief(error)}") from error
