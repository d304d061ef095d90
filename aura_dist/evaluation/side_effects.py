"""What an intervention changes where it should change nothing: the section `side_effects` of the results.

- divergence: KL(plain ‖ intervened) of the next token, in nats, at every predicted token of the texts of perplexity
- gates: the share of those tokens at which some gate of tokens passes ½, and of the texts that have one
- continuations: perplexity of the plain model's non-toxic continuations of toxic prompts, without and with the
  intervention; they are those of the baseline

The plain model and the intervened one read the same batches in one launch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aura_dist.errors import InputError
from aura_dist.evaluation.figures import THRESHOLD, bootstrap_means, interval, summary
from aura_dist.evaluation.journal import read_records
from aura_dist.evaluation.perplexity import Reader, negative_log_likelihoods, tokens_at_once
from aura_dist.evaluation.prompts import TokenizedPrompts
from aura_dist.interventions.use import LoadedModel
from aura_dist.ranks.team import Team
from aura_dist.text.tokens import Batch, TokenizedTexts

_COPIED_LOGITS = 2**21
Received = Callable[[], int | None]


@dataclass(frozen=True)
class Continued:
    """Prompts with continuations: token ids of both together, and [N] how many of them are the prompt's."""

    tokens: TokenizedTexts
    num_context: NDArray[np.int64]


def nontoxic_continuations(
    path: str, baseline: Mapping[str, Any], fingerprint: str, prompts: TokenizedPrompts
) -> Continued | None:
    """The non-toxic continuations of toxic prompts behind the results at `path`; of all prompts, if none has a toxicity
    of its own; None if there are none.

    InputError if the results are another model's, or their continuations are gone.
    """
    if baseline.get("model_fingerprint") != fingerprint:
        raise InputError(
            f"--baseline {path!r}: expected results of the same model with --side-effects, got another's; evaluate "
            "this model without an intervention"
        )
    file = Path(path).resolve().parent / str(baseline["toxicity"]["continuations"])
    found = read_records(file) if file.is_file() else ()
    records = [r for r in found if isinstance(r.get("ids"), list) and r.get("toxicity") is not None]
    if not records:
        raise InputError(
            f"--baseline {path!r}: expected its continuations in {str(file)!r}, got none; evaluate the baseline again"
        )
    rated = any(r.get("prompt_toxicity") is not None for r in records)
    chosen = [r for r in records if r["toxicity"] < THRESHOLD and len(r["ids"])]
    if rated:
        chosen = [r for r in chosen if (r.get("prompt_toxicity") or 0) >= THRESHOLD]
    if not chosen:
        return None
    heads = [np.array(prompts.ids[r["prompt"]], np.int32) for r in chosen]
    ids = [np.concatenate([head, np.array(r["ids"], np.int32)]) for head, r in zip(heads, chosen, strict=True)]
    return Continued(TokenizedTexts(ids, np.empty(0, np.int64), skip_special=False), np.array([len(h) for h in heads]))


def measure(
    loaded: LoadedModel,
    strength: float,
    tokens: TokenizedTexts,
    num_context: int,
    continued: Continued | None,
    tokens_per_batch: int,
    team: Team,
    received: Received,
) -> dict[str, Any]:
    """The section, on all ranks alike; they share the texts. The intervention must not act when this is called."""
    by_text, opened = divergences(loaded, strength, tokens, num_context, tokens_per_batch, team, received)
    gates = None
    if opened is not None:
        num_tokens = sum(map(len, by_text))
        gates = {
            "open_tokens": float(opened.sum() / max(1, num_tokens)), "open_texts": float((opened > 0).mean()),
            "num_tokens": num_tokens, "num_texts": len(opened),
        }  # fmt: skip
    section: dict[str, Any] = {
        "divergence": divergence_figures(by_text),
        "gates": gates,
        "continuations": None,
    }
    if continued is not None:
        figures = {}
        for name, s in (("plain", 0.0), ("intervened", strength)):
            with loaded.intervened(s):
                found = negative_log_likelihoods(
                    loaded.model, continued.tokens, tokens_per_batch,
                    num_context=continued.num_context, team=team, received=received, key=f"continuations, {name}",
                )  # fmt: skip
            figures[name] = summary(*found, what="--baseline: continuations")
        section["continuations"] = figures
    return section


