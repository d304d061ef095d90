"""Tasks → batches → forwards → row chunks: the loop that every rank runs.

Row workers claim tasks one by one, longest first. The ranks of a replica take their batches in step (`Team.claimed`),
because their forwards are collective: one that has no batch left runs an empty turn.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import zarr
from transformers import PreTrainedModel

from aura_dist.collecting.capture import Capture, row_buffer
from aura_dist.collecting.exchange import ColumnExchange
from aura_dist.models.load import DTYPES
from aura_dist.ranks.progress import Progress
from aura_dist.ranks.signals import StopFlag
from aura_dist.ranks.team import Team
from aura_dist.sites.ownership import ColumnPlan
from aura_dist.store.grid import Task, make_batches, row_chunks, rows_per_chunk
from aura_dist.store.record import commit
from aura_dist.store.schema import StoreSpec, stored_dtype
from aura_dist.store.writer import ChunkWriter, RowBuffer
from aura_dist.text.tokens import TokenizedTexts

Step = tuple[slice, slice, bool]


@dataclass(frozen=True)
class Run:
    """What one rank needs to run tasks.

    Attributes
    ----------
    spec, tokens
        What the store holds, and the texts in store order.
    plans
        Site → what this rank sees and writes of it.
    team, stop
        The other ranks, and the signals received.
    """

    spec: StoreSpec
    tokens: TokenizedTexts
    plans: Mapping[str, ColumnPlan]
    team: Team
    stop: StopFlag

    @cached_property
    def num_tokens(self) -> list[int]:
        return [int(n) for n in self.tokens.num_tokens]

    @property
    def rows(self) -> int:
        """Rows of a chunk."""
        return rows_per_chunk(len(self.num_tokens))

    @property
    def dtypes(self) -> dict[tuple[str, str], torch.dtype]:
        """(site, pooling) → dtype of the stored values."""
        return {
            (site.name, pooling): DTYPES[stored_dtype(pooling, self.spec.dtype)]
            for site in self.spec.sites
            for pooling in self.spec.poolings
        }

    def steps(self, task: Task) -> list[Step]:
        """A task's batches in order: (row chunk, batch, whether it completes the row chunk)."""
        steps = []
        for chunk in row_chunks(task, self.rows):
            batches = make_batches(self.num_tokens, chunk, self.spec.tokens_per_batch)
            steps += [(chunk, batch, batch.stop == chunk.stop) for batch in batches]
        return steps

    def writer(self, group: zarr.Group) -> ChunkWriter:
        """The writer of this rank's columns."""

        def buffer() -> RowBuffer:
            return row_buffer(self.dtypes, self.plans, self.rows, self.team.world.device)

        owned = {name: plan.owned for name, plan in self.plans.items()}
        return ChunkWriter(group, owned, buffer, lambda task, bad: self._commit(group, task, bad))

    def _commit(self, group: zarr.Group, task: int, nonfinite: Mapping[str, int]) -> None:
        """Called once this rank's part of a task is on disk; the last rank of the row worker marks the task."""
        ranks = range(self.team.world.layout.tensor)
        if nonfinite:
            self.team.note(f"nonfinite/{task}/{self.team.world.column_rank}", nonfinite)
        if self.team.count(f"flushed/{task}") == len(ranks) - 1:
            found: Counter[str] = Counter()
            for rank in ranks:
                found.update(self.team.noted(f"nonfinite/{task}/{rank}"))
            commit(group, task, found)


def stream(
    model: PreTrainedModel,
    run: Run,
    tasks: Sequence[Task],
    writer: ChunkWriter,
    begin: Callable[[int], None] = lambda task: None,
) -> None:
    """Run this rank's share of `tasks` through a base model and hand the pooled responses to the writer.

    `begin` is called with each task that this row worker begins, by its first rank.

    Raises
    ------
    RunInterruptedError
        A signal came; the task under way is dropped, by all ranks of the replica at the same batch.
    PeerError
        Another rank failed.
    StoreError
        The writer failed.
    """
    team = run.team
    queue = sorted(tasks, key=lambda t: (-t.num_tokens, t.index))
    progress = Progress("collect", sum(t.stop - t.start for t in tasks), sum(t.num_tokens for t in tasks))
    exchange = ColumnExchange(run.plans, run.dtypes, run.rows, team) if team.world.layout.tensor > 1 else None
    steps: list[Step] = []

    def before() -> int | None:
        writer.check()
        return run.stop.received

    with Capture(model, run.spec.sites, run.plans, run.spec.poolings, team.world.device, exchange) as capture:
        batches = _Batches(run, writer, capture, exchange, progress)
        for turn in team.claimed("tasks", queue, before, lambda task: len(run.steps(task))):
            if turn is None:
                capture.skip(run.tokens.batch(slice(0, 1)))
                continue
            task, index = turn
            if index == 0:
                steps = run.steps(task)
                if team.world.column_rank == 0:
                    begin(task.index)
            batches.take(steps[index])
            if index + 1 == len(steps):
                writer.commit(task.index)
    if team.world.is_first:
        progress.reach(team.add("rows", 0), team.add("tokens", 0))
        progress.finish()


class _Batches:
    """The batches of one rank: the row buffer under way, and the progress that all ranks share."""

    def __init__(
        self, run: Run, writer: ChunkWriter, capture: Capture, exchange: ColumnExchange | None, progress: Progress
    ) -> None:
        self._run, self._writer, self._capture = run, writer, capture
        self._exchange, self._progress = exchange, progress
        self._buffer: RowBuffer = {}

    def take(self, step: Step) -> None:
        """Run one batch; hand its row chunk over if that completes it."""
        chunk, batch, completes = step
        if batch.start == chunk.start:
            self._buffer = self._writer.free_buffer()
        self._capture.run(self._run.tokens.batch(batch), self._buffer, batch.start - chunk.start)
        if self._run.team.world.column_rank == 0:
            self._tell(batch)
        if completes:
            wait = self._capture.copied()
            if self._exchange is not None:
                wait()
                self._exchange.complete(self._buffer)
            self._writer.write(chunk.start, chunk.stop, self._buffer, wait)

    def _tell(self, batch: slice) -> None:
        """Add a batch to what all ranks have done; rank 0 logs the sum."""
        team = self._run.team
        rows = team.add("rows", batch.stop - batch.start)
        tokens = team.add("tokens", sum(self._run.num_tokens[batch]))
        if team.world.is_first:
            self._progress.reach(rows, tokens)
