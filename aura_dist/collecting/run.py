"""What one rank needs to run tasks: their batches, row buffers, the writer of its columns, counts of progress."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import ceil

import torch
import zarr

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

# arrays in a buffer begin at multiples of so many bytes
_ALIGNED = 64

Step = tuple[slice, slice, bool]


@dataclass(frozen=True)
class Run:
    """What one rank needs to run tasks."""

    spec: StoreSpec
    tokens: TokenizedTexts  # in store order
    plans: Mapping[str, ColumnPlan]  # site → what this rank sees and writes of it
    team: Team
    stop: StopFlag
    batch_tokens: int | None = None  # of a batch at most; None: as many as the store says
    by_layer: bool = False  # whether row chunks are written a layer at a time
    # site whose tokens' values are stored → what this rank sees and writes of it, by the rank that owns a block
    token_plans: Mapping[str, Sequence[ColumnPlan]] = field(default_factory=dict)

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
            if self.batch_tokens is None:
                batches = make_batches(self.num_tokens, chunk, self.spec.tokens_per_batch)
            else:  # reading the weights costs more than padding
                batches = make_batches(self.num_tokens, chunk, self.batch_tokens, overhead_tokens=self.batch_tokens)
            steps += [(chunk, batch, batch.stop == chunk.stop) for batch in batches]
        return steps

    def count(self, batch: slice, progress: Progress, layer: int = 0, num_layers: int = 1) -> None:
        """Add a batch to the rows and tokens that all ranks have run, its share for one of the layers; rank 0 logs."""

        def share(amount: int) -> int:
            return amount * (layer + 1) // num_layers - amount * layer // num_layers

        rows = self.team.add("rows", share(batch.stop - batch.start))
        tokens = self.team.add("tokens", share(sum(self.num_tokens[batch])))
        if self.team.world.is_first:
            progress.reach(rows, tokens)

    def writer(self, group: zarr.Group) -> ChunkWriter:
        """The writer of this rank's columns."""
        owned = {name: plan.owned for name, plan in self.plans.items()}
        counts = None
        if is_there(group, FIRST_TOKEN) and self.team.world.layout.tensor <= MAX_TENSOR_RANKS:
            counts = FirstTokenCounts(group, self.spec, owned, self.team.world.column_rank)
        commit = partial(self._commit, group)
        return ChunkWriter(group, owned, self._buffer, commit, counts, self.spec.token_sites)

    def _buffer(self) -> RowBuffer:
        """An empty buffer of one row chunk: every array's columns that are written here, and a row for counts.

        By layer, the arrays of all layers share the memory of the largest layer.
        """
        pinned = self.team.world.device != "cpu"  # so that a GPU copies into it on its own
        layer_of = {site.name: site.layer if self.by_layer else 0 for site in self.spec.sites}
        places, ends = {}, Counter[int]()
        for key, dtype in self.dtypes.items():
            layer, shape = layer_of[key[0]], (self.rows + 1, self.plans[key[0]].num_owned)
            places[key] = (ends[layer], shape, dtype)
            ends[layer] += ceil(shape[0] * shape[1] * dtype.itemsize / _ALIGNED) * _ALIGNED
        memory = torch.empty(max(ends.values(), default=0), dtype=torch.uint8, pin_memory=pinned)
        return {
            key: memory[at : at + shape[0] * shape[1] * dtype.itemsize].view(dtype).reshape(shape).numpy()
            for key, (at, shape, dtype) in places.items()
            if shape[1]
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
