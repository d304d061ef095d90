"""Continuations of one batch of prompts of equal length: prefill once a prompt, then token by token with the cache.

Prompts of one batch have the same number of tokens, so that nothing is padded and every model class computes for each
prompt what it computes for that prompt alone.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from aura_dist.evaluation.sampling import Decoding, choose
from aura_dist.models.load import input_device
from aura_dist.sites.transformers_adapter import SELECTABLE_LAYERS


@dataclass(frozen=True)
class Rows:
    """B continuations of P prompts, all of T tokens."""

    prompt_ids: Sequence[Sequence[int]]  # [P, T]
    prompt_of: Sequence[int]  # [B] index of each continuation's prompt
    keys: Sequence[int]  # [B] keys of the noise


def only_attention(cache: object) -> bool:
    """Whether a cache holds keys and values alone: its rows can be chosen, and a text can be read piece by piece."""
    return isinstance(cache, Cache) and all(type(layer) in SELECTABLE_LAYERS for layer in cache.layers)


@dataclass
class Decoder:
    """Continues batches with one model, which is in eval mode, under any strategy.

    Attributes
    ----------
    stop_ids
        Ids that end a continuation.
    any_alive
        Takes whether this rank needs another step; returns whether any rank does whose forwards are collective with
        this one's.
    agreed
        Takes this rank's choice of ids; returns the choice that all ranks which share a forward continue with.
    """

    model: PreTrainedModel
    how: Decoding
    stop_ids: Collection[int]
    any_alive: Callable[[bool], bool] = lambda alive: alive
    agreed: Callable[[Tensor], Tensor] = lambda ids_B: ids_B
    _selects: bool = field(default=True, init=False)

    @torch.no_grad()
    def run(self, rows: Rows, *, counts: bool = True) -> list[list[int]]:
        """Ids of each continuation, without the stop id; ModelError if logits are NaN or infinite.

        `counts` is False for a batch whose result is dropped.
        """
        device = input_device(self.model)
        prompts_PT = torch.tensor(rows.prompt_ids, device=device)
        of_B = torch.tensor(rows.prompt_of, device=device)
        keys_B = torch.tensor(rows.keys, dtype=torch.int64, device=device)
        stop = torch.tensor(sorted(self.stop_ids), dtype=torch.int64, device=device)
        logits_BV, cache = self._prefill(prompts_PT, of_B)
        seen_BT = prompts_PT[of_B]
        alive_B = torch.ones(len(of_B), dtype=torch.bool, device=device)
        for step in range(self.how.max_new_tokens):
            ids_B = self.agreed(choose(logits_BV, self.how, keys_B, step))
            seen_BT = torch.cat([seen_BT, ids_B[:, None]], dim=1)
            alive_B &= ~torch.isin(ids_B, stop)
            last = step + 1 == self.how.max_new_tokens
            if last or not self.any_alive(counts and bool(alive_B.any())):
                break
            logits_BV, cache = self._step(seen_BT, cache)
        return [self._until_stop(ids) for ids in seen_BT[:, prompts_PT.shape[1] :].tolist()]

    def _until_stop(self, ids: list[int]) -> list[int]:
        end = next((t for t, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return ids[:end]

    def _prefill(self, prompts_PT: Tensor, of_B: Tensor) -> tuple[Tensor, Cache | None]:
        """[B, V] logits after the prompts, and the cache of B rows, None if its kind is unknown."""
        if self._selects:
            logits_PV, cache = self._forward(prompts_PT, torch.ones_like(prompts_PT), None)
            if cache is not None and only_attention(cache):
                cache.batch_select_indices(of_B)
                return logits_PV[of_B], cache
            self._selects = False
        rows_BT = prompts_PT[of_B]
        return self._forward(rows_BT, torch.ones_like(rows_BT), None)

    def _step(self, seen_BT: Tensor, cache: Cache | None) -> tuple[Tensor, Cache | None]:
        new = seen_BT if cache is None else seen_BT[:, -1:]
        return self._forward(new, torch.ones_like(seen_BT), cache)

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor, cache: Cache | None) -> tuple[Tensor, Cache | None]:
        """[B, V] logits of the last position, and the cache after it."""
        taken = inspect.signature(self.model.forward).parameters
        # the head on the last position alone: of a long prompt with a large vocabulary it would be most of the work
        more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        if cache is not None and "position_ids" in taken:  # Bamba's would begin at 0 again
            num_seen = mask_BT.shape[1]
            positions = torch.arange(num_seen - ids_BT.shape[1], num_seen, device=ids_BT.device)
            more["position_ids"] = positions.expand(ids_BT.shape)
        output = self.model(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, **more)
        cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1], cache if isinstance(cache, Cache) else None
