"""The threshold of each gate of tokens, from single tokens of texts that must stay as they are. Runs the model."""

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
from aura_dist.text.tokens import Batch, TokenizedTexts

logger = logging.getLogger(__name__)

# where the texts have more tokens, some of the texts are read: of so many, the share of 1 % is known to ± 0.07 %
ENOUGH_TOKENS = 20_000


def token_thresholds(
    group: zarr.Group,
    spec: StoreSpec,
    rows: NDArray[np.int64],
    sites: Sequence[Site],
    gates: Mapping[str, Gate],
    earlier: Intervention | None,
    share: float,
) -> dict[str, float]:
    """Site → the least logit of its gate that at most `share` of the single tokens exceed, under `earlier`.

    `rows` are the texts of the store that count. Where they have many times `ENOUGH_TOKENS`, every second or third text
    and so on is read. Tokens that pooling leaves out do not count. Only the largest logits are kept, so memory grows
    with the texts by `share` of their tokens at most. Errors are those of `as_collected` and `stored_tokens`.
    """
    with as_collected(group, spec, earlier) as (loaded, _), torch.no_grad():
        texts = stored_tokens(group, spec, read_array(group, "samples/row"), loaded.tokenizer).take(rows)
        step = max(1, int(texts.num_tokens.sum()) // ENOUGH_TOKENS)
        texts = texts.take(np.arange(0, len(texts.ids), step))  # they are in the order of their lengths
        num_tokens = sum(int(batch.pool_mask.sum()) for batch in _batches(texts, spec))
        kept = int(share * num_tokens) + 1
        listener = _Largest(kept)
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
    logger.info("thresholds of %d gates from %d tokens", len(sites), num_tokens)
    return {site.name: listener.threshold(site.name) for site in sites}


def _batches(texts: TokenizedTexts, spec: StoreSpec) -> list[Batch]:
    lengths = [int(n) for n in texts.num_tokens]
    return [texts.batch(rows) for rows in make_batches(lengths, slice(0, len(lengths)), spec.tokens_per_batch)]


class _Largest:
    """The largest logits of every site's gate so far, `kept` of them at most."""

    def __init__(self, kept: int) -> None:
        self.batch: Batch | None = None
        self._kept = kept
        self._largest: dict[str, Tensor] = {}

    def callback(self, tap: Tap, gate: Gate) -> Callback:
        parts = {name: torch.from_numpy(values) for name, values in gate.parts.items()}

        def listen(raw: Any, alone: bool) -> None:
            assert self.batch is not None
            acts_BTD = tap.read(raw, tap.width, self.batch.input_ids.shape)
            assert isinstance(acts_BTD, Tensor), tap.site
            here = {name: values.to(acts_BTD.device) for name, values in parts.items()}
            logits_BT = token_logits(here, acts_BTD.float(), lambda vector: vector, lambda sums: sums)[..., 0]
            counted = logits_BT[torch.from_numpy(self.batch.pool_mask).to(logits_BT.device)].cpu()
            every = torch.cat([self._largest.get(tap.site, counted[:0]), counted])
            self._largest[tap.site] = every.topk(min(self._kept, len(every))).values

        return listen

    def threshold(self, site: str) -> float:
        """The least of them; ModelError if it is NaN or infinite, or the site was never called."""
        largest = self._largest.get(site, torch.empty(0))
        if not len(largest) or not bool(largest.isfinite().all()):
            raise ModelError(
                f"module {site!r}: expected finite values at every token, got NaN or infinity, or the module is not "
                "called; leave it out by `fit --modules`"
            )
        return float(largest[-1])
