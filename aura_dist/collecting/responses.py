"""Responses in memory: those of one layer at a time of a model that runs layer by layer, for all texts of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from aura_dist.collecting.capture import Capture
from aura_dist.collecting.run import Run
from aura_dist.errors import ModelError
from aura_dist.models.layerwise import Layerwise
from aura_dist.sites.site import Site
from aura_dist.store.record import count_without_numbers
from aura_dist.store.schema import tasks_of


@dataclass
class LayerResponses:
    """All texts of `run` as one wave through `model`: `begin`, then layer by layer `of` and `advance`."""

    model: PreTrainedModel
    executor: Layerwise
    run: Run
    _batches: list[slice] = field(init=False)
    _without: dict[str, int] = field(init=False, default_factory=dict)  # site → units that are finite in no text

    def __post_init__(self) -> None:
        tasks = tasks_of(self.run.tokens.num_tokens, self.run.spec.tokens_per_batch)
        self._batches = [batch for task in tasks for _, batch, _ in self.run.steps(task)]

    def begin(self) -> None:
        """Bring all texts to the first layer."""
        capture = self._capture([])
        for batch in self._batches:
            inputs = capture.inputs(self.run.tokens.batch(batch))
            self.executor.prepare(inputs)
            self.executor.record(batch.start, inputs)

    def of(self, layer: int, sites: Sequence[Site]) -> dict[str, NDArray[Any]]:
        """Site → [N, D] pooled responses at a layer that is loaded; the texts stay before it.

        ModelError if more than half of the run's units, or modules, are finite in no text.
        """
        capture = self._capture(sites)
        (pooling,) = self.run.spec.poolings
        buffer: dict[tuple[str, str], Any] = {
            (site.name, pooling): torch.empty(
                (len(self.run.num_tokens), site.width), dtype=self.run.dtypes[site.name, pooling]
            ).numpy()
            for site in sites
        }
        names = [site.name for site in sites]
        with capture.listening():
            for batch in self._batches:
                forward = partial(self.executor.rehearse, layer, batch.start)
                capture.run(self.run.tokens.batch(batch), buffer, batch.start, forward, names)
        capture.copied()()
        responses = {site: values for (site, _), values in buffer.items()}
        self._check_numbers(responses)
        return responses

    def _check_numbers(self, responses: Mapping[str, NDArray[Any]]) -> None:
        for site, values in responses.items():
            suspects = values[:, ~np.isfinite(values[0])]
            if count := int((~np.isfinite(suspects).any(axis=0)).sum()):
                self._without[site] = count
        text, most = count_without_numbers(self._without, self.run.spec.sites)
        if most:
            raise ModelError(
                f"--model {self.run.spec.model['name']!r}: {text} (later layers have not run): expected at most half; "
                "check the weights, or give a --dtype of a larger range (bfloat16, float32)"
            )

    def advance(self, layer: int) -> None:
        """Run all texts through a layer that is loaded."""
        for batch in self._batches:
            self.executor.run(layer, batch.start)

    def _capture(self, sites: Sequence[Site]) -> Capture:
        plans = {site.name: self.run.plans[site.name] for site in sites}
        return Capture(self.model, sites, plans, self.run.spec.poolings, self.run.team.world.device)
