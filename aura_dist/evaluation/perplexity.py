"""Perplexity of texts under a causal language model."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from aura_dist.core.partition import make_batches
from aura_dist.data.tokens import Batch, TokenizedTexts
from aura_dist.errors import InputError


@dataclass(frozen=True)
class Perplexity:
    """Two ways to average.

    Attributes
    ----------
    token_weighted
        exp of the mean negative log-likelihood over all predicted tokens.
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
    mean_over_sentences: float
    num_texts: int
    num_tokens: int
    num_left_out: int
    num_nonfinite: int


@torch.no_grad()
def negative_log_likelihoods(
    model: PreTrainedModel, tokens: TokenizedTexts, tokens_per_batch: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Per text, in order: the summed negative log-likelihood (nats) of its tokens after the first, and their number.

    `tokens_per_batch` bounds the padded tokens of a forward, and so the memory of the logits:
    tokens × vocabulary × 4 bytes.
    """
    order = np.argsort(tokens.num_tokens, kind="stable")
    by_length = tokens.take(order)
    sums = np.zeros(len(order))
    lengths = by_length.num_tokens.tolist()
    for rows in make_batches(lengths, slice(0, len(order)), tokens_per_batch):
        sums[order[rows]] = _batch_sums(model, by_length.batch(rows))
    return sums, tokens.num_tokens.astype(np.int64) - 1


def _batch_sums(model: PreTrainedModel, batch: Batch) -> NDArray[np.float64]:
    """[B] summed negative log-likelihood."""
    ids_BT = torch.from_numpy(batch.input_ids).to(model.device)
    mask_BT = torch.from_numpy(batch.attention_mask).to(model.device)
    logits = model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits
    sums = []
    for b, length in enumerate(batch.attention_mask.sum(axis=1).tolist()):
        rows = logits[b, : length - 1].float()  # a row at a time: float32 copies of one text's logits only
        likelihood = rows.gather(1, ids_BT[b, 1:length, None])[:, 0] - rows.logsumexp(dim=-1)
        sums.append(-likelihood.sum(dtype=torch.float64))
    return torch.stack(sums).cpu().numpy()


def perplexity(model: PreTrainedModel, tokens: TokenizedTexts, tokens_per_batch: int) -> Perplexity:
    """Both perplexities of `tokens`, infinite beyond float64; InputError if no text has a second token to predict."""
    sums, counts = negative_log_likelihoods(model, tokens, tokens_per_batch)
    some = counts > 0
    if not some.any():
        raise InputError("--perplexity-texts: expected a text of at least two tokens, got none")
    means = sums[some] / counts[some]
    with np.errstate(over="ignore"):
        token_weighted, by_sentence = np.exp(sums[some].sum() / counts[some].sum()), np.exp(means).mean()
    return Perplexity(
        token_weighted=float(token_weighted),
        mean_over_sentences=float(by_sentence),
        num_texts=int(some.sum()),
        num_tokens=int(counts[some].sum()),
        num_left_out=int((~some).sum()),
        num_nonfinite=int((~np.isfinite(means)).sum()),
    )
