"""Memory of a collection before it is run: the bytes that every rank holds, and which strategies and batches fit.

Pure functions of numbers. The bytes of a rank are the sum of:

- *weights*: the base model to the last captured layer, split by the strategy, and what that gathers at once;
- *activations*: of the largest batch (`ForwardCost`), and every neuron's pooled value for its rows;
- *queue*: row buffers of `NUM_BUFFERS` row chunks of the neurons that the rank writes, page-locked for a GPU, and one
  more being encoded;
- *tokens*: values of single tokens that wait to be written, a batch's being taken and a batch's being encoded;
- *exchange*: where ranks split columns, a row chunk's pooled values that the rank sends to others and gets from them;
- *runtime*: interpreter, libraries, a GPU's context (constants below);
- *texts*: before the weights are read, the tokenizer and the table of texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

from aura_dist.models.strategies.strategy import Room, Spread
from aura_dist.models.strategies.table import STRATEGIES, title
from aura_dist.planning.work import Machine, Work
from aura_dist.ranks.device import page_locked_bytes
from aura_dist.ranks.layout import Layout
from aura_dist.sites.ownership import deal_shards

NUM_BUFFERS = 3
MAX_WAITING_BYTES = 256 * 2**20  # of tokens' values that wait to be written, unless one batch has more
MAX_RANKS = 1024

# anonymous memory of interpreter, libraries, stacks and the heap's slack; measured on Linux, CPython 3.11, torch 2.13
RUNTIME_BYTES = 500_000_000
# of CUDA on the host; of its context, kernels and cuBLAS workspace on the GPU: assumed, not measured here
CUDA_HOST_BYTES = 2_000_000_000
CUDA_DEVICE_BYTES = 1_200_000_000
# because a caching allocator rounds and splits its blocks: assumed, not measured here
CUDA_SLACK = 1.1
# because a CPU's freed blocks stay in the heap beside larger ones, which are mapped: measured, up to 1.45
CPU_SLACK = 1.6
# a fast tokenizer's tables, built from its file; texts as Python strings with their ids
TOKENIZER_BYTES_PER_FILE_BYTE = 18
# of those tables, what is still in the heap, between other blocks, once the tokenizer is gone: measured for Gemma, 2.8
TOKENIZER_LEFT_BYTES_PER_FILE_BYTE = 3
TABLE_BYTES_PER_FILE_BYTE = 10


@dataclass(frozen=True)
class RankMemory:
    """Most that one rank holds, in bytes by purpose.

    `device` is the GPU's memory (empty on a CPU, where all is in `host`); `host` is anonymous memory while texts run;
    `preparing` is anonymous memory before the weights are read; `mapped` are weights in files, read through the page
    cache; `disk` is offloaded to a disk; `streamed` is read again for every batch, or for every wave.
    """

    device: dict[str, int]
    host: dict[str, int]
    preparing: int
    mapped: int = 0
    disk: int = 0
    streamed: int = 0

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def anonymous_bytes(self) -> int:
        """Peak of the host's anonymous memory."""
        return max(sum(self.host.values()), self.preparing)

    def host_bytes(self, num_ranks: int) -> int:
        """Bytes of `num_ranks` ranks on one machine: anonymous memory, and the mapped weights, which they share."""
        return max(num_ranks * sum(self.host.values()) + self.mapped, num_ranks * self.preparing)

    def fits(self, machine: Machine) -> bool:
        device = machine.device_bytes is None or self.device_bytes <= machine.device_bytes
        return device and (machine.host_bytes is None or self.host_bytes(machine.ranks_per_host) <= machine.host_bytes)


def rank_memory(work: Work, spread: Spread, machine: Machine) -> RankMemory:
    """Memory of the rank that holds most."""
    strategy = STRATEGIES[spread.layout.strategy]
    neurons = work.neurons_at_once(strategy.by_layer)
    activations = ceil((CUDA_SLACK if machine.gpu else CPU_SLACK) * _activations(work, spread.layout, neurons))
    owned_bytes = owned_neurons(neurons, spread.layout.tensor) * work.stored_bytes
    buffer = (work.rows_chunk + 1) * owned_bytes  # 1: a row of counts
    queue = NUM_BUFFERS * (page_locked_bytes(buffer) if machine.gpu else buffer) + buffer
    num_ranks = spread.layout.tensor
    exchange = 2 * buffer * (num_ranks - 1) // num_ranks  # a rank sees as much of what it writes as the others do
    runtime = RUNTIME_BYTES + (CUDA_HOST_BYTES if machine.gpu else 0)
    tokens = _tokens(work, num_ranks)
    texts = TABLE_BYTES_PER_FILE_BYTE * work.data_bytes
    preparing = runtime + TOKENIZER_BYTES_PER_FILE_BYTE * work.tokenizer_bytes + texts
    left_of_texts = texts + TOKENIZER_LEFT_BYTES_PER_FILE_BYTE * work.tokenizer_bytes
    used = runtime + queue + exchange + tokens + left_of_texts + (0 if machine.gpu else activations)
    room = Room(
        machine.gpu,
        _left(machine.device_bytes, CUDA_DEVICE_BYTES + activations),
        _left(machine.host_bytes, used),
        ceil(work.hidden_bytes / spread.layout.num_row_workers),
    )
    held = strategy.held(work.weights, spread, room)
    host = {
        "runtime": runtime,
        "texts": left_of_texts,
        "queue": queue,
        "exchange": exchange,
        "tokens": tokens,
        "offloaded weights": held.away.get("cpu", 0),
    }
    host["hidden states"] = held.waiting
    device = {"weights": held.placed, "gathered weights": held.gathered, "activations": activations}
    mapped = 0
    if machine.gpu:
        device["runtime"] = CUDA_DEVICE_BYTES
    else:
        if work.mapped and strategy.maps_files:
            mapped, device["weights"], device["gathered weights"] = held.placed + held.gathered, 0, 0
        host, device = {**host, **device}, {}
    host = {purpose: size for purpose, size in host.items() if size}
    return RankMemory(device, host, preparing, mapped, held.away.get("disk", 0), sum(held.away.values()))


