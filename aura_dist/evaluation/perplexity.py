"""Perplexity of a file of texts under a causal language model: read, tokenized, and computed by all ranks.

The batches depend on the texts alone, and each is computed once, by the row worker that claims it: the figures do not
depend on the number of ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from aura_dist.evaluation.by_layer import through_layers
from aura_dist.evaluation.cached import only_attention
from aura_dist.evaluation.figures import both_sides, summary
from aura_dist.evaluation.prompts import Prefix
from aura_dist.models.layerwise import Layerwise, executor_of
from aura_dist.models.load import check_positions, check_vocabulary, input_device
from aura_dist.ranks.team import Team
from aura_dist.store.grid import make_batches
from aura_dist.text.labels import check_classes, check_texts, parse_labels
from aura_dist.text.table import read_table
from aura_dist.text.tokens import Batch, TokenizedTexts, tokenize

# float32 logits of one forward; a vocabulary of 262,144 would else take 2 GB for 2,048 tokens
LOGITS_BYTES = 256 * 2**20
_COPIED_LOGITS = 2**21
_Found = tuple[slice, NDArray[np.float64]]  # rows, and the sum of each


@dataclass(frozen=True)
class TextFile:
    """N texts whose perplexity is measured."""

    source: str
    column: str
    label_column: str | None
    sha256: str  # of the file's bytes
    texts: list[str]
    labels: NDArray[np.int8] | None  # [N], 1, 0 or -1 (not labelled); None without a label column


def read_texts(source: str, column: str, label_column: str | None) -> TextFile:
    """Read a file of texts; InputError unless `read_table` and `check_texts` take it, with texts of both labels."""
    labels = [] if label_column is None else [label_column]
    table = read_table(source, [column, *labels])
    parsed = parse_labels(table, labels) if labels else None
    if parsed is not None:
        check_classes(parsed, labels, source)
    own = None if parsed is None else parsed[:, 0]
    return TextFile(source, column, label_column, table.sha256, check_texts(table, column), own)


def tokenize_texts(
    file: TextFile,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    prefix: Prefix | None,
    max_tokens: int,
) -> TokenizedTexts:
    """Token ids, each text cut at `max_tokens` and then put after the pre-prompt.

    The last tokens that a tokenizer adds are left out: perplexity is of the text's own tokens, and a text that was cut
    does not end there.

    Raises InputError for a text that the tokenizer cannot take, ConfigError for one longer than the model's positions,
    ModelError if the tokenizer is another model's.
    """
    tokens = tokenize(file.texts, tokenizer, max_tokens=max_tokens, skip_special=False, source=file.source, ended=False)
    tokens = tokens if prefix is None else prefix.before(tokens)
    check_positions(config, int(tokens.num_tokens.max()), "--max-tokens")
    check_vocabulary(config, tokens.largest_id)
    return tokens


def section(file: TextFile, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> dict[str, Any]:
    """The section `perplexity` of the results, from what `negative_log_likelihoods` returns.

    InputError if no text, or none of one label, has a token that is predicted.
    """
    about: dict[str, Any] = {"texts": file.source, "column": file.column, "sha256": file.sha256}
    if file.labels is not None:
        about |= {"labels": file.label_column, **both_sides(sums, counts, file.labels)}
    per_text = {"negative_log_likelihood": sums.tolist(), "num_tokens": counts.tolist()}
    return {**about, **summary(sums, counts), "per_text": per_text}


@torch.no_grad()
def negative_log_likelihoods(
    model: PreTrainedModel,
    tokens: TokenizedTexts,
    tokens_per_batch: int,
    *,
    num_context: int | NDArray[np.int64] = 1,
    logits_bytes: int = LOGITS_BYTES,
    team: Team | None = None,
    received: Callable[[], int | None] = lambda: None,
    key: str = "texts",
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Per text, in order: the summed negative log-likelihood (nats) of its tokens, and their number.

    Parameters
    ----------
    model, tokens
        The model, and the texts; alike on all ranks.
    tokens_per_batch
        Upper bound on the padded tokens of a forward.
    num_context
        Tokens at the start of each text that are not counted: the first, which nothing predicts, or a prompt's; one
        number, or [N].
    logits_bytes
        Upper bound on a forward's float32 logits. A longer text goes through the model in pieces, each after the keys
        and values of those before; it goes through whole if the model has layers that keep another state.
    team, received
        The ranks that share the texts, by default this process alone, and as in `Team.gather`.
    key
        A name that no other call with this team has.
    """
    team = team or Team.alone()
    order = np.argsort(tokens.num_tokens, kind="stable")
    contexts = np.broadcast_to(np.maximum(num_context, 1), order.shape)
    reader = Reader(model, tokens.take(order), tokens_at_once(model, tokens_per_batch, logits_bytes), contexts[order])
    executor = executor_of(model)
    if executor is None:
        read = _read_batches(reader, key, team, received)
    else:
        read = _read_waves(executor, reader, key, team, received)
    found = [part for part in read if team.world.column_rank == 0]
    sums = np.full(len(order), np.nan)  # a text that no rank has read must not pass for one that is certain
    for part in team.gather(key, found, received):
        for rows, sums_B in part:
            sums[order[rows]] = sums_B
    return sums, np.maximum(tokens.num_tokens.astype(np.int64) - contexts, 0)


