"""A server continues prompts and scores texts: any that speaks OpenAI's completions (vLLM, SGLang, TGI, llama.cpp).

Prompts are sent as our token ids, so that tokens are the same as in this process. A server that refuses ids gets the
text of these ids, or the turns of a chat, and makes tokens of its own. Each continuation has a seed of its own, so one
server draws the same again, but not what a model in this process draws.

Likelihoods of a prompt's tokens come from vLLM's `prompt_logprobs`, or from `echo` with `logprobs`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from aura_dist.errors import ConfigError, ServerError
from aura_dist.evaluation.client import Client, RefusedError
from aura_dist.evaluation.engines import Asked, Write, fixing_alike
from aura_dist.evaluation.prompts import Pair
from aura_dist.evaluation.sampling import Decoding, sample_key
from aura_dist.evaluation.served import Served, check_statement, find_served
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.statement import ASKED
from aura_dist.interventions.use import load_intervention
from aura_dist.models.load import ModelSource, generation_of
from aura_dist.models.on_disk import OnDisk
from aura_dist.ranks.progress import Progress
from aura_dist.ranks.team import Team
from aura_dist.text.added import added_tokens
from aura_dist.text.chat import Chat
from aura_dist.text.tokens import TokenizedTexts

logger = logging.getLogger(__name__)

PROBE = "The best thing about the new library is"
_PROBE_TOKENS = 8
_SEED_BITS = 31  # llama.cpp's seeds have 32, signed in some clients
_MOST_STOPS = 4  # that OpenAI's own server takes
_NOT_TAKEN = (400, 404, 405, 422, 501)  # the server takes no such request, whatever is in it
# turns off what servers add to the softmax by themselves, such as values of generation_config.json
_NOTHING_ELSE = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(frozen=True)
class Dialect:
    """How a server is asked for continuations."""

    ids: bool  # prompts are token ids, else texts
    extended: bool  # requests have fields that OpenAI's own have not

    @property
    def identity(self) -> dict[str, bool]:
        return {"token_ids": self.ids, "extended": self.extended}


DIALECTS = (Dialect(True, True), Dialect(True, False), Dialect(False, True), Dialect(False, False))
# name → fields of a request for the likelihoods of a prompt's tokens
LIKELIHOODS: dict[str, dict[str, Any]] = {
    "prompt_logprobs": {"prompt_logprobs": 1},
    "echo": {"echo": True, "logprobs": 1},
}


@dataclass(frozen=True)
class Scored:
    """Of each token of a prompt but the first: its log-likelihood, and whether it is the most likely one."""

    logprobs: list[float]
    greedy: list[bool] | None  # None where the server does not tell


@dataclass(frozen=True)
class Expected:
    """The model that a server is to serve: all but its weights, and the intervention at `directory`."""

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    stop_ids: frozenset[int]
    intervention: Intervention | None
    directory: str | None
    strength: float


@dataclass(frozen=True)
class Server:
    """A served model, and the checkpoint's tokenizer and configuration; `received` returns a signal that has come."""

    client: Client
    served: Served
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    stop_ids: frozenset[int]
    intervention: Intervention | None
    strength: float
    chat: bool = False  # whether prompts are chats
    received: Callable[[], int | None] = lambda: None
    command: str | None = None  # that started it, if it was started for this run
    asks: float | None = None  # the strength that requests ask for, where they can
    _found: dict[str, str] = field(default_factory=dict)

    def acting(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def about(self) -> dict[str, Any]:
        model = {"dtype": None, "adapter": None, "own_code": None, "quantization": None}
        found = self.served.fingerprint
        dialect, probe = self._tried
        asked = {} if self.asks is None else {"asked_strength": self.asks}
        server = {"url": self.client.url, **self._identity, **asked, "dialect": dialect.identity, "probe": probe}
        return {"model": {**model, "fingerprint": found}, "model_fingerprint": found, "server": server}

    def fixing(self) -> dict[str, Any]:
        return {
            "server": self._identity,
            "dialect": self.dialect.identity,
            "stop_ids": sorted(self.stop_ids),
            "probe": self._tried[1]["text"],
            **fixing_alike(self.tokenizer, self.intervention, self.strength),
        }

    @property
    def _identity(self) -> dict[str, Any]:
        """The flags of a server that was started for this run may change its numbers, so they count too."""
        return {**self.served.identity, **({} if self.command is None else {"command": self.command})}

    @cached_property
    def _tried(self) -> tuple[Dialect, dict[str, Any]]:
        """The first dialect that the server takes, and the greedy continuation of a probe in it."""
        how = Decoding(1, _PROBE_TOKENS, 0.0, 1.0, 0)
        ids = added_tokens(self.tokenizer).open(self.tokenizer(PROBE, verbose=False)["input_ids"])
        refusal: RefusedError | None = None
        for dialect in DIALECTS:
            body = self._prompted(dialect, ids, [{"role": "user", "content": PROBE}])
            try:
                answer = self._post(self._path(dialect), body | self._sampling(dialect, how, 0))
            except RefusedError as error:
                if error.status not in _NOT_TAKEN:
                    raise
                refusal = error  # the last dialect asks for least, so its refusal says most
                continue
            read = (answer.get("usage") or {}).get("prompt_tokens")
            if dialect.ids and read not in (None, len(ids)):
                continue  # it took the ids for something else
            return dialect, {"prompt": PROBE, **self._record(answer)}
        path = self._path(DIALECTS[-1])
        raise ServerError(
            f"--server {self.client.url}: expected one that takes prompts at /{path}, got one that takes none"
            f"{'' if refusal is None else f': {refusal}'}"
        )

    @property
    def dialect(self) -> Dialect:
        return self._tried[0]

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        own = {} if self.asks is None else {"vllm_xargs": {ASKED: self.asks}}
        return self.client.post(path, body | own)

    def _path(self, dialect: Dialect) -> str:
        return "chat/completions" if self.chat and not dialect.ids else "completions"

    def _prompted(self, dialect: Dialect, ids: Sequence[int], turns: list[dict[str, str]]) -> dict[str, Any]:
        """A request's prompt: ids, turns of a chat, or the text of the ids without the first tokens that are added."""
        if dialect.ids:
            return {"prompt": list(ids)}
        if self.chat:
            return {"messages": turns}
        first = added_tokens(self.tokenizer).first
        bare = ids[len(first) :] if tuple(ids[: len(first)]) == first else ids
        return {"prompt": self.tokenizer.decode(bare, clean_up_tokenization_spaces=False)}

    def _sampling(self, dialect: Dialect, how: Decoding, seed: int) -> dict[str, Any]:
        plain = {
            "model": self.served.model, "max_tokens": how.max_new_tokens, "temperature": how.temperature,
            "top_p": how.top_p, "seed": seed,
        }  # fmt: skip
        if not dialect.extended:
            if how.top_p == 1:  # TGI refuses it; servers that take more get it: they may have a default of their own
                del plain["top_p"]
            if how.top_k:
                raise ServerError(
                    f"--server {self.client.url}: expected one that takes top_k for --top-tokens, got one that refuses "
                    "it; leave --top-tokens out"
                )
            return plain
        more = {"top_k": how.top_k or -1, "stop_token_ids": sorted(self.stop_ids), "return_token_ids": True}
        return {**plain, **_NOTHING_ELSE, **more, "skip_special_tokens": True}

    def _record(self, answer: Mapping[str, Any], stop: Sequence[str] = ()) -> dict[str, Any]:
        """`text`, `num_tokens` and, where the server tells them, `ids` of a continuation, without its stop token.

        `stop` are texts that may have ended it in place of that token.
        """
        choice = self._choice(answer)
        ids = choice.get("token_ids")
        if isinstance(ids, list):
            end = next((t for t, token in enumerate(ids) if token in self.stop_ids), len(ids))
            text = str(self.tokenizer.decode(ids[:end], skip_special_tokens=True))
            return {"text": text, "num_tokens": end, "ids": ids[:end]}
        text = choice.get("text", (choice.get("message") or {}).get("content"))
        if not isinstance(text, str):
            raise ServerError(f"--server {self.client.url}: expected a text in its answer, got {sorted(choice)}")
        number = (answer.get("usage") or {}).get("completion_tokens")
        if number and choice.get("finish_reason") == "stop" and not stop:
            number -= 1  # servers count the stop token
        return {"text": text, "num_tokens": number}

    def _choice(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
            raise ServerError(
                f"--server {self.client.url}: expected an answer with choices, as OpenAI-compatible servers give it, "
                f"got {sorted(answer)}"
            )
        return choices[0]

    @staticmethod
    def seed(key: bytes, sample: int) -> int:
        """A request's seed for a key of `prompt_keys`."""
        return sample_key(key, sample) & ((1 << _SEED_BITS) - 1)

    def continuation(
        self, ids: Sequence[int], turns: list[dict[str, str]], how: Decoding, seed: int, stop: Sequence[str] = ()
    ) -> dict[str, Any]:
        """One continuation of a prompt: `text`, `num_tokens`, and maybe `ids`.

        It may end at a text of `stop`, and may hold it or have more after it: the caller cuts it.
        """
        body = self._prompted(self.dialect, ids, turns) | self._sampling(self.dialect, how, seed)
        if stop:
            body["stop"] = list(stop[:_MOST_STOPS])
        return self._record(self._post(self._path(self.dialect), body), stop)

    def continue_pairs(self, asked: Asked, pairs: Sequence[Pair], how: Decoding, write: Write) -> None:
        def ask(pair: Pair) -> dict[str, Any]:
            prompt, sample = pair
            turns = [] if asked.chat is None else asked.chat.turns(asked.texts[prompt])
            seed = self.seed(asked.tokens.keys[prompt], sample)
            return self.continuation(asked.tokens.ids[prompt], turns, how, seed)

        self._check_room(max(len(asked.tokens.ids[p]) for p, _ in pairs) + how.max_new_tokens, "--max-new-tokens")
        progress = Progress("generate", len(pairs), len(pairs), "continuations", "continuations")
        _ = self.dialect  # found once, not by all threads
        for made in self.client.each(ask, pairs, self.received):
            write([{"prompt": prompt, "sample": sample, **record} for (prompt, sample), record in made])
            progress.advance(len(made), len(made))
        progress.finish()

    def _check_room(self, num_tokens: int, flag: str) -> None:
        longest = self.served.max_tokens
        if longest is not None and num_tokens > longest:
            raise ServerError(
                f"--server {self.client.url}: expected at most {longest} tokens of a prompt with its continuation "
                f"(vLLM's --max-model-len), got {num_tokens}; give smaller {flag}, or start it with more"
            )

    def score(self, ids: Sequence[int]) -> Scored:
        """Log-likelihoods of a prompt's tokens, after the first; ServerError if the server tells none."""
        for way in [self._found["likelihoods"]] if self._found else LIKELIHOODS:
            body = {"model": self.served.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0}
            try:
                choice = self._choice(self._post("completions", body | LIKELIHOODS[way]))
            except RefusedError as error:
                if self._found or error.status not in _NOT_TAKEN:
                    raise
                continue
            scored = _scored(choice, ids)
            if scored is not None:
                self._found["likelihoods"] = way
                return scored
        raise ServerError(
            f"--server {self.client.url}: expected one that tells the likelihoods of a prompt's tokens "
            "(prompt_logprobs, or echo with logprobs), got one that does not; measure perplexity and likelihoods "
            "without --server, or with vLLM"
        )

    def score_all(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, Scored]]:
        """(Index, likelihoods) of each row of ids, in any order."""
        if not rows:
            return
        for some in (range(1), range(1, len(rows))):  # the first alone, because it finds how to ask
            for found in self.client.each(lambda row: self.score(rows[row]), some, self.received):
                yield from found

    def losses(self, tokens: TokenizedTexts, num_context: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        first = max(1, num_context)
        counts = np.maximum(tokens.num_tokens.astype(np.int64) - first, 0)
        sums = np.where(counts > 0, np.nan, 0.0)
        counted = np.flatnonzero(counts)
        self._check_room(int(tokens.num_tokens.max()) + 1, "--max-tokens")
        for row, scored in self.score_all([tokens.ids[text].tolist() for text in counted]):
            sums[counted[row]] = -np.sum(scored.logprobs[first - 1 :])
        return sums, counts

    def harness(self, preprompt: str | None, chat: Chat | None) -> Any:
        from aura_dist.evaluation.served_harness import make_served_harness

        # lm-eval has put its contexts into the chat template: their text is a prompt, not a turn
        return make_served_harness(replace(self, chat=False) if self.chat else self, preprompt, chat)


def _scored(choice: Mapping[str, Any], ids: Sequence[int]) -> Scored | None:
    """What a choice tells of a prompt's tokens; None where it tells of none, or of another number of tokens."""
    of_prompt = choice.get("prompt_logprobs")
    if isinstance(of_prompt, list) and len(of_prompt) == len(ids):
        entries = [_mapping(_mapping(one).get(str(token))) for token, one in zip(ids[1:], of_prompt[1:], strict=True)]
        told, ranks = [one.get("logprob") for one in entries], [one.get("rank") for one in entries]
        if _are_numbers(told):
            return Scored(list(map(float, told)), [rank == 1 for rank in ranks] if _are_numbers(ranks) else None)
    echoed = _mapping(choice.get("logprobs"))
    logprobs, best = echoed.get("token_logprobs"), echoed.get("top_logprobs")
    if not isinstance(logprobs, list) or len(logprobs) not in (len(ids), len(ids) + 1):
        return None
    logprobs = logprobs[1 : len(ids)]
    tops = [list(_mapping(one).values()) for one in best[1 : len(ids)]] if isinstance(best, list) else []
    if not _are_numbers(logprobs):
        return None
    all_told = len(tops) == len(logprobs) and all(top and _are_numbers(top) for top in tops)
    greedy = [one >= max(top) for one, top in zip(logprobs, tops, strict=True)] if all_told else None
    return Scored(list(map(float, logprobs)), greedy)


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _are_numbers(values: Sequence[Any]) -> TypeGuard[Sequence[float]]:
    return all(isinstance(value, int | float) for value in values)


def check_one_process(team: Team) -> None:
    """ConfigError in a launch of several processes, because one sends all requests."""
    if team.world.layout.world_size > 1:
        raise ConfigError(
            f"--server: expected one process, got {team.world.layout.world_size}; start it without a launcher, and "
            "give more --requests-in-flight where the server has room"
        )


def read_expected(source: ModelSource, intervention_dir: str | None, strength: float) -> Expected:
    """Tokenizer and configuration of `source`, and the intervention, checked before a server is asked for them.

    Errors as of `load_intervention`.
    """
    subject = OnDisk(source)
    intervention = None
    if intervention_dir is not None:
        intervention = load_intervention(intervention_dir, source, subject.config, subject.sites())
        _say_made_for(intervention, intervention_dir, source.name)
    ends = generation_of(source, subject.config).eos_token_id
    ids = ends if isinstance(ends, list) else [subject.tokenizer.eos_token_id if ends is None else ends]
    stop_ids = frozenset(int(i) for i in ids if i is not None)
    return Expected(source, subject.tokenizer, subject.config, stop_ids, intervention, intervention_dir, strength)


def find_server(
    client: Client,
    expected: Expected,
    name: str | None,
    *,
    chat: bool,
    received: Callable[[], int | None],
    command: str | None = None,
) -> Server:
    """The server at `client`, once all that it says of itself agrees with what is expected.

    `name` is what it calls the model, if that is another name, and `command` what started it for this run. ServerError
    if the server cannot be reached, or serves another model or intervention.
    """
    served = find_served(client, expected.source.name, name)
    asks = check_statement(served.statement, expected.intervention, expected.strength, expected.directory, client.url)
    return Server(
        client, served, expected.tokenizer, expected.config, expected.stop_ids, expected.intervention,
        expected.strength, chat, received, command, asks,
    )  # fmt: skip


def _say_made_for(intervention: Intervention, directory: str, model: str) -> None:
    made_for = (intervention.meta.get("model") or {}).get("name")
    if made_for and Path(made_for).name != Path(model).name:
        logger.warning(
            "--intervention %r was made for %r: whether the served weights of %r are the same is not checked",
            directory, made_for, model,
        )  # fmt: skip
