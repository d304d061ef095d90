"""Labelled table → the rows that are run: Jigsaw's rule, then seeded sampling by class, if asked at equal lengths.

Both look at the first concept alone.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aura_dist.errors import InputError
from aura_dist.text.chat import make_chat
from aura_dist.text.labels import check_classes, check_texts, parse_labels
from aura_dist.text.table import Table
from aura_dist.text.tokens import TokenizedTexts, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# largest mean difference between the sorted lengths of both classes, as a share of their mean
LENGTH_TOLERANCE = 0.05


@dataclass(frozen=True)
class Sampling:
    """How many rows of each class are drawn, and how.

    None takes all rows of a class; with `match_length`, as many negatives as positives.
    """

    num_positive: int | None = None
    num_negative: int | None = None
    match_length: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Selection(Sampling):
    """Which rows of a table are run, and how much of each text; the fields have the names of the settings."""

    text_column: str
    concepts: list[str]
    clean_negatives: list[str]
    threshold: float | None
    max_tokens: int
    skip_special_tokens: bool
    chat: str | None = None
    system: str | None = None
    skip_first_tokens: int = 0

    @classmethod
    def of(cls, settings: object) -> "Selection":
        """The selection that an object with these attributes describes."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    @property
    def columns(self) -> list[str]:
        """The columns to read: the texts, then the concepts, then other labels."""
        return [self.text_column, *dict.fromkeys([*self.concepts, *self.clean_negatives])]

    @property
    def identity(self) -> dict[str, Any]:
        """What fixes the rows of a table that are selected; a store records concepts and lengths beside it."""
        return {
            "text_column": self.text_column,
            "threshold": self.threshold,
            "clean_negatives": list(self.clean_negatives),
            "sampling": {field.name: getattr(self, field.name) for field in fields(Sampling)},
        }


def select(
    table: Table, which: Selection, load_tokenizer: "Callable[[], PreTrainedTokenizerBase]"
) -> tuple[NDArray[np.int64], NDArray[np.int8], TokenizedTexts]:
    """Check, label, tokenize and sample the rows of a table; without concepts, all rows are taken.

    The tokenizer is loaded once texts and labels are checked, because that may take seconds or fail. Returns [N] rows
    of the table, by token count, then by row; their [N, C] labels for C concepts, 1, 0 or −1; and their token ids.

    InputError if a text or label cannot be used, there are too few rows, or a concept lacks a class, also after
    sampling; ConfigError if `max_tokens` or `skip_first_tokens` leave no token of any text; either or ModelError if the
    tokenizer has no chat template for what is asked.
    """
    _, *columns = which.columns
    texts = check_texts(table, which.text_column)
    label_NK = parse_labels(table, columns, which.threshold)
    label_NC = label_NK[:, : len(which.concepts)]
    check_classes(label_NC, which.concepts, table.source)
    tokenizer = load_tokenizer()
    tokens = tokenize(
        texts, tokenizer, max_tokens=which.max_tokens, skip_special=which.skip_special_tokens,
        skip_first=which.skip_first_tokens, source=table.source,
        chat=None if which.chat is None else make_chat(tokenizer, which.chat, which.system),
    )  # fmt: skip
    num_tokens, rows = tokens.num_tokens, np.arange(len(table))
    if which.concepts:
        rows = without_mixed_negatives(label_NK[:, 0], label_NK[:, [columns.index(c) for c in which.clean_negatives]])
        rows = rows[sample_rows(label_NK[rows, 0], num_tokens[rows], which)]
    rows = rows[np.lexsort((rows, num_tokens[rows]))]
    label_NC = np.ascontiguousarray(label_NC[rows])
    check_classes(label_NC, which.concepts, table.source)
    return rows, label_NC, tokens.take(rows)


def without_mixed_negatives(label_N: NDArray[np.int8], others_NK: NDArray[np.int8]) -> NDArray[np.int64]:
    """Jigsaw's rule: all rows but negatives that are positive for any of K other labels.

    From the protocol of *Whispering Experts* (Suau et al., ICML 2024): a comment that is `obscene` but not `toxic` is
    neither toxic nor a clean negative.
    """
    mixed = (label_N == 0) & (others_NK == 1).any(axis=1)
    return np.flatnonzero(~mixed)


