"""What each gate of tokens makes of single tokens of texts that must stay as they are, for its threshold.

They are the store's, where it keeps those of all sites, so a model of any size needs to run but once, under any
strategy. Otherwise the model runs here.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor

from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.callbacks import token_logits
from aura_dist.interventions.gates import Gate
from aura_dist.interventions.training import as_collected, stored_tokens
from aura_dist.models.load import input_device
from aura_dist.sites.find import tap_of
from aura_dist.sites.site import Site
from aura_dist.sites.tap import Callback, Tap, attached
from aura_dist.store.access import read_array
from aura_dist.store.grid import make_batches
from aura_dist.store.schema import StoreSpec
from aura_dist.store.tokens import StoredTokens
from aura_dist.text.tokens import Batch, TokenizedTexts

logger = logging.getLogger(__name__)

# where the texts have more tokens, some of the texts are read: of so many, the share of 1 % is known to ± 0.07 %
ENOUGH_TOKENS = 20_000


def logits_of_tokens(
    group: zarr.Group,
    spec: StoreSpec,
    rows: NDArray[np.int64],
    sites: Sequence[Site],
    gates: Mapping[str, Gate],
    earlier: Intervention | None,
) -> dict[str, NDArray[np.float32]]:
    """Site → the logits of its gate, [token], at single tokens of some of the store's texts, under `earlier`.

    `rows` are the texts that count. Where they have many times `ENOUGH_TOKENS`, every second or third text and so on is
    read. Tokens that pooling leaves out do not count, nor does a text's first one: where it is among the largest of
    every text, no other could pass. StoreError if a shard of kept tokens is missing or damaged; where none are kept,
    the errors of `as_collected` and `stored_tokens`. ModelError if a logit is NaN or infinite.
    """
    if {site.name for site in sites} <= set(spec.tokens):
        return _of_kept_tokens(group, rows, sites, gates)
    with as_collected(group, spec, earlier) as (loaded, _), torch.no_grad():
        texts = stored_tokens(group, spec, read_array(group, "samples/row"), loaded.tokenizer).take(rows)
        texts = texts.take(_enough(texts.num_tokens))
        listener = _Logits()
        taps = [tap_of(loaded.model, site) for site in sites]
        device = input_device(loaded.model)
        with attached(loaded.model, [(tap, listener.callback(tap, gates[tap.site])) for tap in taps]):
            for batch in _batches(texts, spec):
                listener.batch = batch
                loaded.model.base_model(
                    input_ids=torch.from_numpy(batch.input_ids).to(device),
                    attention_mask=torch.from_numpy(batch.attention_mask).to(device, torch.int64),
                    use_cache=False,
                )
    return listener.of(sites)


def _of_kept_tokens(
    group: zarr.Group, rows: NDArray[np.int64], sites: Sequence[Site], gates: Mapping[str, Gate]
) -> dict[str, NDArray[np.float32]]:
    tokens = StoredTokens.of(group)
    rows = rows[_enough(np.diff(tokens.offset)[rows])]
    places = [slice(*tokens.offset[row : row + 2].tolist()) for row in rows]
    counted = [_later(tokens.field("counted")[None, place] != 0)[0] for place in places]
    listener = _Logits()
    for site in sites:
        values, parts = tokens.values(site.name), _tensors(gates[site.name])
        for place, each in zip(places, counted, strict=True):
            listener.take(site.name, torch.from_numpy(values.read(place)[each]), parts)
    return listener.of(sites)


def _later(counted_BT: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[B, T] without each row's first token, where others count."""
    later_BT = counted_BT.copy()
    later_BT[:, 0] &= counted_BT.sum(axis=1) == 1
    return later_BT


def _enough(num_tokens_N: NDArray[Any]) -> NDArray[np.int64]:
    """Which of the texts are read; they are in the order of their lengths."""
    return np.arange(0, len(num_tokens_N), max(1, int(num_tokens_N.sum()) // ENOUGH_TOKENS))


def _tensors(gate: Gate) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in gate.parts.items()}


def _batches(texts: TokenizedTexts, spec: StoreSpec) -> list[Batch]:
    lengths = [int(n) for n in texts.num_tokens]
    return [texts.batch(rows) for rows in make_batches(lengths, slice(0, len(lengths)), spec.tokens_per_batch)]


class _Logits:
    """The logits of every site's gate so far."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self._found: dict[str, list[NDArray[np.float32]]] = {}

    def take(self, site: str, values_TD: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Values of tokens that count."""
        logits_T = token_logits(parts, values_TD.float(), lambda vector: vector, lambda sums: sums)[..., 0]
        self._found.setdefault(site, []).append(logits_T.cpu().numpy())

    def callback(self, tap: Tap, gate: Gate) -> Callback:
        parts = _tensors(gate)

        def listen(raw: Any, alone: bool) -> None:
            assert self.batch is not None
            acts_BTD = tap.read(raw, tap.width, self.batch.input_ids.shape)
            assert isinstance(acts_BTD, Tensor), tap.site
            here = {name: values.to(acts_BTD.device) for name, values in parts.items()}
            counted_BT = torch.from_numpy(_later(self.batch.pool_mask)).to(acts_BTD.device)
            self.take(tap.site, acts_BTD[counted_BT], here)

        return listen

    def of(self, sites: Sequence[Site]) -> dict[str, NDArray[np.float32]]:
        """Site → [token]; ModelError if one is NaN or infinite, or the site was never called."""
        made = {site.name: np.concatenate(self._found.get(site.name, [np.empty(0, np.float32)])) for site in sites}
        for site, logits_T in made.items():
            if not len(logits_T) or not np.isfinite(logits_T).all():
                raise ModelError(
                    f"module {site!r}: expected finite values at every token, got NaN or infinity, or the module is "
                    "not called; leave it out by `fit --modules`"
                )
        logger.info("thresholds of %d gates from %d tokens", len(made), max(map(len, made.values()), default=0))
        return made
