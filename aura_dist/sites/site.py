"""`Site`: a place of a model whose values are stored or changed."""

from dataclasses import dataclass

INPUT = ":input"  # after a module's name: the site is what goes into the module, not what comes out


@dataclass(frozen=True)
class Site:
    """One place with values [batch, token, width]."""

    name: str  # in `AutoModelForCausalLM(…).named_modules()`; with `INPUT` at the end where it is a module's input
    kind: str  # one of `kinds.KINDS`; empty for a quantised layer, which no finder knows
    layer: int  # index of its decoder layer
    width: int  # number of neurons
