"""The loop of a model that runs layer by layer: a wave is a set of tasks that goes through each layer together.

The weights are read once a wave. A row chunk is written a layer at a time, as soon as it has gone through the layer.
The tasks of a wave are finished together.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from aura_dist.collecting.capture import Capture
from aura_dist.collecting.run import Run
from aura_dist.models.layerwise import Layerwise
from aura_dist.ranks.progress import Progress
from aura_dist.store.grid import Task
from aura_dist.store.record import Attempts
from aura_dist.store.writer import ChunkWriter, RowBuffer

logger = logging.getLogger(__name__)


@dataclass
class Waves:
    """One rank's waves; `attempts` as for `stream`."""

    executor: Layerwise
    capture: Capture
    run: Run
    writer: ChunkWriter
    progress: Progress
    attempts: Attempts | None = None
    _sites: list[list[str]] = field(init=False)  # of each layer

    def __post_init__(self) -> None:
        self._sites = [[] for _ in range(self.executor.num_layers)]
        for site in self.run.spec.sites:
            self._sites[site.layer].append(site.name)

    def run_all(self, queue: Sequence[Task]) -> None:
        """Claim tasks of `queue`, in its order, and run them wave by wave until none is left."""
        reader, num_waves = self.executor.reader, 0
        first = self.run.steps(queue[0])[0][1]
        self.executor.prepare(self.capture.inputs(self.run.tokens.batch(first)))
        while wave := self.executor.claim(self.run.team, "tasks", queue, lambda task: task.num_tokens, self._before):
            self.executor.wave(partial(self._run_wave, sorted(wave, key=lambda task: task.index)))
            num_waves += 1
        logger.info(
            "%d waves; layers were read in %.1f s, of which the forward waited %.1f s",
            num_waves, reader.read_seconds, reader.waited_seconds,
        )  # fmt: skip

    def _run_wave(self, wave: Sequence[Task]) -> None:
        """Run tasks through all layers, write their responses, and commit them."""
        steps = [(task, *step) for task in wave for step in self.run.steps(task)]
        tokens = sum(task.num_tokens for task in wave)
        begun, waited = time.perf_counter(), self.executor.reader.waited_seconds
        for _, _, batch, _ in steps:
            self._keep_step()
            self.executor.record(batch.start, self.capture.inputs(self.run.tokens.batch(batch)))
        for layer in self.executor.layers():
            buffer: RowBuffer = {}
            current: Task | None = None
            for task, chunk, batch, completes in steps:
                self._keep_step()
                if layer == 0 and self.attempts is not None and task is not current:
                    self._turn_to(task, current)
                    current = task
                if self._sites[layer] and batch.start == chunk.start:
                    buffer = self.writer.free_buffer()
                self._run_batch(layer, chunk, batch, buffer)
                if self._sites[layer] and completes:
                    keys = [(site, pooling) for site in self._sites[layer] for pooling in self.run.spec.poolings]
                    self.writer.write(task.index, chunk, buffer, self.capture.copied(), keys)
            if current is not None and self.attempts is not None:
                self.attempts.leave(current.index)
        for task in wave:
            self.writer.commit(task.index)
        self.executor.note_wave(tokens, time.perf_counter() - begun, self.executor.reader.waited_seconds - waited)

    def _run_batch(self, layer: int, chunk: slice, batch: slice, buffer: RowBuffer) -> None:
        """Run a batch through a layer, and pool what is captured there."""
        forward = partial(self.executor.run, layer, batch.start)
        if self._sites[layer]:
            at = batch.start - chunk.start
            self.capture.run(self.run.tokens.batch(batch), buffer, at, forward, self._sites[layer])
        else:
            forward()
        self.run.count(batch, self.progress, layer, self.executor.num_layers)
        if layer + 1 == self.executor.num_layers:
            self.executor.drop(batch.start)

    def _turn_to(self, task: Task, before: Task | None) -> None:
        """Note which task runs, in the first layer alone: it takes as much memory as the others."""
        assert self.attempts is not None
        if before is not None:
            self.attempts.leave(before.index)
        self.attempts.begin(task.index)

    def _keep_step(self) -> None:
        self.run.team.keep_step(self._before())

    def _before(self) -> int | None:
        self.writer.check()
        return self.run.stop.received
