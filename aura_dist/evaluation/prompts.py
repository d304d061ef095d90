"""Prompts of a file, after a pre-prompt or not → token ids, keys of their noise, and batches of equal length.

A pre-prompt is a text that leads every prompt and every text, on lines of its own, and is never scored itself. Tokens
are joined, not texts: what follows it has the same tokens as without it, so that figures with and without one are of
the same tokens. In a chat, the pre-prompt is the system's turn of every prompt.

Prompts and pre-prompts go on, so the last tokens that a tokenizer adds to a text are left out.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from aura_dist.errors import AuraError, InputError, MissingColumnError, brief
from aura_dist.evaluation.sampling import Decoding, prompt_keys
from aura_dist.models.load import check_positions, check_vocabulary
from aura_dist.text.added import added_tokens
from aura_dist.text.chat import Chat, make_chat
from aura_dist.text.labels import check_texts
from aura_dist.text.table import Table, read_table
from aura_dist.text.tokens import TokenizedTexts

# columns of RealToxicityPrompts' records, and of a plain table
TEXT_COLUMNS = ("prompt.text", "prompt", "text")
TOXICITY_COLUMNS = ("prompt.toxicity", "toxicity")
# prompts that share a forward: tokens at most, with padding, and tokens that a prompt may be padded with in any case
_PREFILL_TOKENS = 2**15
_SHORT = 16
# one continuation that is to be made: index of its prompt, number of the sample
Pair = tuple[int, int]


@dataclass(frozen=True)
class PromptFile:
    """The P prompts of a file."""

    source: str
    column: str
    texts: list[str]
    toxicity: NDArray[np.float64]  # [P], of the prompts themselves; NaN where the file has none

    @property
    def sha256(self) -> str:
        """Digest of the texts in order, whatever the file's format."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        return digest.hexdigest()


def read_prompts(source: str, column: str | None, toxicity_column: str | None) -> PromptFile:
    """Read a prompt file: RealToxicityPrompts' JSONL, or a table, of any format that `read_table` takes.

    A column of None is the first of `TEXT_COLUMNS` or `TOXICITY_COLUMNS` that is there; toxicity may be missing.
    InputError if the file cannot be read, lacks the column (in all rows or in some), has no rows, or if a prompt is not
    a text or a toxicity not a number from 0 to 1.
    """
    table, found = _first_column(source, TEXT_COLUMNS if column is None else (column,))
    texts = check_texts(table, found)
    try:
        other, name = _first_column(source, TOXICITY_COLUMNS if toxicity_column is None else (toxicity_column,))
        toxicity = np.array([_number(v, row, name, source) for row, v in enumerate(other.columns[name])])
    except MissingColumnError as error:
        if toxicity_column is not None or error.row is not None:
            raise
        toxicity = np.full(len(texts), np.nan)
    return PromptFile(source, found, texts, toxicity)


def _first_column(source: str, names: Sequence[str]) -> tuple[Table, str]:
    for name in names[:-1]:
        try:
            table = read_table(source, [name])
        except MissingColumnError as error:
            if error.row is not None:  # some rows have it: another column's values are not these
                raise
            continue
        if name != "prompt" or isinstance(table.columns[name][0], str):  # RTP's `prompt` is a record
            return table, name
    return read_table(source, [names[-1]]), names[-1]


def _number(value: object, row: int, column: str, source: str) -> float:
    if value is None or str(value).strip() == "":
        return float("nan")
    try:
        number = float(str(value))
    except ValueError as error:
        raise InputError(f"data {source!r}: row {row}: expected a number in {column!r}, got {value!r}") from error
    if number < 0 or number > 1:  # a share in percent would make every prompt a toxic one
        raise InputError(f"data {source!r}: row {row}: expected a number from 0 to 1 in {column!r}, got {value!r}")
    return number


def read_preprompt(given: str) -> str:
    """The text of `--preprompt TEXT|FILE`, ended by one line break.

    InputError if it is empty, cannot be read, or is the name of a file that is not there.
    """
    path, is_name = Path(given), re.fullmatch(r"\S+\.(txt|md)", given) is not None
    try:
        text = path.read_text(encoding="utf-8-sig") if is_name or _is_file(path) else given
    except (OSError, ValueError) as error:
        raise InputError(f"--preprompt {given!r} cannot be read: {error}") from error
    if not text.strip():
        raise InputError(f"--preprompt: expected a text or a file that holds one, got nothing but space: {given!r}")
    return text.rstrip("\r\n") + "\n"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text too long for a name
        return False


@dataclass(frozen=True)
class Prefix:
    """The tokens of a pre-prompt, and how many special tokens the tokenizer puts in front of any text."""

    ids: tuple[int, ...]
    num_leading: int
    doubled: bool = False  # whether its text begins with the special tokens itself

    @property
    def num_context(self) -> int:
        """Tokens that are not counted: the pre-prompt's, and a text's first where nothing predicts it without one."""
        return len(self.ids) + (self.num_leading == 0)

    def before(self, tokens: TokenizedTexts) -> TokenizedTexts:
        """Each text with the pre-prompt in front; special tokens lead once."""
        head = np.array(self.ids, dtype=np.int32)
        joined = [np.concatenate([head, ids[self.num_leading :]]) for ids in tokens.ids]
        return TokenizedTexts(joined, tokens.special_ids, tokens.skip_special)


