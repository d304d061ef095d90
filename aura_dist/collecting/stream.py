"""The loop that every rank runs: it claims tasks, runs their batches, and hands row chunks to the writer.

Row workers claim tasks one by one, longest first. The ranks of a replica run their batches in step (`Team.claimed`),
because their forwards are collective. A rank without a batch runs a forward all the same, and drops its result.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import zarr
from transformers import PreTrainedModel

from aura_dist.collecting.capture import Capture
from aura_dist.collecting.exchange import ColumnExchange
from aura_dist.models.load import DTYPES
from aura_dist.ranks.progress import Progress
from aura_dist.ranks.signals import StopFlag
from aura_dist.ranks.team import Team
from aura_dist.sites.ownership import ColumnPlan
from aura_dist.store.access import is_there
from aura_dist.store.first_token import FirstTokenCounts
from aura_dist.store.grid import Task, make_batches, row_chunks, rows_per_chunk
from aura_dist.store.record import commit
from aura_dist.store.schema import FIRST_TOKEN, MAX_TENSOR_RANKS, StoreSpec, stored_dtype
from aura_dist.store.writer import ChunkWriter, RowBuffer
from aura_dist.text.tokens import TokenizedTexts

Step = tuple[slice, slice, bool]


@dataclass(frozen=True)
class Run:
    """What one rank needs to run tasks."""

    spec: StoreSpec
    tokens: TokenizedTexts  # in store order
    plans: Mapping[str, ColumnPlan]  # site → what this rank sees and writes of it
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
        owned = {name: plan.owned for name, plan in self.plans.items()}
        counts = None
        if is_there(group, FIRST_TOKEN) and self.team.world.layout.tensor <= MAX_TENSOR_RANKS:
            counts = FirstTokenCounts(group, self.spec, owned, self.team.world.column_rank)
        return ChunkWriter(group, owned, self._buffer, lambda task, bad: self._commit(group, task, bad), counts)

    def _buffer(self) -> RowBuffer:
        """An empty buffer of one row chunk: every array's columns that are written here, and a row for counts."""
        pinned = self.team.world.device != "cpu"  # so that a GPU copies into it on its own
        return {
            key: torch.empty((self.rows + 1, self.plans[key[0]].num_owned), dtype=dtype, pin_memory=pinned).numpy()
            for key, dtype in self.dtypes.items()
            if self.plans[key[0]].num_owned
        }

    def _commit(self, group: zarr.Group, task: int, nonfinite: Mapping[str, int]) -> None:
        """Note that this rank's part of a task is on disk; the row worker's last rank marks the task as finished."""
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

    The first rank of a row worker calls `begin` with the index of each task that the row worker begins.

    Raises
    ------
    RunInterruptedError
        A signal came. All ranks of the replica stop at the same batch and drop their task.
    PeerError
        Another rank failed.
    StoreError
        The writer failed.
    """
    team = run.team
    leads = team.world.column_rank == 0
    queue = sorted(tasks, key=lambda t: (-t.num_tokens, t.index))
    progress = Progress("collect", sum(t.stop - t.start for t in tasks), sum(t.num_tokens for t in tasks))
    exchange = ColumnExchange(run.plans, run.dtypes, run.rows + 1, team) if team.world.layout.tensor > 1 else None
    count_row = None if writer.counts is None else run.rows
    capture = Capture(model, run.spec.sites, run.plans, run.spec.poolings, team.world.device, exchange, count_row)
    steps: list[Step] = []
    buffer: RowBuffer = {}

    def before() -> int | None:
        writer.check()
        return run.stop.received

    with capture.listening():
        for turn in team.claimed("tasks", queue, before, lambda task: len(run.steps(task))):
            if turn is None:
                capture.skip(run.tokens.batch(slice(0, 1)))
                continue
            task, index = turn
            if index == 0:
                steps = run.steps(task)
                if leads:
                    begin(task.index)
            chunk, batch, completes = steps[index]
            if batch.start == chunk.start:
                buffer = writer.free_buffer()
            capture.run(run.tokens.batch(batch), buffer, batch.start - chunk.start)
            if leads:
                _count(run, batch, progress)
            if completes:
                copied = capture.copied()
                if exchange is not None:
                    copied()
                    exchange.complete(buffer)
                writer.write(chunk.start, chunk.stop, buffer, copied)
            if index + 1 == len(steps):
                writer.commit(task.index)
    if team.world.is_first:
        progress.reach(team.add("rows", 0), team.add("tokens", 0))
        progress.finish()


def _count(run: Run, batch: slice, progress: Progress) -> None:
    """Add a batch to the rows and tokens that all ranks have run; rank 0 logs the sums."""
    rows = run.team.add("rows", batch.stop - batch.start)
    tokens = run.team.add("tokens", sum(run.num_tokens[batch]))
    if run.team.world.is_first:
        progress.reach(rows, tokens)
