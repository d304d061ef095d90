"""The special tokens that a tokenizer adds to each text: first ones, such as `<bos>`, and last ones, such as `<eos>`.

A text that begins with the first ones gets no second ones. A text that is to be continued gets no last ones, because
the model has learned that nothing follows them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AddedTokens:
    """The ids before and after each text, and how the first ones are spelled."""

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    first_text: str = ""

    def doubled(self, whole: Sequence[int]) -> bool:
        """Whether a text begins with the first tokens itself; `whole` holds its ids with what the tokenizer adds."""
        return bool(self.first) and tuple(whole[len(self.first) : 2 * len(self.first)]) == self.first

    def own(self, whole: Sequence[int]) -> list[int]:
        """The text's own ids, without what is added and without first tokens that it begins with itself."""
        start = len(self.first) * (2 if self.doubled(whole) else 1)
        return list(whole[start : len(whole) - len(self.last)])

    def open(self, whole: Sequence[int]) -> list[int]:
        """Ids of a text that is to be continued: the first tokens once, and no last ones."""
        return [*self.first, *self.own(whole)]

    def begins(self, text: str) -> bool:
        """Whether a text begins with the first tokens as they are spelled."""
        return bool(self.first_text) and text.startswith(self.first_text)

    def say_doubled(self, count: int, total: int, what: str) -> None:
        """Log how many of the `total` texts begin with the first tokens themselves, if any does."""
        if count:
            logger.info("%d of %d %s begin with %s: no second one is added", count, total, what, self.first_text)


def added_tokens(tokenizer: "PreTrainedTokenizerBase") -> AddedTokens:
    """What the tokenizer adds, seen on a short text that it can take."""
    for probe in ("a", "0", "the", "."):
        try:
            whole = list(tokenizer(probe, verbose=False)["input_ids"])
            bare = list(tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"])
        except Exception:  # the backend raises a bare Exception for a text that the vocabulary does not cover
            continue
        starts = [i for i in range(len(whole) - len(bare) + 1) if bare and whole[i : i + len(bare)] == bare]
        if len(starts) == 1:
            first = whole[: starts[0]]
            return AddedTokens(tuple(first), tuple(whole[starts[0] + len(bare) :]), str(tokenizer.decode(first)))
    if tokenizer.num_special_tokens_to_add():
        logger.warning("the special tokens that the tokenizer adds cannot be told from those of a text")
    return AddedTokens()
