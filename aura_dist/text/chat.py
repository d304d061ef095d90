"""A tokenizer's chat template, applied to a text as one turn of a conversation."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aura_dist.errors import AuraError, ConfigError, InputError, ModelError, brief
from aura_dist.text.added import AddedTokens, added_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chat:
    """How a text becomes a conversation: a system's turn or none, then the text as the turn of one role."""

    tokenizer: "PreTrainedTokenizerBase"
    template: str
    added: AddedTokens
    role: str
    system: str | None = None
    answered: bool = False  # whether the assistant's turn is opened after the text

    @property
    def identity(self) -> dict[str, Any]:
        """What the rendered texts depend on beside the texts."""
        return {
            "role": self.role,
            "system": self.system,
            "template": hashlib.sha256(self.template.encode()).hexdigest(),
        }

    def turns(self, text: str) -> list[dict[str, str]]:
        """The conversation as turns, first tokens of each left out, because a conversation has them once."""
        turns = [] if self.system is None else [("system", self.system)]
        turns.append((self.role, text))
        return [{"role": role, "content": said.removeprefix(self.added.first_text)} for role, said in turns]

    def render(self, text: str) -> str:
        """The conversation as text. Raises whatever the template or the library raises."""
        return str(
            self.tokenizer.apply_chat_template(
                self.turns(text),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=self.answered,
            )
        )

    def render_all(self, texts: Sequence[str], source: str) -> list[str]:
        """Each text rendered; InputError names the first row that the template cannot take."""
        rendered = []
        for row, text in enumerate(texts):
            try:
                rendered.append(self.render(text))
            except AuraError:  # a signal
                raise
            except Exception as error:  # a template can fail in any way
                raise InputError(
                    f"data {source!r}: row {row}: the model's chat template cannot take it: {brief(error)}"
                ) from error
        return rendered


def make_chat(
    tokenizer: "PreTrainedTokenizerBase",
    role: str,
    system: str | None = None,
    *,
    answered: bool = False,
    system_flag: str = "--system",
) -> Chat:
    """The tokenizer's own template for texts of `role`, tried before any text is rendered.

    Raises ModelError if the tokenizer has no template, or it is broken or takes no turn of that role alone; ConfigError
    naming `system_flag` if it takes no system's turn, or if the tokenizer would split what separates the turns.
    """
    if getattr(tokenizer, "split_special_tokens", False):
        raise ConfigError(
            "--chat: expected a tokenizer that reads the template's special tokens, got split_special_tokens = true; "
            "add --tokenizer-option split_special_tokens=false, or leave --chat out"
        )
    chat = Chat(tokenizer, _template(tokenizer), added_tokens(tokenizer), role, answered=answered)
    if _probe(chat, "a", "--chat") == _probe(chat, "b", "--chat"):
        raise ModelError(f"--chat: the model's chat template leaves out a text of the {role}; leave --chat out")
    if "strftime_now" in chat.template:
        logger.warning("the chat template can write today's date: on another day the tokens may be others")
    if system is None:
        return chat
    whole = replace(chat, system=system)
    try:
        ignored = _probe(whole, "a", system_flag) == _probe(replace(whole, system=f"{system}?"), "a", system_flag)
    except ModelError as error:
        raise ConfigError(f"{error}; leave {system_flag} out") from error
    if ignored:
        raise ConfigError(f"{system_flag}: the model's chat template leaves out a system's text; leave it out")
    return whole


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    found = tokenizer.chat_template
    if isinstance(found, dict):
        if "default" not in found:
            raise ModelError(
                "--chat: expected a tokenizer with one chat template or one named 'default', got "
                f"{', '.join(sorted(found)) or 'none'}; rename the one that is meant"
            )
        found = found["default"]
    if not found:
        raise ModelError(
            "--chat: expected a tokenizer with a chat template, got one without; leave --chat out, or take a chat model"
        )
    return str(found)


def _probe(chat: Chat, text: str, flag: str) -> str:
    try:
        return chat.render(text)
    except AuraError:  # a signal
        raise
    except Exception as error:  # a template can fail in any way
        turns = f"a conversation of one turn of the {chat.role}" if chat.system is None else "a system's turn"
        raise ModelError(f"{flag}: the model's chat template refuses {turns}: {brief(error)}") from error
