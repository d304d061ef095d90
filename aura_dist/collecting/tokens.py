"""The values of every token of a batch, on their way from a forward to the store, a site at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aura_dist.collecting.run import Run
from aura_dist.errors import ModelError
from aura_dist.models.load import DTYPES
from aura_dist.ranks.team import Team
from aura_dist.sites.kinds import except_for
from aura_dist.sites.ownership import ColumnPlan, Move, width_of
from aura_dist.sites.routed import Routed
from aura_dist.store.grid import token_grid
from aura_dist.store.schema import tasks_of
from aura_dist.store.writer import ChunkWriter
from aura_dist.text.tokens import Batch


@dataclass
class TokenSink:
    """Takes sites' values batch by batch, and hands them to the writer as blocks of the store.

    Each block of a site has one owner among the tensor-parallel ranks: they take turns, so that each writes about as
    much. The others send it their columns, through host memory, while the forward runs.

    Attributes
    ----------
    plans
        Site → what this rank sees and writes of it, by the rank that owns a block.
    """

    run: Run
    writer: ChunkWriter
    plans: Mapping[str, Sequence[ColumnPlan]]
    _blocks: dict[int, int] = field(init=False)  # first row of a block → its number
    _sites: dict[str, int] = field(init=False)  # site → its number

    def __post_init__(self) -> None:
        self._grid = token_grid(self.run.num_tokens, self.run.spec.tokens_per_batch)
        self._blocks = {rows.start: number for number, rows in enumerate(self._grid.blocks)}
        self._sites = {site: number for number, site in enumerate(self.plans)}
        tasks = tasks_of(self.run.tokens.num_tokens, self.run.spec.tokens_per_batch)
        self._starts = np.array([task.start for task in tasks])
        self._dtype = DTYPES[self.run.spec.dtype]

    def __contains__(self, site: object) -> bool:
        return site in self.plans

    def take(self, site: str, batch: Batch, acts_BTD: Tensor | Routed) -> None:
        """Take the values of a batch, all columns that this rank sees; waits where many wait to be written.

        All tensor-parallel ranks call this together. ModelError if the store's dtype cannot hold the values.
        """
        values_TD = self._values(site, batch, acts_BTD)
        block = self._blocks[batch.rows.start]
        owner = (self._sites[site] + block) % len(self.plans[site])
        whole_TD = gathered(values_TD, self.plans[site][owner], self.run.team)
        if whole_TD is not None:
            task = int(np.searchsorted(self._starts, batch.rows.start, side="right")) - 1
            self.writer.write_tokens(task, site, block * self._grid.block_tokens, as_stored(whole_TD))

    def _values(self, site: str, batch: Batch, acts_BTD: Tensor | Routed) -> Tensor:
        """[T, D] on the host: the rows' tokens, one row after the other, in memory of their own."""
        acts_BTD = acts_BTD.dense(batch.input_ids.shape) if isinstance(acts_BTD, Routed) else acts_BTD
        if torch.promote_types(acts_BTD.dtype, self._dtype) != self._dtype:
            raise ModelError(
                f"module {site!r}: expected values of {self.run.spec.dtype}, as which tokens are stored, got "
                f"{str(acts_BTD.dtype).removeprefix('torch.')}; leave it out: --keep-tokens {except_for([site])}, or "
                "collect with --dtype float32"
            )
        mask_BT = torch.from_numpy(batch.attention_mask).to(acts_BTD.device)
        return acts_BTD[mask_BT].to("cpu", self._dtype)


def gathered(values_TD: Tensor, plan: ColumnPlan, team: Team) -> Tensor | None:
    """All columns of a site, from the ranks that see them; None on those that do not own them, which send theirs."""
    if plan.keeps == (Move((0, plan.num_owned), (0, plan.num_owned)),) and not plan.receives:
        return values_TD
    parts = {
        peer: torch.cat([values_TD[:, slice(*interval)] for interval in intervals], dim=1)
        for peer, intervals in plan.sends.items()
    }
    came = {
        peer: values_TD.new_empty((len(values_TD), width_of(intervals))) for peer, intervals in plan.receives.items()
    }
    # as bytes, because the library does not send all dtypes
    sent, filled = ({peer: part.view(torch.uint8) for peer, part in each.items()} for each in (parts, came))
    team.exchange(sent, filled)
    if not plan.owned:
        return None
    whole_TD = values_TD.new_empty((len(values_TD), plan.num_owned))
    for move in plan.keeps:
        whole_TD[:, slice(*move.target)] = values_TD[:, slice(*move.source)]
    for peer, part in came.items():
        widths = [stop - start for start, stop in plan.receives[peer]]
        for interval, columns in zip(plan.receives[peer], torch.split(part, widths, dim=1), strict=True):
            whole_TD[:, slice(*interval)] = columns
    return whole_TD


def as_stored(values_TD: Tensor) -> NDArray[np.generic]:
    """The array of a host tensor; the bits of bfloat16, which NumPy lacks."""
    if values_TD.dtype == torch.bfloat16:
        return values_TD.contiguous().view(torch.uint16).numpy()
    return values_TD.contiguous().numpy()
