"""A text that stands before every prompt and text, on lines of its own, and is never scored itself.

Tokens are joined, not texts: what follows the pre-prompt has the same tokens as without it, so that figures with and
without one are of the same tokens.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from aura_dist.errors import InputError, brief
from aura_dist.text.tokens import TokenizedTexts


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
    try:
        whole = list(tokenizer(text, verbose=False)["input_ids"])
        bare = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # the backend raises a bare Exception
        raise InputError(f"--preprompt: the model's tokenizer cannot take {text!a}: {brief(error)}") from error
    starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    num_leading = next(starts, 0)
    return Prefix(tuple(whole[: num_leading + len(bare)]), num_leading)
