"""Operations and seconds of an evaluation before it is run: its forwards, one by one. Pure functions of shapes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from aura_dist.planning.work import ForwardCost

# bytes a second that one rank reads its weights at where a forward has too few tokens to keep it busy: three quarters
# of an A100's 2,039 GB/s (NVIDIA A100 80 GB data sheet); of a CPU, two cores of this kind of cloud machine
READ_RATE = {"cuda": 1.5e12, "cpu": 1e10}


@dataclass(frozen=True)
class Step:
    """One forward of `rows` rows of `num_new` tokens each, behind `num_seen` that are cached, `num_logits` in all."""

    rows: int
    num_new: int
    num_seen: int
    num_logits: int


@dataclass(frozen=True)
class LanguageModelCost:
    """Cost of a causal language model's forwards.

    Attributes
    ----------
    base
        Of the model without its head.
    logit_flops
        Of the head, for one position.
    read_bytes
        Weights that a forward reads whole: those of the layers and the head.
    """

    base: ForwardCost
    logit_flops: float
    read_bytes: int

    def flops(self, step: Step) -> float:
        """A multiplication and an addition count as two; attention to all that was seen, masked or not."""
        a_row = step.num_new * (self.base.token_flops + self.base.square_flops * (step.num_seen + step.num_new))
        return step.rows * a_row + step.num_logits * self.logit_flops

    def seconds(self, step: Step, tflops: float, read_rate: float) -> float:
        """Of one rank: computing or reading the weights, whichever takes longer (Williams et al., *Roofline*, 2009)."""
        return max(self.flops(step) / (tflops * 1e12), self.read_bytes / read_rate)


def continuing(batches: Iterable[tuple[int, int, int]], num_tokens: int) -> Iterator[Step]:
    """The forwards of continuations of `num_tokens` tokens, none of which stops early.

    `batches` are (prompts, continuations, tokens of each prompt): a prompt runs once, its continuations a token at a
    time, but for the last one, which nothing follows.
    """
    for prompts, rows, length in batches:
        yield Step(prompts, length, 0, prompts)
        for made in range(num_tokens - 1):
            yield Step(rows, 1, length + made, rows)


def reading(shapes: Sequence[tuple[int, int]]) -> Iterator[Step]:
    """The forwards of texts whose perplexity is measured, of these shapes [rows, tokens]."""
    for rows, length in shapes:
        yield Step(rows, length, 0, rows * length)