@torch.no_grad()
def divergences(
    loaded: LoadedModel,
    strength: float,
    tokens: TokenizedTexts,
    num_context: int,
    tokens_per_batch: int,
    team: Team,
    received: Received,
) -> tuple[list[NDArray[np.float64]], NDArray[np.int64] | None]:
    """Per text, in order: KL(plain ‖ intervened) of each predicted token; [N] at how many of these a gate passes ½.

    The second is None if the intervention has no such gate. Texts are read whole, whatever their length.
    """
    order = np.argsort(tokens.num_tokens, kind="stable")
    contexts = np.full(len(order), max(1, num_context))
    reader = Reader(loaded.model, tokens.take(order), tokens_at_once(loaded.model, tokens_per_batch), contexts)
    found = []
    for turn in team.claimed("divergence", reader.batches(), received):
        batch = None if turn is None else reader.texts.batch(turn[0])
        plain = reader.read_nothing() if batch is None else reader.logits(batch)
        opened = _Opened(batch, max(1, num_context))
        with loaded.intervened(strength, opened.watch):
            changed = reader.read_nothing() if batch is None else reader.logits(batch)
        if batch is not None and team.world.column_rank == 0:
            found.append((batch.rows, _by_row(plain, changed, batch, max(1, num_context)), opened.counts))
    by_text: list[NDArray[np.float64]] = [np.empty(0)] * len(order)
    passed = np.zeros(len(order), np.int64)
    for rows, of_rows, counts in (one for part in team.gather("divergence", found, received) for one in part):
        passed[order[rows]] = counts
        for place, values in zip(order[rows], of_rows, strict=True):
            by_text[place] = values
    gates = loaded.intervention.gate.values() if loaded.intervention else ()
    return by_text, passed if any(gate.row.of_token for gate in gates) else None


def divergence_figures(by_text: list[NDArray[np.float64]]) -> dict[str, float | int]:
    """Mean over tokens with its 95 % interval over texts, and the 99th percentile of tokens, in nats.

    InputError if no text has a token that is predicted.
    """
    table = np.array([[values.sum(), len(values)] for values in by_text if len(values)])
    if not len(table):
        raise InputError("--side-effects: expected a perplexity text of at least two tokens, got none")
    drawn = bootstrap_means(table)
    low, high = interval(drawn[:, 0] / drawn[:, 1])
    every = np.concatenate(by_text)
    return {
        "mean": float(every.mean()),
        "mean_low": low,
        "mean_high": high,
        "percentile_99": float(np.quantile(every, 0.99)),
        "num_texts": len(table),
        "num_tokens": len(every),
    }


class _Opened:
    """Counts at how many tokens of each text of a batch some gate of tokens passes ½, from its token `first` on."""

    def __init__(self, batch: Batch | None, first: int) -> None:
        mask = np.zeros((0, 0), np.bool_) if batch is None else batch.attention_mask.astype(np.bool_)
        self._counted = torch.from_numpy(mask) & (torch.arange(mask.shape[1]) >= first)
        self._passed = torch.zeros_like(self._counted)

    def watch(self, site: str, passing: Tensor) -> None:
        if len(self._counted) and passing.shape[-1] == 1 and passing.numel() == self._counted.numel():
            self._passed |= (passing.reshape(self._counted.shape) > 0.5).cpu()

    @property
    def counts(self) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = (self._passed & self._counted).sum(dim=1).numpy()
        return counts


def _by_row(plain: Any, changed: Any, batch: Batch, first: int) -> list[NDArray[np.float64]]:
    lengths = batch.attention_mask.sum(axis=1).tolist()
    return [
        _divergence(plain[b, first - 1 : length - 1], changed[b, first - 1 : length - 1])
        for b, length in enumerate(lengths)
    ]


def _divergence(plain_TV: Tensor, changed_TV: Tensor) -> NDArray[np.float64]:
    """[T] Σ p (log p − log q), of softmaxes in float32; a token that p excludes counts 0."""
    num_rows, found = max(1, _COPIED_LOGITS // plain_TV.shape[1]), [torch.zeros(0, dtype=torch.float64)]
    for start in range(0, len(plain_TV), num_rows):
        log_p, log_q = (x[start : start + num_rows].float().log_softmax(-1) for x in (plain_TV, changed_TV))
        terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
        # rounding may take a sum of zeros below 0
        found.append(terms.sum(-1, dtype=torch.float64).clamp_(min=0).cpu())
    return torch.cat(found).numpy()
