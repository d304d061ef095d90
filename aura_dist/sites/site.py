"""`Site`: a place of a model whose values are stored or changed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One place with values [batch, token, width]."""

    name: str  # in `AutoModelForCausalLM(…).named_modules()`
    kind: str  # one of `kinds.KINDS`; empty for a quantised layer, which no finder knows
    layer: int  # index of its decoder layer
    width: int  # number of neurons