def _read_batches(reader: "Reader", key: str, team: Team, received: Callable[[], int | None]) -> Iterator[_Found]:
    """This rank's share of the batches, each through the whole model."""
    for turn in team.claimed(key, reader.batches(), received, reader.num_pieces):
        if turn is None:
            reader.read_nothing()
        elif (sums_B := reader.read(*turn)) is not None:
            yield turn[0], sums_B


def _read_waves(
    executor: Layerwise, reader: "Reader", key: str, team: Team, received: Callable[[], int | None]
) -> Iterator[_Found]:
    """The same layer by layer, in waves of batches."""
    batches = reader.batches()
    executor.prepare(reader.inputs(reader.texts.batch(batches[0])))
    while wave := executor.claim(team, key, batches, reader.num_padded, received):
        whole = [reader.texts.batch(rows) for rows in wave]
        sums = through_layers(
            executor,
            [reader.inputs(batch) for batch in whole],
            lambda index, logits_BTV: reader.sums(whole[index], logits_BTV),  # noqa: B023
            lambda: team.keep_step(received()),
        )
        yield from zip(wave, sums, strict=True)


def tokens_at_once(model: PreTrainedModel, tokens_per_batch: int, logits_bytes: int = LOGITS_BYTES) -> int:
    """Most tokens of one forward: what the caller allows, and as many as have logits of `logits_bytes`."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return max(1, min(tokens_per_batch, logits_bytes // (4 * int(vocabulary))))


@dataclass
class Reader:
    """N texts in ascending length, read batch by batch; texts of more than `limit` tokens in pieces.

    `num_context` is [N], at least 1: as for `negative_log_likelihoods`.
    """

    model: PreTrainedModel
    texts: TokenizedTexts
    limit: int
    num_context: NDArray[np.int64]
    device: torch.device = field(init=False)
    _lengths: list[int] = field(init=False)
    _in_pieces: bool = field(init=False)
    _cache: Cache | None = field(default=None, init=False)
    _total: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.device = input_device(self.model)
        self._lengths = self.texts.num_tokens.tolist()
        # a forward shows what the model caches, because recurrent layers may begin again with each piece (Jamba's do)
        is_long = self._lengths[-1] > self.limit and executor_of(self.model) is None  # there a piece would be a wave
        self._in_pieces = is_long and only_attention(self.read_nothing())

    def batches(self) -> list[slice]:
        """All batches, the largest first."""
        batches = make_batches(self._lengths, slice(0, len(self._lengths)), self.limit)
        return sorted(batches, key=lambda rows: -self.num_padded(rows))

    def num_padded(self, rows: slice) -> int:
        """Tokens of a batch, padding included."""
        return int((rows.stop - rows.start) * self._lengths[rows.stop - 1])

    def num_pieces(self, rows: slice) -> int:
        """Forwards that a batch takes; the last token of a text needs none, because it predicts nothing."""
        return ceil((self._lengths[rows.stop - 1] - 1) / self.limit) if self._is_cut(rows) else 1

    def _is_cut(self, rows: slice) -> bool:
        return self._in_pieces and self._lengths[rows.stop - 1] > self.limit

    def read(self, rows: slice, piece: int) -> NDArray[np.float64] | None:
        """Run one forward; after a batch's last one, [B] summed negative log-likelihoods."""
        batch, is_last = self.texts.batch(rows), piece + 1 == self.num_pieces(rows)
        if not self._is_cut(rows):
            return self.sums(batch, self.logits(batch))
        if piece == 0:
            self._cache, self._total = None, torch.zeros((), dtype=torch.float64, device=self.device)
        assert self._total is not None
        ids_1T = torch.from_numpy(batch.input_ids).to(self.device)
        start, stop = piece * self.limit, min((piece + 1) * self.limit, ids_1T.shape[1] - 1)
        mask_1T = torch.ones((1, stop), dtype=torch.int64, device=self.device)
        output = self.model(
            input_ids=ids_1T[:, start:stop], attention_mask=mask_1T, past_key_values=self._cache, use_cache=True
        )
        skipped = max(0, int(self.num_context[rows.start]) - 1 - start)
        self._total += _nll(output.logits[0, skipped:], ids_1T[0, start + skipped + 1 : stop + 1])
        self._cache = None if is_last else output.past_key_values
        return self._total[None].cpu().numpy() if is_last else None

    def read_nothing(self) -> object:
        """Run a forward of one token whose logits nobody needs; return its cache, if the model has one."""
        ids_1T = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        output = self.model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=True)
        return getattr(output, "past_key_values", None)

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V] of a batch that is read whole."""
        logits: Tensor = self.model(**self.inputs(batch), use_cache=False).logits
        return logits

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The arguments of the model's forward."""
        return {
            "input_ids": torch.from_numpy(batch.input_ids).to(self.device),
            "attention_mask": torch.from_numpy(batch.attention_mask).to(self.device).long(),
        }

    def sums(self, batch: Batch, logits_BTV: Tensor) -> NDArray[np.float64]:
        """[B] summed negative log-likelihoods of the texts of a batch."""
        ids_BT = torch.from_numpy(batch.input_ids).to(self.device)
        firsts, lengths = self.num_context[batch.rows].tolist(), batch.attention_mask.sum(axis=1).tolist()
        sums = [
            _nll(logits_BTV[b, first - 1 : length - 1], ids_BT[b, first:length])
            for b, (first, length) in enumerate(zip(firsts, lengths, strict=True))
        ]
        return torch.stack(sums).cpu().numpy()


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
