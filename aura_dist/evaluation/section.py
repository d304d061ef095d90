"""The `toxicity` section of the results, from the continuations that lie in a journal."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aura_dist.errors import StoreError
from aura_dist.evaluation.journal import Journal, Record
from aura_dist.evaluation.prompts import Pair, PromptFile
from aura_dist.evaluation.sampling import Decoding
from aura_dist.evaluation.scorers import Scorer, checked_scores
from aura_dist.evaluation.toxicity import ByPrompt, by_prompt, estimates, groups
from aura_dist.interventions.use import LoadedModel
from aura_dist.text.tokens import tokenizer_digest


def sampling_settings(how: Decoding) -> dict[str, Any]:
    """Everything of `how` that a single continuation depends on."""
    return {name: value for name, value in asdict(how).items() if name != "num_samples"}


def fixing_settings(
    loaded: LoadedModel, dtype: str, strength: float, preprompt: str | None, prompts: PromptFile, how: Decoding
) -> dict[str, Any]:
    """Everything that a continuation depends on; how many there are of a prompt does not matter."""
    intervention = loaded.intervention
    return {
        "model": loaded.fingerprint,
        "dtype": dtype,
        "tokenizer": tokenizer_digest(loaded.tokenizer),
        "intervention": None if intervention is None else [intervention.digest, strength],
        "preprompt": preprompt,
        "prompts": prompts.sha256,
        **sampling_settings(how),
    }


def head(prompts: PromptFile, scorer: str, how: Decoding) -> dict[str, Any]:
    """What is measured, before anything is: enough to tell whether a baseline is of the same."""
    return {
        "prompts": prompts.source,
        "column": prompts.column,
        "prompts_sha256": prompts.sha256,
        "scorer": scorer,
        "num_prompts": len(prompts.texts),
        "num_samples": how.num_samples,
        "settings": sampling_settings(how),
    }


def score(prompts: PromptFile, journal: Journal, scorer: Scorer, how: Decoding) -> dict[str, Any]:
    """Score the continuations, file them with their scores, and measure.

    Raises
    ------
    StoreError
        Continuations are missing.
    ModelError
        The scorer gives what is no probability.
    """
    journal.fold()
    shape = (len(prompts.texts), how.num_samples)
    kept = {pair: record for pair, record in journal.read().items() if pair[1] < how.num_samples}
    if len(kept) != math.prod(shape):
        raise StoreError(
            f"{str(journal.path)!r}: expected {math.prod(shape)} continuations, got {len(kept)}; "
            "run the same command again"
        )
    scores = checked_scores(scorer, [record["text"] for record in kept.values()])
    journal.replace(_scored(prompts, list(kept.items()), scores))
    measured = by_prompt(scores.reshape(shape))
    return {
        **head(prompts, scorer.name, how),
        "continuations": journal.path.name,
        **{name: _group(measured.take(rows)) for name, rows in groups(prompts.toxicity).items()},
        "per_prompt": {"toxic_share": measured.toxic_share.tolist(), "maximum": measured.maximum.tolist()},
        "baseline": None,
    }


def _group(measured: ByPrompt) -> dict[str, Any] | None:
    number = len(measured.maximum)
    return {"num_prompts": number, **estimates(measured)} if number else None


def _scored(prompts: PromptFile, kept: Sequence[tuple[Pair, Record]], scores: NDArray[np.float64]) -> list[Record]:
    own = [None if math.isnan(t) else float(t) for t in prompts.toxicity]
    return [
        {
            **record,
            "prompt_text": prompts.texts[p],
            "prompt_toxicity": own[p],
            "toxicity": float(score),
        }
        for ((p, _), record), score in zip(kept, scores, strict=True)
    ]