def make_prefix(text: str, tokenizer: PreTrainedTokenizerBase) -> Prefix:
    """The tokens of a pre-prompt with the special tokens that lead a text, and without those that end one."""
    added = added_tokens(tokenizer)
    whole = _whole(text, tokenizer, "--preprompt")
    return Prefix(tuple(added.open(whole)), len(added.first), added.doubled(whole))


def chat_of_prompts(tokenizer: PreTrainedTokenizerBase, preprompt: str | None) -> Chat:
    """How prompts become conversations that the assistant continues, the pre-prompt as the system's turn.

    ModelError or ConfigError if the tokenizer has no template for them.
    """
    system = None if preprompt is None else preprompt.rstrip("\n")
    return make_chat(tokenizer, "user", system, answered=True, system_flag="--preprompt")


def _whole(text: str, tokenizer: PreTrainedTokenizerBase, flag: str, chat: Chat | None = None) -> list[int]:
    """Ids of a text with all that the tokenizer adds; InputError if the tokenizer or the template cannot take it."""
    taker = "tokenizer" if chat is None else "chat template or tokenizer"
    try:
        return list(tokenizer(text if chat is None else chat.render(text), verbose=False)["input_ids"])
    except AuraError:  # a signal
        raise
    except Exception as error:  # its backend raises a bare Exception, and TypeError for a text that is no Unicode
        raise InputError(f"{flag}: the model's {taker} cannot take {text!a}: {brief(error)}") from error


@dataclass(frozen=True)
class TokenizedPrompts:
    """Of P prompts the token ids with the pre-prompt, and the keys of their noise (of the prompt alone)."""

    ids: list[list[int]]
    keys: list[bytes]
    # sha256 of the ids where prompts and pre-prompt alone do not tell them; None where the tokenizer's own are kept
    changed: str | None = None

    def batches(self, pairs: Sequence[Pair], rows_per_batch: int, *, padded: bool = False) -> list[list[Pair]]:
        """Cut `pairs` into batches of prompts of equal length, or where they are padded of similar lengths.

        The longest are first, in the batches too.
        """
        batches = []
        by_length = sorted(pairs, key=lambda pair: (-len(self.ids[pair[0]]), pair))
        for group in self._similar(by_length) if padded else self._equal(by_length):
            number = ceil(len(group) / rows_per_batch)
            cuts = [len(group) * b // number for b in range(number + 1)]  # even: a small rest costs a batch's steps
            batches += [group[a:b] for a, b in pairwise(cuts)]
        return batches

    def _equal(self, by_length: Sequence[Pair]) -> list[list[Pair]]:
        return [list(group) for _, group in groupby(by_length, key=lambda pair: len(self.ids[pair[0]]))]

    def _similar(self, by_length: Sequence[Pair]) -> list[list[Pair]]:
        groups: list[list[Pair]] = []
        for pair in by_length:
            if not groups or not self.are_similar([*groups[-1], pair]):
                groups.append([])
            groups[-1].append(pair)
        return groups

    def are_similar(self, pairs: Sequence[Pair]) -> bool:
        """Whether padding the prompts of `pairs` to the longest costs little: half the tokens, and some thousands."""
        lengths = [len(self.ids[prompt]) for prompt in {prompt for prompt, _ in pairs}]
        is_little = max(lengths) <= 2 * (min(lengths) + _SHORT)
        return is_little and (len(lengths) * max(lengths) <= _PREFILL_TOKENS or min(lengths) == max(lengths))


def tokenize_prompts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    how: Decoding,
    *,
    prefix: Prefix | None = None,
    chat: Chat | None = None,
    flag: str = "--prompt",
) -> TokenizedPrompts:
    """Token ids of prompts after `prefix`, or rendered by `chat`: the tokenizer's first tokens once, and no last ones.

    Raises InputError for a prompt without tokens or one that the tokenizer or the template cannot take, ConfigError if
    prompt and continuation are longer than the model's positions, ModelError if the tokenizer is another model's.
    """
    added = added_tokens(tokenizer)
    wholes = [_whole(text, tokenizer, flag, chat) for text in texts]
    own = [added.open(whole) for whole in wholes]
    for text, ids in zip(texts, own, strict=True):
        if not ids:
            raise InputError(f"{flag}: expected a prompt with at least one token, got {text!r}")
    added.say_doubled(
        sum(map(added.doubled, wholes) if chat is None else map(added.begins, texts)), len(texts), "prompts"
    )
    led = prefix if chat is None else None
    joined = own if led is None else [[*led.ids, *ids[led.num_leading :]] for ids in own]
    check_positions(config, max(map(len, joined)) + how.max_new_tokens, "--max-new-tokens with the prompt")
    check_vocabulary(config, max(map(max, joined)))
    is_changed = chat is not None or own != wholes or (led is not None and led.doubled)
    digest = hashlib.sha256(repr(joined).encode()).hexdigest() if is_changed else None
    return TokenizedPrompts(joined, prompt_keys(texts, how.seed), digest)
