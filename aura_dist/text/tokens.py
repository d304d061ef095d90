"""Texts → token ids → right-padded batches.

Padding is on the right, because a causal model's tokens never see what comes after them: positions start at 0 in every
row, and no model class needs position ids.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aura_dist.errors import ConfigError, InputError, brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# a tokenizer returns some 10 KB for each text, so only the ids of earlier texts are kept
TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class Batch:
    """Rows of the store, padded on the right to the longest."""

    rows: slice  # of the store's
    input_ids: NDArray[np.int64]  # [B, T]
    attention_mask: NDArray[np.bool_]  # [B, T]: True at real tokens
    pool_mask: NDArray[np.bool_]  # [B, T]: the same, without special tokens if these are left out of pooling

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask.sum())


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of N texts, [T] each, and which ids are special and left out of pooling."""

    ids: list[NDArray[np.int32]]
    special_ids: NDArray[np.int64]
    skip_special: bool

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
        return TokenizedTexts([self.ids[r] for r in rows], self.special_ids, self.skip_special)

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
        return Batch(rows, input_ids, attention_mask, pool_mask)


def tokenize(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int, skip_special: bool, source: str
) -> TokenizedTexts:
    """Tokenize texts as the tokenizer does by default (special tokens added), cut at `max_tokens`.

    InputError if the tokenizer cannot take a text, or a text has no token, or only special ones that are left out;
    ConfigError if `max_tokens` leaves room for special tokens alone.
    """
    num_special = tokenizer.num_special_tokens_to_add()
    if max_tokens <= num_special:  # else the tokenizer does not cut at all, or leaves nothing of the text
        raise ConfigError(
            f"--max-tokens: expected more than {num_special}, the special tokens that the tokenizer adds to each text, "
            f"got {max_tokens}"
        )
    limit = min(max_tokens, np.iinfo(np.int32).max)  # the tokenizer takes no larger integer
    ids = [np.asarray(i, dtype=np.int32) for i in _encode(texts, tokenizer, limit, source)]
    special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
    for row, row_ids in enumerate(ids):
        counted = row_ids[~np.isin(row_ids, special)] if skip_special else row_ids
        if not len(counted):
            what = "token that is not special" if skip_special else "token"
            raise InputError(f"data {source!r}: row {row}: expected at least one {what}, got none")
    return TokenizedTexts(ids, special, skip_special)


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
