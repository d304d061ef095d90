"""`Site`: a place of a model whose values are stored or changed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One place with values [batch, token, width].

    Attributes
    ----------
    name
        Name in `AutoModelForCausalLM(…).named_modules()`.
    kind
        One of `kinds.KINDS`; empty for a quantised layer, which no finder knows.
    layer
        Index of its decoder layer.
    width
        Number of neurons: size of the values' last dim.
    """

    name: str
    kind: str
    layer: int
    width: int
