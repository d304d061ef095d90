"""A served model as lm-eval takes it: lm-eval's `local-completions`, with our tokens, requests and errors.

lm-eval's own client keeps the last tokens that a tokenizer adds, knows no pre-prompt, and answers what fails with
tracebacks. So its requests go through `Server`, as continuations and perplexity do.
"""

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aura_dist.errors import InputError, ServerError
from aura_dist.evaluation.harness import check_answers, summed, windows_after
from aura_dist.evaluation.prompts import make_prefix
from aura_dist.evaluation.sampling import Decoding, prompt_keys
from aura_dist.models.load import POSITIONS_FIELDS
from aura_dist.text.added import added_tokens
from aura_dist.text.chat import Chat

if TYPE_CHECKING:
    from aura_dist.evaluation.server import Server

logger = logging.getLogger(__name__)

_MAX_NEW_TOKENS = 256  # of tasks that do not say it, as in lm-eval


def make_served_harness(server: "Server", preprompt: str | None, chat: Chat | None) -> Any:
    """A `TemplateLM` of lm-eval on a server."""
    from jinja2 import TemplateError
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    added = added_tokens(server.tokenizer)
    prefix = None if preprompt is None else make_prefix(preprompt, server.tokenizer)

    class ServedHarness(TemplateLM):  # type: ignore[misc]
        tokenizer = copy.deepcopy(server.tokenizer)
        tokenizer_name = str(server.tokenizer.name_or_path).replace("/", "__")
        max_length = _longest(server)
        said_no_system = False

        @property
        def eot_token_id(self) -> Any:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> Any:
            bos = self.tokenizer.bos_token_id
            return self.eot_token_id if bos is None else bos

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is False:
                return list(self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])
            return added.open(self.tokenizer(string, verbose=False)["input_ids"])

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            def rendered(turns: list[dict[str, str]]) -> str:
                return str(
                    self.tokenizer.apply_chat_template(
                        turns,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        continue_final_message=not add_generation_prompt,
                    )
                )

            try:
                return rendered(chat_history)
            except TemplateError:  # it may take no system's turn: lm-eval's own models leave that out
                others = [turn for turn in chat_history if turn["role"] != "system"]
                if len(others) == len(chat_history):
                    raise
                if not self.said_no_system:
                    logger.warning(
                        "the model's chat template takes no system's turn: descriptions of tasks are left out"
                    )
                    self.said_no_system = True
                return rendered(others)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            """(Log-likelihood, whether greedy) of each answer; a context that is too long loses its beginning."""
            rows = [[*context, *answer][-(self.max_length - 1) :] for _, context, answer in requests]
            for ids, (_, _, answer) in zip(rows, requests, strict=True):
                if not 0 < len(answer) < len(ids):
                    raise InputError(
                        f"--tasks: expected answers of 1 to {self.max_length - 2} tokens, because the model reads "
                        f"{self.max_length} with what is before them, got one of {len(answer)}; leave the task out"
                    )
            found: dict[int, tuple[float, bool]] = {}
            for row, scored in server.score_all(rows):
                length = len(requests[row][2])
                if scored.greedy is None:
                    raise ServerError(
                        f"--server {server.client.url}: expected it to tell the likeliest tokens of a prompt "
                        "(top_logprobs) for --tasks, got none; leave --tasks out"
                    )
                found[row] = sum(scored.logprobs[-length:]), all(scored.greedy[-length:])
            return [found[row] for row in range(len(rows))]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            check_answers(chat)
            return summed((self._windows(request.args[0]) for request in requests), self._loglikelihood_tokens)

        def _windows(self, text: str) -> Any:
            ids, longest = self.tok_encode(text), self.max_length - 2  # the server writes one token more
            if prefix is not None:
                return windows_after(prefix.ids, ids[prefix.num_leading :], longest)
            return map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=longest, context_len=1
                ),
            )

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            made: dict[int, str] = {}
            # a task that samples several answers sends the same request several times
            keys = prompt_keys([request.args[0] for request in requests], 0)
            for some in server.client.each(
                lambda i: self._continued(server.seed(keys[i], 0), *requests[i].args),
                range(len(requests)),
                server.received,
            ):
                made.update(dict(some))
            return [made[i] for i in range(len(requests))]

        def _continued(self, seed: int, context: str, given: dict[str, Any]) -> str:
            kwargs = normalize_gen_kwargs(given, _MAX_NEW_TOKENS)
            eos = self.tokenizer.decode([self.eot_token_id]) if self.eot_token_id is not None else None
            until = [stop for stop in handle_stop_sequences(kwargs.pop("until", None), eos=eos) if stop]
            longest = int(kwargs.pop("max_gen_toks"))
            temperature = float(kwargs.get("temperature") or 0.0) if kwargs.get("do_sample") else 0.0
            top_p, top_k = float(kwargs.get("top_p") or 1.0), int(kwargs.get("top_k") or 0)
            how = Decoding(1, longest, temperature, top_p if temperature else 1.0, 0, top_k if temperature else 0)
            ids = self.tok_encode(context)[-(self.max_length - longest) :]
            text = server.continuation(ids, [], how, seed, until)["text"]
            return str(postprocess_generated_text(text, until, None))

    return ServedHarness()


def _longest(server: "Server") -> int:
    """Most tokens of a prompt with its continuation, as the server says, else as the configuration does."""
    text = server.config.get_text_config(decoder=True)
    positions = next((n for n in (getattr(text, f, None) for f in POSITIONS_FIELDS) if n is not None), 2048)
    return min(int(positions), server.served.max_tokens or int(positions))
