"""Out of memory: one line that says what ran out and what would fit, in place of a library's report."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aura_dist.errors import AuraError, BudgetError, brief
from aura_dist.models.strategies.strategy import Spread
from aura_dist.planning.budget import advice, survey, what_fits
from aura_dist.planning.work import Machine, Work
from aura_dist.ranks.torch_adapter import is_out_of_memory

HOLDS = "expected room for the weights; use another --sharding, as `aura-dist plan` advises"


@contextmanager
def explained(doing: str, device: str, suggest: Callable[[], str]) -> Iterator[None]:
    """Within the context, what runs out of memory is a BudgetError; only then `suggest` says what to change."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        try:
            what = suggest()
        except AuraError as other:
            what = f"give smaller batches or another --sharding ({brief(other, 120)})"
        raise BudgetError(f"out of memory on {device} while {doing} ({brief(error, 160)}): {what}") from error


def smaller(flag: str, size: int) -> str:
    """Half of the setting that did not fit."""
    if size == 1:
        return f"expected room for {flag} 1; use another --sharding, or a device with more memory"
    return f"expected room for {flag} {size}; try {flag} {size // 2}"


def largest(work: Work, spread: Spread, machine: Machine, *, splits: bool) -> str:
    """What fits by the estimate that `plan` makes; half of what was tried, where that should have fitted."""
    expected = f"expected room for --tokens-per-batch {work.tokens_per_batch}"
    if what_fits(work, spread, machine).tokens_per_batch != work.tokens_per_batch:
        others = survey(work, spread.layout.world_size, machine, splits=splits)
        return f"{expected}; {advice(work, spread, machine, others)}"
    half = work.batch_tokens // 2  # a batch is a row chunk at most, whatever was asked
    if half < work.longest:
        return f"{expected}; give smaller --max-tokens, or another --sharding"
    return f"{expected}, which should fit by `plan`'s estimate; try --tokens-per-batch {half}"
