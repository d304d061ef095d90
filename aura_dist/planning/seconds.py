"""Operations and seconds of collections and evaluations before they are run. Pure functions of shapes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from aura_dist.planning.budget import RankMemory
from aura_dist.planning.work import ForwardCost
from aura_dist.ranks.layout import Layout
from aura_dist.store.grid import make_batches

# (GPU, bytes of a value) → TFLOP/s that one rank sustains where none are given: about 40 % of an A100's 312 in 16 bits
# and two thirds of its 19.5 in float32 (NVIDIA A100 data sheet); of a CPU, two idle cores of an AMD EPYC (Zen 3)
TFLOPS = {(True, 2): 120.0, (True, 4): 12.0, (False, 4): 0.15, (False, 2): 0.15}
# GPU → bytes a second at which one rank reads its weights in a forward of few tokens: three quarters of an A100's
# 2,039 GB/s (NVIDIA A100 80 GB data sheet); of a CPU, two cores of a cloud machine with such an EPYC
READ_RATE = {True: 1.5e12, False: 1e10}
# bytes a second from the host's memory to a GPU (PCIe 4.0 × 16) and from a local NVMe disk
HOST_RATE = 20e9
DISK_RATE = 2e9


@dataclass(frozen=True)
class Schedule:
    """All batches of a collection: tokens of all rows, without and with padding, forwards, and their operations."""

    num_tokens: int
    num_padded_tokens: int
    num_batches: int
    flops: float


def schedule(num_tokens: Sequence[int], rows_chunk: int, tokens_per_batch: int, cost: ForwardCost) -> Schedule:
    """The batches of rows of `num_tokens` tokens (ascending), and their cost."""

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


@dataclass(frozen=True)
class Rates:
    """Bytes a second: from the host's memory to a GPU, and from the disk."""

    copy: float = HOST_RATE
    disk: float = DISK_RATE


USUAL_RATES = Rates()


def run_seconds(
    plan: Schedule, layout: Layout, memory: RankMemory, tflops: float, rates: Rates = USUAL_RATES
) -> tuple[float, float]:
    """(computing, reading offloaded weights): seconds if all ranks are busy all the time.

    Ranks share the operations evenly, whether they share rows or columns. Every rank reads its offloaded weights once a
    batch. Communication between ranks is not counted.
    """
    compute = plan.flops / (layout.world_size * tflops * 1e12)
    in_memory = memory.streamed - memory.disk
    a_batch = in_memory / rates.copy + memory.disk / rates.disk
    return compute, a_batch * plan.num_batches / layout.num_row_workers


@dataclass(frozen=True)
class Reading:
    """Weights of a model that runs layer by layer: how often each rank reads them, bytes and seconds of a rank."""

    num_waves: int
    num_bytes: int
    seconds: float


def reading(
    plan: Schedule, layout: Layout, memory: RankMemory, wave_tokens: int | None, rates: Rates = USUAL_RATES
) -> Reading:
    """What every rank reads from the checkpoint, all of it once a wave; it does so while it computes.

    Without `wave_tokens` a rank's share of the rows is one wave, because waves are as large as that in most runs.
    """
    share = ceil(plan.num_tokens / layout.num_row_workers)
    waves = ceil(share / wave_tokens) if wave_tokens else 1
    total = waves * memory.streamed
    return Reading(waves, total, total / min(rates.disk, rates.copy))


@dataclass(frozen=True)
class Step:
    """One forward: `rows` rows of `num_new` tokens, after `num_seen` cached ones; `num_logits` positions in all."""

    rows: int
    num_new: int
    num_seen: int
    num_logits: int


@dataclass(frozen=True)
class LanguageModelCost:
    """Cost of a causal language model's forwards."""

    base: ForwardCost  # of the model without its head
    logit_flops: float  # of the head, for one position
    read_bytes: int  # of the weights that a forward reads whole: the layers' and the head's

    def flops(self, step: Step) -> float:
        """A multiplication and an addition count as two; attention counts to all earlier tokens, masked or not."""
        a_row = step.num_new * (self.base.token_flops + self.base.square_flops * (step.num_seen + step.num_new))
        return step.rows * a_row + step.num_logits * self.logit_flops

    def seconds(self, step: Step, tflops: float, read_rate: float) -> float:
        """Of one rank: computing or reading the weights, whichever takes longer (Williams et al., *Roofline*, 2009)."""
        return max(self.flops(step) / (tflops * 1e12), self.read_bytes / read_rate)


def continuing(batches: Iterable[tuple[int, int, int]], num_tokens: int) -> Iterator[Step]:
    """The forwards of continuations of `num_tokens` tokens, none of which stops early.

    `batches` are (prompts, continuations, tokens of each prompt). A prompt runs once, its continuations a token at a
    time; the last token needs no forward.
    """
    for prompts, rows, length in batches:
        yield Step(prompts, length, 0, prompts)
        for made in range(num_tokens - 1):
            yield Step(rows, 1, length + made, rows)


@dataclass(frozen=True)
class EvaluationPlan:
    """Seconds of an evaluation on all ranks together, which are GPUs or not; its operations; what neither counts."""

    seconds: float
    flops: float
    gpu: bool
    left_out: str
