"""Perplexity of texts under a causal language model."""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, PreTrainedModel

from aura_dist.errors import InputError
from aura_dist.evaluation.bootstrap import bootstrap_means, interval
from aura_dist.evaluation.decoding import only_attention
from aura_dist.store.grid import make_batches
from aura_dist.text.tokens import Batch, TokenizedTexts

# float32 logits of one forward; a vocabulary of 262,144 would else take 2 GB for 2,048 tokens
LOGITS_BYTES = 256 * 2**20
_COPIED_LOGITS = 2**21


@dataclass(frozen=True)
class Perplexity:
    """Two ways to average.

    Attributes
    ----------
    token_weighted
        exp of the mean negative log-likelihood over all predicted tokens; `_low` and `_high` bound the 95 %
        bootstrap interval over texts.
    mean_over_sentences
        Mean over texts of exp(the text's mean negative log-likelihood), as *Whispering Experts* reports it.
    num_texts, num_tokens
        Texts with at least one predicted token, and predicted tokens.
    num_left_out
        Texts of one token, which predict nothing.
    num_nonfinite
        Texts whose likelihood is not a number, as the logits are NaN or infinite; both averages then are neither.
    """

    token_weighted: float
    token_weighted_low: float
    token_weighted_high: float
    mean_over_sentences: float
    mean_over_sentences_low: float
    mean_over_sentences_high: float
    num_texts: int
    num_tokens: int
    num_left_out: int
    num_nonfinite: int


