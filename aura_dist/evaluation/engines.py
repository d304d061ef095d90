"""What continues prompts and scores texts: a model in this process (here), or a server (`server.py`)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from aura_dist.evaluation.generation import generate, stop_ids
from aura_dist.evaluation.harness import make_harness
from aura_dist.evaluation.perplexity import negative_log_likelihoods
from aura_dist.evaluation.prompts import Pair, TokenizedPrompts
from aura_dist.evaluation.sampling import Decoding
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.use import LoadedModel
from aura_dist.ranks.signals import StopFlag
from aura_dist.ranks.team import Team
from aura_dist.text.chat import Chat
from aura_dist.text.tokenizer import tokenizer_digest
from aura_dist.text.tokens import TokenizedTexts

Write = Callable[[list[dict[str, object]]], None]


@dataclass(frozen=True)
class Asked:
    """Prompts that are to be continued: their tokens, and what these were made of."""

    tokens: TokenizedPrompts
    texts: Sequence[str]
    chat: Chat | None


class Engine(Protocol):
    """One way to run a causal language model, with or without an intervention."""

    @property
    def intervention(self) -> Intervention | None: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def config(self) -> PretrainedConfig: ...

    def acting(self) -> AbstractContextManager[Any]:
        """Context in which the intervention acts."""

    def about(self) -> dict[str, Any]:
        """The entry `model` of results, without its name, and entries of its own beside it."""

    def fixing(self) -> dict[str, Any]:
        """What a continuation depends on beside the prompt and the sampling."""

    def losses(self, tokens: TokenizedTexts, num_context: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """As `negative_log_likelihoods`."""

    def continue_pairs(self, asked: Asked, pairs: Sequence[Pair], how: Decoding, write: Write) -> None:
        """As `generate`."""

    def harness(self, preprompt: str | None, chat: Chat | None) -> Any:
        """The model as lm-eval takes it."""


@dataclass(frozen=True)
class InProcess:
    """The model that this launch has loaded; all its ranks call the methods alike."""

    loaded: LoadedModel
    dtype: str
    strength: float
    team: Team
    stop: StopFlag
    tokens_per_batch: int  # of `losses`
    rows_per_batch: int  # of `continue_pairs`

    @property
    def intervention(self) -> Intervention | None:
        return self.loaded.intervention

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer

    @property
    def config(self) -> PretrainedConfig:
        config: PretrainedConfig = self.loaded.model.config
        return config

    def acting(self) -> AbstractContextManager[Any]:
        return self.loaded.intervened(self.strength)

    def about(self) -> dict[str, Any]:
        found = self.loaded.fingerprint
        model = {"dtype": self.dtype, **self.loaded.extras, "fingerprint": found}
        return {"model": model, "model_fingerprint": found}

    def fixing(self) -> dict[str, Any]:
        return {
            "model": self.loaded.fingerprint,
            "dtype": self.dtype,
            "stop_ids": sorted(stop_ids(self.loaded.model, self.tokenizer)),  # generation_config.json may name them
            **fixing_alike(self.tokenizer, self.intervention, self.strength),
        }

    def losses(self, tokens: TokenizedTexts, num_context: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        return negative_log_likelihoods(
            self.loaded.model, tokens, self.tokens_per_batch,
            num_context=num_context, team=self.team, received=lambda: self.stop.received,
        )  # fmt: skip

    def continue_pairs(self, asked: Asked, pairs: Sequence[Pair], how: Decoding, write: Write) -> None:
        generate(self.loaded, asked.tokens, pairs, how, self.rows_per_batch, self.team, self.stop, write)

    def harness(self, preprompt: str | None, chat: Chat | None) -> Any:
        return make_harness(self.loaded.model, self.tokenizer, preprompt, chat)


def fixing_alike(
    tokenizer: PreTrainedTokenizerBase, intervention: Intervention | None, strength: float
) -> dict[str, Any]:
    """What a continuation depends on, whichever engine makes it."""
    return {
        "tokenizer": tokenizer_digest(tokenizer),
        "intervention": None if intervention is None else [intervention.digest, strength],
    }