def _tokens(work: Work, num_ranks: int) -> int:
    """Bytes of tokens' values on the host: taken, waiting, and being encoded, which takes two more; and exchanged."""
    waiting = max(MAX_WAITING_BYTES, work.token_bytes) if work.token_bytes else 0
    return waiting + (5 if num_ranks > 1 else 3) * work.token_bytes


def _left(limit: int | None, used: int) -> float:
    return inf if limit is None else max(0, limit - used)


def owned_neurons(neurons: Sequence[tuple[int, int]], num_ranks: int) -> int:
    """Neurons that the rank with most writes, of sites of (width, columns of a shard)."""
    loads = [0] * num_ranks
    for (width, shard), owners in zip(neurons, deal_shards(neurons, num_ranks), strict=True):
        for first, owner in zip(range(0, width, shard), owners, strict=True):
            loads[owner] += min(shard, width - first)
    return max(loads)


def _activations(work: Work, layout: Layout, neurons: Sequence[tuple[int, int]]) -> int:
    """Bytes for the largest batch, as if no rank split it; where ranks split columns, two copies of the widest site."""
    pooled = work.batch_rows * sum(width for width, _ in neurons) * work.pooled_bytes
    exchange = 0
    if layout.tensor > 1:
        exchange = 2 * work.batch_tokens * max(width for width, _ in neurons) * work.pooled_bytes
    forward = work.forward.peak_bytes(work.batch_rows, work.longest, work.batch_tokens)
    return forward + pooled + exchange + work.token_bytes


@dataclass(frozen=True)
class WhatFits:
    """One way to spread the weights: its memory, and the largest `tokens_per_batch` that fits (None: none does)."""

    spread: Spread
    memory: RankMemory
    tokens_per_batch: int | None


def what_fits(work: Work, spread: Spread, machine: Machine) -> WhatFits:
    """Memory under `spread` with the batches of `work`, and the largest batch up to those that fits."""
    memory = rank_memory(work, spread, machine)
    return WhatFits(spread, memory, work.tokens_per_batch if memory.fits(machine) else _largest(work, spread, machine))


def with_largest_batch(work: Work, spread: Spread, machine: Machine) -> Work:
    """`work` with batches as large as fit; a batch is a row chunk at most.

    It is as it was if those are no larger, or all weights have room, so that none is read again.
    """
    if not rank_memory(work, spread, machine).streamed:
        return work
    whole = work.with_batch(work.rows_chunk * work.longest)
    return work.with_batch(max(work.tokens_per_batch, what_fits(whole, spread, machine).tokens_per_batch or 0))


def _largest(work: Work, spread: Spread, machine: Machine) -> int | None:
    """By bisection, because memory never falls as batches grow. A batch holds at least one text of the longest."""

    def fits(tokens: int) -> bool:
        return rank_memory(work.with_batch(tokens), spread, machine).fits(machine)

    low, high = min(work.longest, work.tokens_per_batch), work.tokens_per_batch
    if not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def survey(work: Work, world_size: int, machine: Machine, *, splits: bool) -> list[WhatFits]:
    """How every way of spreading over the ranks fits, the least spread first; `splits`: as in `Strategy.offers`."""
    ways = spreads(world_size, gpu=machine.gpu, splits=splits)
    return [what_fits(work, spread, machine) for spread in ways if _can_hold(work, spread)]


def _can_hold(work: Work, spread: Spread) -> bool:
    return not work.quantised or STRATEGIES[spread.layout.strategy].holds_quantised


def spreads(world_size: int, *, gpu: bool, splits: bool) -> list[Spread]:
    """What every strategy offers, by the ranks that hold one model together; last resorts come last."""
    offers = [spread for s in STRATEGIES.values() for spread in s.offers(world_size, gpu=gpu, splits=splits)]
    return sorted(offers, key=lambda s: (STRATEGIES[s.layout.strategy].last_resort, s.layout.replica_size))


def advice(work: Work, wanted: Spread, machine: Machine, others: Sequence[WhatFits]) -> str:
    """The largest setting that fits, to use instead of `wanted`, which does not."""
    smaller = what_fits(work, wanted, machine).tokens_per_batch
    if smaller is not None:
        return f"the largest batch that fits is --tokens-per-batch {smaller}"
    whole = [f for f in others if f.tokens_per_batch == work.tokens_per_batch]
    cut = [f for f in others if f.tokens_per_batch is not None]
    if whole or cut:
        chosen = whole[0] if whole else cut[0]
        batch = "" if whole else f" --tokens-per-batch {chosen.tokens_per_batch}"
        return f"what fits is --sharding {title(chosen.spread)}{batch}"
    larger = over_more(work, machine, wanted.layout.world_size)
    if larger is not None:
        return f"what fits is --sharding {title(larger)} on {larger.layout.world_size} ranks"
    return "no number of ranks fits, because each alone needs more; use devices or machines with more memory"


def over_more(work: Work, machine: Machine, above: int) -> Spread | None:
    """One model over the fewest ranks, a power of two above `above`, that fit; None if no number does."""
    ranks = 1
    while ranks <= MAX_RANKS:
        for strategy in STRATEGIES.values() if ranks > above else ():
            spread = strategy.over_more(ranks)
            if spread is not None and _can_hold(work, spread) and what_fits(work, spread, machine).tokens_per_batch:
                return spread
        ranks *= 2
    return None