@torch.no_grad()
def negative_log_likelihoods(
    model: PreTrainedModel,
    tokens: TokenizedTexts,
    tokens_per_batch: int,
    *,
    num_context: int = 1,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Per text, in order: the summed negative log-likelihood (nats) of its tokens, and their number.

    Parameters
    ----------
    model, tokens
        What is asked, about which texts.
    tokens_per_batch
        Upper bound on the padded tokens of a forward.
    num_context
        Tokens at the start of each text that are not counted: the first, which nothing predicts, or a pre-prompt's.
    logits_bytes
        Upper bound on a forward's float32 logits. A text that is longer goes through the model in pieces, with the
        keys and values of those before; whole, if the model has layers that keep another state.
    """
    limit = tokens_at_once(model, tokens_per_batch, logits_bytes)
    order = np.argsort(tokens.num_tokens, kind="stable")
    by_length = tokens.take(order)
    sums = np.zeros(len(order))
    lengths = by_length.num_tokens.tolist()
    for rows in make_batches(lengths, slice(0, len(order)), limit):
        batch = by_length.batch(rows)
        sums[order[rows]] = (
            _in_pieces(model, batch, limit, num_context)
            if len(batch.input_ids) == 1
            else (_batch_sums(model, batch, num_context))
        )
    return sums, np.maximum(tokens.num_tokens.astype(np.int64) - max(1, num_context), 0)


def tokens_at_once(model: PreTrainedModel, tokens_per_batch: int, logits_bytes: int = LOGITS_BYTES) -> int:
    """Most tokens of one forward: what the caller allows, and as many as have logits of `logits_bytes`."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return max(1, min(tokens_per_batch, logits_bytes // (4 * int(vocabulary))))


def _batch_sums(model: PreTrainedModel, batch: Batch, num_context: int) -> NDArray[np.float64]:
    """[B] summed negative log-likelihood."""
    ids_BT = torch.from_numpy(batch.input_ids).to(model.device)
    mask_BT = torch.from_numpy(batch.attention_mask).to(model.device)
    logits = model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits
    first = max(1, num_context)
    sums = [
        _nll(logits[b, first - 1 : length - 1], ids_BT[b, first:length])
        for b, length in enumerate(batch.attention_mask.sum(axis=1).tolist())
    ]
    return torch.stack(sums).cpu().numpy()


def _in_pieces(model: PreTrainedModel, batch: Batch, limit: int, num_context: int) -> NDArray[np.float64]:
    """[1] the same for one text, in pieces of `limit` tokens."""
    ids_1T = torch.from_numpy(batch.input_ids).to(model.device)
    length = ids_1T.shape[1]
    if length <= limit:
        return _batch_sums(model, batch, num_context)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    cache: Cache | None = None
    for start in range(0, length - 1, limit):  # the last token predicts nothing
        stop = min(start + limit, length - 1)
        mask_1T = torch.ones((1, stop), dtype=torch.int64, device=model.device)
        output = model(input_ids=ids_1T[:, start:stop], attention_mask=mask_1T, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if not only_attention(cache):  # recurrent layers may begin anew with each piece (Jamba's do)
            return _batch_sums(model, batch, num_context)
        skipped = max(0, max(1, num_context) - 1 - start)
        total += _nll(output.logits[0, skipped:], ids_1T[0, start + skipped + 1 : stop + 1])
    return total[None].cpu().numpy()


def _nll(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Summed negative log-likelihood, a float64 scalar; `logits_TV[t]` predicts `targets_T[t]`."""
    total = torch.zeros((), dtype=torch.float64, device=logits_TV.device)
    # a few rows at a time: fresh memory for copies of all takes longer than the sums
    num_rows = max(1, _COPIED_LOGITS // logits_TV.shape[1])
    for start in range(0, len(targets_T), num_rows):
        targets = targets_T[start : start + num_rows]
        rows = logits_TV[start : start + len(targets)].float()
        likelihood = rows.gather(1, targets[:, None])[:, 0] - rows.logsumexp(dim=-1)
        total -= likelihood.sum(dtype=torch.float64)
    return total


def summary(sums: NDArray[np.float64], counts: NDArray[np.int64], what: str = "--perplexity-texts") -> Perplexity:
    """Both perplexities from [N] sums of negative log-likelihoods and token counts, infinite beyond float64.

    InputError if no text has a token that is predicted.
    """
    some = counts > 0
    if not some.any():
        raise InputError(f"{what}: expected a text of at least two tokens, got none")
    means = sums[some] / counts[some]
    with np.errstate(over="ignore", invalid="ignore"):
        table = np.stack([sums[some], counts[some].astype(np.float64), np.exp(means)], axis=1)
        drawn = bootstrap_means(table, seed=0)
        token_weighted, by_sentence = np.exp(sums[some].sum() / counts[some].sum()), np.exp(means).mean()
        low, high = interval(np.exp(drawn[:, 0] / drawn[:, 1]))
        sentences_low, sentences_high = interval(drawn[:, 2])
    return Perplexity(
        token_weighted=float(token_weighted),
        token_weighted_low=low,
        token_weighted_high=high,
        mean_over_sentences=float(by_sentence),
        mean_over_sentences_low=sentences_low,
        mean_over_sentences_high=sentences_high,
        num_texts=int(some.sum()),
        num_tokens=int(counts[some].sum()),
        num_left_out=int((~some).sum()),
        num_nonfinite=int((~np.isfinite(means)).sum()),
    )


def perplexity(model: PreTrainedModel, tokens: TokenizedTexts, tokens_per_batch: int) -> Perplexity:
    """Both perplexities of `tokens`; InputError if no text has a second token to predict."""
    return summary(*negative_log_likelihoods(model, tokens, tokens_per_batch))


def both_sides(
    sums: NDArray[np.float64], counts: NDArray[np.int64], labels: NDArray[np.int8]
) -> dict[str, dict[str, float | int]]:
    """`positive` and `negative` → perplexity of the texts of that label; [N] labels are 1, 0 or -1 (neither)."""
    sides = {"positive": labels == 1, "negative": labels == 0}
    return {
        name: asdict(summary(sums[rows], counts[rows], f"--perplexity-labels: {name} texts"))
        for name, rows in sides.items()
    }
