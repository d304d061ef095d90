"""Continuations: prefill once a prompt, then token by token with the cache; finished rows make room for new ones.

Where the model class is one of `LEFT_PADDED`, prompts of any lengths share a forward: shorter ones are padded on the
left, the attention mask leaves the padding out, and positions count from each row's first token. Prompts of other
classes must have equal numbers of tokens, so that nothing is padded and the model computes for each prompt what it
computes for that prompt alone.

**A step does not wait for a GPU.** What the host has to know, which rows go on and whether logits are finite, is copied
beside the work and read while the next step runs. So a row that met a stop id makes another token or two, which are cut
off. Rows leave only after their last logits were checked.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

from aura_dist.errors import ModelError
from aura_dist.evaluation.cached import append_in_place, drop_columns, join, mask_unread, only_attention
from aura_dist.evaluation.products import exact_products
from aura_dist.evaluation.sampling import Decoding, are_finite, choose, reading_waits
from aura_dist.models.load import input_device

# `model_type`s of transformers' classes whose logits of a row that is padded on the left are those of the row alone,
# as tests/evaluation/test_left_padding.py checks for each
LEFT_PADDED = frozenset(
    {
        "bloom", "cohere2", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama",
        "mistral", "mixtral", "mpt", "olmo2", "opt", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
    }
)  # fmt: skip
# rows leave the batch, and new ones come, when so large a share of it is free
_FREE_SHARE = 0.25
# columns that a cache has free after it was moved: rows that end early leave few of them unused
_ROOM = 32


def takes_padding(model: PreTrainedModel) -> bool:
    """Whether prompts of different lengths can share a forward of `model`."""
    return type(model).__module__.startswith("transformers.") and model.config.model_type in LEFT_PADDED


@dataclass(frozen=True)
class Rows:
    """B continuations of P prompts; prompts of different lengths only where the model `takes_padding`."""

    prompt_ids: Sequence[Sequence[int]]  # P prompts
    prompt_of: Sequence[int]  # [B] index of each continuation's prompt
    keys: Sequence[int]  # [B] keys of the noise


@dataclass
class _Flight:
    """B rows in flight, of C columns: padding, prompt and what is made so far."""

    # on the host
    number_B: npt.NDArray[np.int64]  # in the order in which rows were given
    first_B: npt.NDArray[np.int64]  # as `start_B`
    count_B: npt.NDArray[np.int64]  # as `made_B`
    known_B: npt.NDArray[np.bool_]  # `alive_B` after the last step whose copy was read
    # on the device
    keys_B: Tensor
    start_B: Tensor  # column of the first token
    made_B: Tensor  # how many tokens were chosen; they are in the last columns
    alive_B: Tensor  # no stop id so far
    seen_BC: Tensor
    finite: Tensor  # [] whether all logits so far were
    cache: Cache | None
    pending: list[Callable[[], list[bool]]] = field(default_factory=list)  # copies of `alive_B` and `finite`, by step

    def send(self) -> None:
        """Start to copy to the host which rows go on."""
        self.pending.append(_copied(torch.cat([self.alive_B, self.finite[None]])))

    def read(self, *, may_wait: bool = False) -> None:
        """Update `known_B`; unless it may wait, not by the last step. ModelError if logits are NaN or infinite."""
        num_left = int(reading_waits(self.alive_B) and not may_wait)
        while len(self.pending) > num_left:
            *alive, finite = self.pending.pop(0)()
            if not finite:
                raise ModelError(
                    "the model's logits are NaN or infinite; check its weights, another --dtype, or a smaller "
                    "--strength"
                )
            self.known_B &= np.array(alive)

    def keep(self, index_K: npt.NDArray[np.int64]) -> None:
        """Keep some of the rows, and no column that all of them pad; the cache must be one of attention alone."""
        self.pending.clear()  # of other rows
        on_device = torch.from_numpy(index_K).to(self.keys_B.device)
        for name in _OF_ROWS:
            held = getattr(self, name)
            setattr(self, name, held[on_device if isinstance(held, Tensor) else index_K])
        assert self.cache is not None
        self.cache.batch_select_indices(on_device)
        number = int(self.first_B.min())
        self._widen(-number)
        drop_columns(self.cache, number)

    def add(self, other: "_Flight") -> None:
        """Take the rows of `other`."""
        assert self.cache is not None
        assert other.cache is not None
        join(self.cache, other.cache)
        other.read()
        by = self.seen_BC.shape[1] - other.seen_BC.shape[1]
        (other if by > 0 else self)._widen(abs(by))
        for name in _OF_ROWS:
            both: list[Any] = [getattr(self, name), getattr(other, name)]
            setattr(self, name, torch.cat(both) if isinstance(both[0], Tensor) else np.concatenate(both))
        self.finite = self.finite & other.finite
        self.pending.clear()

    def _widen(self, by: int) -> None:
        self.start_B = self.start_B + by
        self.first_B = self.first_B + by
        self.seen_BC = pad(self.seen_BC, (by, 0))


_OF_ROWS = ("number_B", "first_B", "count_B", "known_B", "keys_B", "start_B", "made_B", "alive_B", "seen_BC")


def _copied(state: Tensor) -> Callable[[], list[bool]]:
    """Start to copy `state` to the host; what is returned waits for that copy alone."""
    if state.device.type == "cpu":
        return state.tolist
    host = torch.empty(state.shape, dtype=state.dtype, pin_memory=True).copy_(state, non_blocking=True)
    done = torch.Event(state.device)
    done.record(torch.accelerator.current_stream(state.device))

    def read() -> list[bool]:
        done.synchronize()
        values: list[bool] = host.tolist()
        return values

    return read


@dataclass
class Decoder:
    """Continues rows with one model, which is in eval mode, under any strategy.

    Attributes
    ----------
    stop_ids
        Ids that end a continuation.
    any_alive
        Takes whether this rank needs another step; returns whether any rank does whose forwards are collective with
        this one's.
    agreed
        Takes this rank's choice of ids; returns the choice that all ranks which share a forward continue with.
    """

    model: PreTrainedModel
    how: Decoding
    stop_ids: Collection[int]
    any_alive: Callable[[bool], bool] = lambda alive: alive
    agreed: Callable[[Tensor], Tensor] = lambda ids_B: ids_B
    _selects: bool = field(default=True, init=False)
    _stop: Tensor | None = field(default=None, init=False)

    @torch.no_grad()
    def run(
        self,
        rows: Rows,
        *,
        counts: bool = True,
        most: int = 0,
        more: Callable[[int], Rows | None] = lambda room: None,
        put: Callable[[dict[int, list[int]]], None] = lambda made: None,
    ) -> list[list[int]]:
        """Ids of each continuation, without the stop id; ModelError if logits are NaN or infinite.

        Parameters
        ----------
        counts
            False for rows whose result is dropped.
        most
            Rows in flight at a time, if that is more than those of `rows`.
        more
            Takes for how many rows there is room; returns as many or fewer, or None. The ids of these rows follow those
            of `rows`, in the order in which they were given. Only where the model `takes_padding`, and where no other
            rank's forwards are collective with this one's.
        put
            Takes the ids of continuations as soon as they leave, by their place in that order.
        """
        made: dict[int, list[int]] = {}

        def land(flight: _Flight, gone_B: npt.NDArray[np.bool_]) -> None:
            flight.read(may_wait=True)  # so that no row lands whose logits were not checked
            ids = self._made(flight, gone_B.nonzero()[0])
            made.update(ids)
            put(ids)

        with exact_products(self.model), _head_in_one_product(self.model), _no_look_for_padding(self.model):
            flight = self._begin(rows, 0)
            num_given, num_left, most = len(rows.keys), self.how.max_new_tokens - 1, max(most, len(rows.keys))
            while True:
                alive_B = self._alive(flight)
                num_alive = int(alive_B.sum())
                room = most - num_alive
                new = more(room) if room and room >= _FREE_SHARE * most else None
                if num_alive and num_alive <= (1 - _FREE_SHARE) * len(alive_B) and self._selects:
                    land(flight, ~alive_B)
                    flight.keep(alive_B.nonzero()[0])
                if new is not None:
                    joining = self._begin(new, num_given)
                    num_given, num_left = num_given + len(new.keys), self.how.max_new_tokens - 1
                    if num_alive:
                        flight.add(joining)
                    else:
                        land(flight, ~alive_B)
                        flight = joining
                    continue
                if not num_left or not self.any_alive(counts and num_alive > 0):
                    break
                self._step(flight)
                num_left -= 1
            land(flight, np.ones_like(flight.known_B))
        return [made[number] for number in range(num_given)]

    def _alive(self, flight: _Flight) -> npt.NDArray[np.bool_]:
        """[B] rows that go on; where reading waits, stop ids of the last step are not seen yet."""
        flight.read()
        alive_B: npt.NDArray[np.bool_] = flight.known_B & (flight.count_B < self.how.max_new_tokens)
        return alive_B

    def _made(self, flight: _Flight, chosen_K: npt.NDArray[np.int64]) -> dict[int, list[int]]:
        """Number of each chosen row → the ids before its stop id."""
        made = {}
        chosen = flight.seen_BC[torch.from_numpy(chosen_K).to(flight.seen_BC.device)].tolist()
        numbers, counts = flight.number_B[chosen_K].tolist(), flight.count_B[chosen_K].tolist()
        for number, count, ids in zip(numbers, counts, chosen, strict=True):
            ids = ids[len(ids) - count :][: self.how.max_new_tokens]
            made[number] = ids[: next((t for t, token in enumerate(ids) if token in self.stop_ids), len(ids))]
        return made

    def _begin(self, rows: Rows, first: int) -> _Flight:
        """Rows with their first token; their numbers count from `first`."""
        device = input_device(self.model)
        longest = max(map(len, rows.prompt_ids))
        starts = [longest - len(ids) for ids in rows.prompt_ids]
        # any id serves as padding
        prompts_PT = torch.tensor([[ids[0]] * s + [*ids] for s, ids in zip(starts, rows.prompt_ids, strict=True)])
        start_P, of_B = torch.tensor(starts, device=device), torch.tensor(rows.prompt_of, device=device)
        prompts_PT = prompts_PT.to(device)
        logits_BV, cache = self._prefill(prompts_PT, start_P if any(starts) else None, of_B)
        num_rows = len(rows.prompt_of)
        flight = _Flight(
            np.arange(first, first + num_rows),
            np.array(starts)[list(rows.prompt_of)],
            np.zeros(num_rows, dtype=np.int64),
            np.ones(num_rows, dtype=np.bool_),
            torch.tensor(rows.keys, dtype=torch.int64, device=device),
            start_P[of_B],
            torch.zeros_like(of_B),
            torch.ones_like(of_B, dtype=torch.bool),
            prompts_PT[of_B],
            torch.ones((), dtype=torch.bool, device=device),
            cache,
        )
        self._choose(flight, logits_BV)
        return flight

    def _choose(self, flight: _Flight, logits_BV: Tensor) -> None:
        """Append the next token of each row; a row ends with a stop id or with its last token."""
        ids_B = self.agreed(choose(logits_BV, self.how, flight.keys_B, flight.made_B))
        flight.seen_BC = torch.cat([flight.seen_BC, ids_B[:, None]], dim=1)
        flight.made_B = flight.made_B + 1
        flight.count_B = flight.count_B + 1
        if self._stop is None:  # once, because a GPU waits for what is copied to it
            self._stop = torch.tensor(sorted(self.stop_ids), dtype=torch.int64, device=ids_B.device)
        flight.alive_B = flight.alive_B & (ids_B[:, None] != self._stop).all(-1)
        flight.finite = flight.finite & are_finite(logits_BV)
        flight.send()

    def _prefill(self, prompts_PT: Tensor, start_P: Tensor | None, of_B: Tensor) -> tuple[Tensor, Cache | None]:
        """[B, V] logits after the prompts, and the cache of B rows, None if its kind is unknown."""
        if self._selects:
            logits_PV, cache = self._forward(prompts_PT, start_P, prompts_PT.shape[1], None)
            if cache is not None and only_attention(cache):
                cache.batch_select_indices(of_B)
                append_in_place(cache, min(_ROOM, self.how.max_new_tokens))
                return logits_PV[of_B], cache
            self._selects = False
        rows_BT = prompts_PT[of_B]
        return self._forward(rows_BT, None if start_P is None else start_P[of_B], rows_BT.shape[1], None)

    def _step(self, flight: _Flight) -> None:
        new = flight.seen_BC if flight.cache is None else flight.seen_BC[:, -1:]
        start_B = flight.start_B if flight.first_B.any() else None
        logits_BV, flight.cache = self._forward(new, start_B, flight.seen_BC.shape[1], flight.cache)
        self._choose(flight, logits_BV)

    def _forward(
        self, ids_BT: Tensor, start_B: Tensor | None, num_columns: int, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        """[B, V] logits of the last of `num_columns` columns, and the cache after it; no `start_B` is no padding."""
        taken = inspect.signature(self.model.forward).parameters
        # the head on the last position alone: of a long prompt with a large vocabulary it would be most of the work
        more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        columns_C = torch.arange(num_columns, device=ids_BT.device)
        positions_BC = columns_C.expand(len(ids_BT), -1)
        if start_B is not None:
            more["attention_mask"] = (positions_BC >= start_B[:, None]).long()
            positions_BC = (positions_BC - start_B[:, None]).clamp(min=0)
        if "position_ids" in taken:
            more["position_ids"] = positions_BC[:, num_columns - ids_BT.shape[1] :]
        if cache is not None:
            mask_unread(cache, start_B is not None)
        output = self.model(input_ids=ids_BT, past_key_values=cache, use_cache=True, **more)
        cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1], cache if isinstance(cache, Cache) else None


@contextmanager
def _head_in_one_product(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the head takes the hidden states of the last tokens as one matrix.

    They are a slice, and torch multiplies each row of a slice by a copy of the weight: for 16 prompts and a vocabulary
    of 262,144 that took 5 times as long in float32, and 500 times in bfloat16 on a CPU with instructions for it.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, inputs: tuple(map(Tensor.contiguous, inputs)))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _no_look_for_padding(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, models without a mask do not look for padding, to warn of it: GPT-2 would read its ids."""
    base: Any = model.base_model
    base.warn_if_padding_and_no_attention_mask = lambda input_ids, attention_mask: None
    try:
        yield
    finally:
        vars(base).pop("warn_if_padding_and_no_attention_mask", None)
