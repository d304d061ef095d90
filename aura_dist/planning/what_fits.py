"""What fits where: every way to spread the weights over the ranks, and the largest batch that each allows."""

from collections.abc import Sequence
from dataclasses import dataclass

from aura_dist.planning.budget import RankMemory, rank_memory
from aura_dist.planning.work import Machine, Spread, Work
from aura_dist.ranks.layout import Layout

MAX_RANKS = 1024


@dataclass(frozen=True)
class Fit:
    """One way to spread the weights: what it takes, and the largest `tokens_per_batch` that fits (None: none does)."""

    spread: Spread
    memory: RankMemory
    tokens_per_batch: int | None


def fit(work: Work, spread: Spread, machine: Machine) -> Fit:
    """What `spread` takes with `work`'s batches, and the largest batch, up to `work`'s, that fits."""
    memory = rank_memory(work, spread, machine)
    return Fit(spread, memory, work.tokens_per_batch if memory.fits(machine) else _largest(work, spread, machine))


def _largest(work: Work, spread: Spread, machine: Machine) -> int | None:
    """By bisection: memory never falls as batches grow. A batch holds one text of the longest at least."""

    def fits(tokens: int) -> bool:
        return rank_memory(work.with_batch(tokens), spread, machine).fits(machine)

    low, high = min(work.longest, work.tokens_per_batch), work.tokens_per_batch
    if not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def survey(work: Work, world_size: int, machine: Machine, *, splits: bool) -> list[Fit]:
    """Every strategy over the ranks, the least spread first; with `splits`, tensor parallelism too.

    Numbers of ranks that hold a model together are the powers of two that divide `world_size`, and itself.
    """
    return [fit(work, spread, machine) for spread in spreads(world_size, gpu=machine.gpu, splits=splits)]


def spreads(world_size: int, *, gpu: bool, splits: bool) -> list[Spread]:
    """The ways of `survey`."""
    sizes = [k for k in range(2, world_size + 1) if world_size % k == 0 and (k & (k - 1) == 0 or k == world_size)]
    found = [Spread(Layout("replicate", world_size))]
    for k in sizes:
        found.append(Spread(Layout("fsdp", world_size, fsdp=k)))
        if splits:
            found.append(Spread(Layout("tensor", world_size, tensor=k)))
    found.append(Spread(Layout("zero3", world_size, fsdp=world_size)))
    if gpu:
        found.append(Spread(Layout("zero3", world_size, fsdp=world_size), "cpu"))
    if world_size == 1:
        found.append(Spread(Layout("dispatch")))
    return found


def advice(work: Work, wanted: Spread, machine: Machine, others: Sequence[Fit]) -> str:
    """What to ask for instead of `wanted`, which does not fit: the largest setting that does."""
    smaller = fit(work, wanted, machine).tokens_per_batch
    if smaller is not None:
        return f"the largest batch that fits is --tokens-per-batch {smaller}"
    whole = [f for f in others if f.tokens_per_batch == work.tokens_per_batch]
    cut = [f for f in others if f.tokens_per_batch is not None]
    if whole or cut:
        chosen = whole[0] if whole else cut[0]
        batch = "" if whole else f" --tokens-per-batch {chosen.tokens_per_batch}"
        return f"what fits is --sharding {chosen.spread.name}{batch}"
    ranks = ranks_needed(work, machine, wanted.layout.world_size)
    if ranks is not None:
        return f"what fits is --sharding fsdp={ranks} on {ranks} ranks"
    return "no number of ranks fits: the layers are too large for it; use a device with more memory"


def ranks_needed(work: Work, machine: Machine, above: int) -> int | None:
    """The fewest ranks, a power of two above `above`, over which `fsdp` fits; None if no number does."""
    ranks = 1
    while ranks <= MAX_RANKS:
        if ranks > above and fit(work, Spread(Layout("fsdp", ranks, fsdp=ranks)), machine).tokens_per_batch:
            return ranks
        ranks *= 2
    return None
