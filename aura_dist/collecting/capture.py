"""Pooling of every site's values on the device, into the store's row buffers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aura_dist.collecting.exchange import ColumnExchange
from aura_dist.collecting.tokens import TokenSink
from aura_dist.errors import ModelError
from aura_dist.sites.find import tap_of
from aura_dist.sites.kinds import except_for
from aura_dist.sites.ownership import ColumnPlan
from aura_dist.sites.pooling import POOLINGS, TokenMask
from aura_dist.sites.routed import Routed
from aura_dist.sites.site import Site
from aura_dist.sites.tap import Callback, Tap, attached
from aura_dist.store.writer import RowBuffer
from aura_dist.text.tokens import Batch


class Capture:
    """Runs batches through a base model and copies each site's pooled values to the host.

    Parameters
    ----------
    model
        Base model (no language-model head), in eval mode.
    sites, poolings
        Where to listen, and names in `POOLINGS`.
    plans
        Site → what this rank sees and writes of it.
    device
        Where the forward takes its input.
    exchange
        Takes the pooled values that other ranks write; None where every rank writes what it sees.
    count_row
        Row of the buffers that takes, for poolings with `of_token`, how many rows of the row chunk so far have their
        value at the first token; None where it is not counted.
    sink
        Takes the values of every token, at some of the sites; None where none are stored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        plans: Mapping[str, ColumnPlan],
        poolings: Sequence[str],
        device: str,
        exchange: ColumnExchange | None = None,
        count_row: int | None = None,
        sink: TokenSink | None = None,
    ) -> None:
        self._model = model
        self._sink = sink
        self._plans = plans
        self._poolings = {name: POOLINGS[name] for name in poolings}
        self._count_row = count_row
        self._counts: dict[tuple[str, str], Tensor] = {}
        self._exchange = exchange
        self._device = torch.device(device)
        self._batch: Batch | None = None
        self._buffer: RowBuffer = {}
        self._at = 0
        self._masks: dict[torch.device, TokenMask] = {}
        self._called: set[str] = set()
        self._pooled: list[tuple[tuple[str, str], Tensor, int]] = []
        self._taps = [tap_of(model, site) for site in sites]
        self._streams: dict[torch.device, Any] = {}

    def listening(self) -> AbstractContextManager[None]:
        """Context within which the model's forwards are captured."""
        return attached(self._model, [(tap, self._callback(tap)) for tap in self._taps])

    def run(
        self,
        batch: Batch,
        buffer: RowBuffer,
        at: int,
        forward: Callable[[], object] | None = None,
        sites: Collection[str] | None = None,
    ) -> None:
        """Forward `batch`; put its pooled outputs into rows [at, at + B) of `buffer`; a row chunk begins at row 0.

        `forward` is what runs the batch through a part of the model, which calls `sites`; None is the whole model. On a
        GPU the copies are asynchronous: see `copied`.

        Raises
        ------
        ModelError
            A site was not called, was called twice, or had values of another shape.
        """
        self._batch, self._buffer, self._at = batch, buffer, at
        self._masks.clear()
        self._pooled.clear()
        self._called.clear()
        if forward is None:
            self._forward(batch)
        else:
            forward()
        missing = [name for name in (self._plans if sites is None else sites) if name not in self._called]
        if missing:
            raise ModelError(
                f"{len(missing)} modules were not called in the forward pass ({missing[0]}, …); leave them out: "
                f"--modules … {except_for(missing, self._called)}"
            )
        for key, values_BD, row in self._pooled:
            with self._beside_forward(values_BD):
                self._copy_out(key, values_BD, row)

    def skip(self, batch: Batch) -> None:
        """Forward `batch` and drop the result: keeps step with ranks that still have rows."""
        self._batch = None
        self._forward(batch)

    def copied(self) -> Callable[[], None]:
        """A call that blocks until the buffers given to `run` so far hold their values."""
        events = [stream.record_event() for stream in self._streams.values()]

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait

    @torch.no_grad()
    def _forward(self, batch: Batch) -> None:
        self._model(**self.inputs(batch), use_cache=False)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The arguments of the model's forward, on its device."""
        return {
            "input_ids": torch.from_numpy(batch.input_ids).to(self._device),
            "attention_mask": torch.from_numpy(batch.attention_mask).to(self._device, torch.int64),
        }

    def _beside_forward(self, pooled_BD: Tensor) -> AbstractContextManager[Any]:
        """On a GPU, the stream of the copies, after all that the forward has queued so far."""
        device = pooled_BD.device
        if device.type == "cpu":
            return nullcontext()
        accelerator = torch.get_device_module(device)
        if device not in self._streams:
            self._streams[device] = accelerator.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(accelerator.current_stream(device))
        pooled_BD.record_stream(stream)
        beside: AbstractContextManager[Any] = accelerator.stream(stream)
        return beside

    def _keep(self, key: tuple[str, str], values_BD: Tensor, row: int) -> None:
        """Take values to rows of the buffer from `row` on: at once on a CPU, else after the forward."""
        if values_BD.device.type == "cpu":  # kept until the forward ends, they would fragment the heap
            self._copy_out(key, values_BD, row)
        else:
            self._pooled.append((key, values_BD, row))

    def _copy_out(self, key: tuple[str, str], pooled_BD: Tensor, row: int) -> None:
        plan = self._plans[key[0]]
        rows = slice(row, row + len(pooled_BD))
        first = _needed(plan).start
        aside = pooled_BD.device.type != "cpu"
        for move in plan.keeps:
            target = torch.from_numpy(self._buffer[key])[rows, slice(*move.target)]
            target.copy_(pooled_BD[:, move.source[0] - first : move.source[1] - first], non_blocking=aside)
        if self._exchange is not None:
            self._exchange.stage(key, pooled_BD, rows)

    def _mask_on(self, device: torch.device) -> TokenMask:
        """The batch's mask on a device; layers may be on several."""
        assert self._batch is not None
        if device not in self._masks:
            self._masks[device] = TokenMask.build(self._batch.pool_mask, device, self._batch.input_ids)
        return self._masks[device]

    def _callback(self, tap: Tap) -> Callback:
        name, plan = tap.site, self._plans[tap.site]
        needed = _needed(plan)

        def pool(raw: object, alone: bool) -> None:
            if self._batch is None:
                return
            acts_BTD = tap.read(raw, plan.num_seen, self._batch.input_ids.shape)
            if name in self._called:
                raise ModelError(
                    f"module {name!r} is called twice in a forward pass; leave it out: --modules … {except_for([name])}"
                )
            self._called.add(name)
            if self._sink is not None and name in self._sink:
                self._sink.take(name, self._batch, acts_BTD)
            if needed.stop > needed.start:
                mask = self._mask_on(acts_BTD.device)
                # of routed rows, all columns are pooled, because a share of them may cut an expert
                within = needed if isinstance(acts_BTD, Routed) else slice(None)
                acts_BTD = acts_BTD if isinstance(acts_BTD, Routed) else acts_BTD[..., needed]
                for pooling, how in self._poolings.items():
                    key, pooled_BD = (name, pooling), how.pool(mask, acts_BTD)
                    self._keep(key, pooled_BD[:, within], self._at)
                    if self._count_row is not None and how.of_token:
                        count_1D = mask.count_first(pooled_BD, acts_BTD, how.of_token)[:, within]
                        self._counts[key] = count_1D + self._counts[key] if self._at else count_1D
                        self._keep(key, self._counts[key], self._count_row)

        return pool


def _needed(plan: ColumnPlan) -> slice:
    """The run of seen columns that someone writes from here: all, or this rank's share of a replicated output."""
    used = [m.source for m in plan.keeps] + [i for sent in plan.sends.values() for i in sent]
    return slice(min(a for a, _ in used), max(b for _, b in used)) if used else slice(0, 0)
