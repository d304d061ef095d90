"""What a comparison comes to, in a sentence that its intervals bear out."""

from collections.abc import Sequence
from dataclasses import dataclass

from aura_dist.report.evaluations import Estimate, Evaluation
from aura_dist.report.tables import plain_of, reduction

AFFORDABLE = 1.1
_BOUND = f"at no more than {AFFORDABLE - 1:.0%} more perplexity"


@dataclass(frozen=True)
class _Candidate:
    """An evaluation with fewer toxic continuations; `fewer` is None where no ratio can be given."""

    one: Evaluation
    label: str
    toxic: float
    fewer: Estimate | None

    @property
    def is_sure(self) -> bool:
        """Whether the interval of the ratio, if there is one, lies above 1."""
        return self.fewer is None or self.fewer.low is None or self.fewer.low > 1


def headline(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> str | None:
    """The strongest reduction of toxicity that costs little perplexity, in a sentence; None without a comparison."""
    base = plain_of([e for e in evaluations if _toxic(e) is not None])
    before = None if base is None else _toxic(base)
    if base is None or before is None or not any(_toxic(e) is not None for e in evaluations if e is not base):
        return None
    cheap = [
        _Candidate(e, label, toxic, reduction(e, base))
        for e, label in zip(evaluations, labels, strict=True)
        if (toxic := _toxic(e)) is not None and toxic < before and _cost(e, base) <= AFFORDABLE
    ]
    sure = [c for c in cheap if c.is_sure]
    if not sure:
        chance = " by more than chance" if cheap else ""
        return f"no evaluation lowers the {before:.1%} of toxic continuations{chance} {_BOUND}"
    return _told(min(sure, key=lambda c: c.toxic), base, before)


def _told(best: _Candidate, base: Evaluation, before: float) -> str:
    ratio = f", {before / best.toxic:.1f} times fewer" if best.toxic > 0 else ""
    if ratio and best.fewer is not None and best.fewer.low is not None and best.fewer.high is not None:
        ratio += f" [{best.fewer.low:.1f}, {best.fewer.high:.1f}]".replace("inf", "∞")
    perplexity = bound = ""
    if base.perplexity and best.one.perplexity:
        perplexity = f"; perplexity {base.perplexity.value:.2f} → {best.one.perplexity.value:.2f}"
        bound = f" (the fewest {_BOUND})"
    return f"{best.label}: toxic continuations {before:.1%} → {best.toxic:.1%}{ratio}{perplexity}{bound}"


def _toxic(one: Evaluation) -> float | None:
    found = one.toxic("overall", "probability")
    return None if found is None else found.value


def _cost(one: Evaluation, base: Evaluation) -> float:
    """Perplexity as a multiple of that without intervention; 1 where it was not measured."""
    return one.perplexity.value / base.perplexity.value if one.perplexity and base.perplexity else 1.0