def sample_rows(label_N: NDArray[np.int8], num_tokens_N: NDArray[np.int32], how: Sampling) -> NDArray[np.int64]:
    """Indices of the rows to run, ascending; rows labelled −1 are among them only if nothing is sampled.

    InputError if a class has fewer rows than asked for, or lengths cannot be matched.
    """
    if how.num_positive is None and how.num_negative is None and not how.match_length:
        return np.arange(len(label_N))
    # each class has a stream, so that the positives do not depend on the number of negatives
    positive_stream, negative_stream = np.random.SeedSequence(how.seed).spawn(2)
    positives = _draw(np.flatnonzero(label_N == 1), how.num_positive, positive_stream, "positive")
    pool = np.flatnonzero(label_N == 0)
    if how.match_length:
        count = len(positives) if how.num_negative is None else how.num_negative
        if how.num_negative is None and count > len(pool):
            raise InputError(
                f"--match-length: expected at least {count} negative rows, as many as positives are drawn, "
                f"found {len(pool)}; give --num-negative, or a smaller --num-positive"
            )
        negatives = _match(pool, num_tokens_N, num_tokens_N[positives], count, negative_stream)
    else:
        negatives = _draw(pool, how.num_negative, negative_stream, "negative")
    return np.sort(np.concatenate([positives, negatives]))


def _draw(pool: NDArray[np.int64], count: int | None, stream: np.random.SeedSequence, name: str) -> NDArray[np.int64]:
    if count is None:
        return pool
    if count > len(pool):
        raise InputError(f"--num-{name}: expected at most {len(pool)}, the number of {name} rows, got {count}")
    return np.random.default_rng(stream).permutation(pool)[:count]


def _match(
    pool: NDArray[np.int64],
    num_tokens_N: NDArray[np.int32],
    targets: NDArray[np.int32],
    count: int,
    stream: np.random.SeedSequence,
) -> NDArray[np.int64]:
    """`count` rows of `pool` whose lengths are distributed as `targets` are.

    Wanted lengths are `count` evenly spaced quantiles of the targets. Each takes the free row of nearest length, in
    random order, so that no length has priority. Rows of the same length are taken at random.
    """
    if count > len(pool):
        raise InputError(f"--num-negative: expected at most {len(pool)}, the number of negative rows, got {count}")
    rng = np.random.default_rng(stream)
    wanted = np.quantile(targets, (np.arange(count) + 0.5) / count, method="nearest").astype(np.int32)
    shuffled = rng.permutation(pool)
    free = shuffled[np.argsort(num_tokens_N[shuffled], kind="stable")].tolist()
    lengths = num_tokens_N[free].tolist()
    chosen = []
    for length in rng.permutation(wanted):
        at = _nearest(lengths, int(length))
        chosen.append(free.pop(at))
        lengths.pop(at)
    rows = np.array(chosen, dtype=np.int64)
    _check_matched(np.sort(num_tokens_N[rows]), wanted, len(pool))
    return rows


def _check_matched(drawn: NDArray[np.int32], wanted: NDArray[np.int32], num_there: int) -> None:
    """InputError unless two ascending arrays of lengths are close everywhere, not in their means alone.

    The mean difference of sorted lengths is the Wasserstein-1 distance between both distributions.
    """
    off = np.abs(drawn - wanted)
    if off.mean() <= LENGTH_TOLERANCE * wanted.mean():
        return
    worst = int(off.argmax())
    raise InputError(
        f"--match-length: expected {len(wanted)} negatives with the positives' token lengths ({wanted.mean():.1f} on "
        f"average), but the nearest of the {num_there} there are differ by {off.mean():.1f} tokens on average, most at "
        f"quantile {(worst + 0.5) / len(wanted):.2f}: {wanted[worst]} wanted, {drawn[worst]} drawn; ask for fewer with "
        "--num-negative, or leave --match-length out"
    )


def _nearest(lengths: list[int], length: int) -> int:
    """Index in ascending `lengths` of a value nearest to `length`."""
    at = bisect_left(lengths, length)
    if at == len(lengths) or (at > 0 and length - lengths[at - 1] < lengths[at] - length):
        at -= 1
    return at
