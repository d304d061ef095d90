"""Likelihoods under a model that runs layer by layer: all batches go through the layers before logits are taken."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from aura_dist.models.layerwise import Inputs, Layerwise

Answer = TypeVar("Answer")


def through_layers(
    executor: Layerwise, batches: list[Inputs], take: Callable[[int, Tensor], Answer], before: Callable[[], None]
) -> list[Answer]:
    """What `take` returns for the index and the logits, [B, T, V], of each batch; `before` is called at each step."""
    executor.prepare(batches[0])

    def run() -> list[Answer]:
        _through(executor, batches, before)
        return [take(index, executor.finish(index, inputs).logits) for index, inputs in enumerate(batches)]

    answers: list[Answer] = executor.wave(run)
    return answers


def _through(executor: Layerwise, batches: list[Inputs], before: Callable[[], None]) -> None:
    for index, inputs in enumerate(batches):
        before()
        executor.record(index, inputs)
    for layer in executor.layers():
        for index in range(len(batches)):
            before()
            executor.run(layer, index)


class TwoPasses:
    """Calls of a model by a program that takes the logits of each batch at once, such as lm-eval.

    The program runs twice. The first time every call returns zeros, and its batch is kept; then the batches go through
    the layers; the second time the calls return the logits.
    """

    def __init__(self, executor: Layerwise, vocabulary: int) -> None:
        self._executor = executor
        self._vocabulary = vocabulary
        self._batches: list[Inputs] = []
        self._again: int | None = None  # calls of the second time so far

    def call(self, ids_BT: Tensor) -> Tensor:
        """The logits, [B, T, V], of a batch of token ids; the first time zeros."""
        if self._again is None:
            self._batches.append({"input_ids": ids_BT})
            return torch.zeros((), device=ids_BT.device).expand(*ids_BT.shape, self._vocabulary)
        inputs, index = self._batches[self._again], self._again
        assert torch.equal(inputs["input_ids"], ids_BT), "both times the batches are the same"
        self._again += 1
        logits: Tensor = self._executor.finish(index, inputs).logits
        return logits

    def run(self, answer: Callable[[], Answer]) -> Answer:
        """What `answer` returns, which makes the calls."""
        self._batches, self._again = [], None
        answer()
        if self._batches:
            self._executor.prepare(self._batches[0])
            self._executor.wave(partial(_through, self._executor, self._batches, lambda: None))
        self._again = 0
        return answer()
