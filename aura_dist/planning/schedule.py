"""Batches and seconds of a collection before it is run."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from aura_dist.planning.budget import RankMemory
from aura_dist.planning.work import ForwardCost
from aura_dist.ranks.layout import Layout
from aura_dist.store.grid import make_batches

# sustained TFLOP/s of one rank where none is stated: about 40 % of an A100's 312 in 16 bits and two thirds of its 19.5
# in float32 (NVIDIA A100 data sheet); a CPU's is that of two idle cores of an AMD EPYC (Zen 3) in float32
TFLOPS = {("cuda", 2): 120.0, ("cuda", 4): 12.0, ("cpu", 4): 0.15, ("cpu", 2): 0.15}
# bytes a second from the host's memory to a GPU (PCIe 4.0 × 16) and from a local NVMe disk
HOST_RATE = 20e9
DISK_RATE = 2e9


@dataclass(frozen=True)
class Schedule:
    """All batches of a collection.

    Attributes
    ----------
    num_tokens, num_padded_tokens
        Tokens of all rows, without and with padding.
    num_batches
        Forwards to run.
    flops
        Floating-point operations of all of them.
    """

    num_tokens: int
    num_padded_tokens: int
    num_batches: int
    flops: float


def schedule(num_tokens: Sequence[int], rows_chunk: int, tokens_per_batch: int, cost: ForwardCost) -> Schedule:
    """The batches that rows of `num_tokens` tokens (ascending) are cut into, and their cost."""

    @lru_cache(maxsize=64)  # without data, all row chunks are alike
    def shapes_of(lengths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        batches = make_batches(lengths, slice(0, len(lengths)), tokens_per_batch)
        return tuple((b.stop - b.start, lengths[b.stop - 1]) for b in batches)

    shapes = [
        shape
        for start in range(0, len(num_tokens), rows_chunk)
        for shape in shapes_of(tuple(num_tokens[start : start + rows_chunk]))
    ]
    return Schedule(sum(num_tokens), sum(b * t for b, t in shapes), len(shapes), cost.flops(shapes))


def run_seconds(plan: Schedule, layout: Layout, memory: RankMemory, tflops: float) -> tuple[float, float]:
    """(computing, bringing in offloaded weights): seconds if all ranks are busy all the time.

    Ranks share the operations evenly, whether they share rows or columns. Offloaded weights come in once for every
    batch of every rank. Communication between ranks is not counted.
    """
    compute = plan.flops / (layout.world_size * tflops * 1e12)
    in_memory = memory.streamed - memory.disk
    a_batch = in_memory / HOST_RATE + memory.disk / DISK_RATE
    return compute, a_batch * plan.num_batches / layout.num_row_workers
