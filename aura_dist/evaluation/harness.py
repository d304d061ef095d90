"""lm-eval's wrapper of a model, with the token ids that the rest of the product has.

lm-eval keeps the last tokens that a tokenizer adds to a context, and takes the length of that context to find where the
answer begins; it knows no pre-prompt for the likelihood of whole texts.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aura_dist.errors import AuraError, ConfigError
from aura_dist.evaluation.by_layer import TwoPasses
from aura_dist.evaluation.prompts import make_prefix
from aura_dist.models.layerwise import executor_of
from aura_dist.text.added import added_tokens
from aura_dist.text.chat import Chat, make_chat

logger = logging.getLogger(__name__)

_BATCH_SIZE = 8  # requests in one forward


def make_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, preprompt: str | None, chat: Chat | None
) -> Any:
    """An `HFLM` of lm-eval on a model that is loaded; the model and the tokenizer are not changed."""
    from lm_eval.models.huggingface import HFLM

    added = added_tokens(tokenizer)
    prefix = None if preprompt is None else make_prefix(preprompt, tokenizer)
    executor = executor_of(model)
    passes = None if executor is None else TwoPasses(executor, model.get_input_embeddings().num_embeddings)
    if chat is not None and not _takes_system(tokenizer):
        logger.warning("the model's chat template takes no system's turn: lm-eval leaves out the descriptions of tasks")

    class Harness(HFLM):  # type: ignore[misc]
        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **_: Any,
        ) -> list[int]:
            if add_special_tokens is False:
                ids = list(self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])
            else:
                ids = added.open(self.tokenizer(string, verbose=False)["input_ids"])
            return ids[-(left_truncate_len or 0) :]

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> tuple[Any, Any]:
            rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
            padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
            return padded["input_ids"], padded["attention_mask"]

        def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> Any:
            answer = partial(super()._loglikelihood_tokens, *args, **kwargs)
            return answer() if passes is None else passes.run(answer)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._model_call(inps, *args, **kwargs) if passes is None else passes.call(inps)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            if passes is not None:
                raise ConfigError(
                    "--sharding layers: expected tasks that compare likelihoods, got one that generates a text, which "
                    "takes all weights for each token; leave the task out, or use another --sharding"
                )
            return super().generate_until(requests, disable_tqdm)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            check_answers(chat)
            if prefix is None:
                return list(super().loglikelihood_rolling(requests, disable_tqdm))
            texts = [self.tok_encode(request.args[0])[prefix.num_leading :] for request in requests]
            windows = [windows_after(prefix.ids, text, self.max_length) for text in texts]
            return summed(windows, partial(self._loglikelihood_tokens, disable_tqdm=disable_tqdm))

    return Harness(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=_BATCH_SIZE)


# ids that are read first, and ids whose likelihood is taken
Window = tuple[list[int], list[int]]


def check_answers(chat: Chat | None) -> None:
    """ConfigError for a task that takes the likelihood of whole texts, where texts go into a chat template."""
    if chat is not None:
        raise ConfigError(
            "--chat: expected tasks that ask for an answer, got one that takes the likelihood of whole texts, which "
            "lm-eval puts into no chat template; leave the task or --chat out"
        )


def summed(texts: Iterable[Iterable[Window]], likelihoods: Callable[[list[Any]], Iterable[Any]]) -> list[float]:
    """The log-likelihood of each text, the sum over its windows.

    `likelihoods` takes all windows as lm-eval's requests; of each it returns the log-likelihood, and more after it.
    """
    windows = [list(own) for own in texts]
    found = iter(likelihoods([(None, *window) for own in windows for window in own]))
    return [sum((next(found)[0] for _ in own), 0.0) for own in windows]


def windows_after(context: Sequence[int], text: Sequence[int], longest: int) -> Iterator[Window]:
    """Cut a text into windows that a model of `longest` positions can read: what is read first, and what is scored.

    Each token of the text is scored once. Each window begins with `context`, then has as much of the text before it as
    there is room for. ConfigError if the context leaves no room.
    """
    room = longest - len(context)  # the last scored token is not read, so there is room for one more before it
    if room < 1:
        raise ConfigError(
            f"--preprompt: expected fewer tokens than the model's {longest} positions, got {len(context)}; shorten it"
        )
    for start in range(0, len(text), room):
        stop = min(start + room, len(text))
        yield [*context, *text[max(0, stop - room - 1) : start]], list(text[start:stop])


def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        make_chat(tokenizer, "user", "Be brief.", answered=True)
    except AuraError:
        return False
    return True
