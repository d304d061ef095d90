"""`Site`: a submodule whose output is stored or scaled."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One submodule with output [batch, token, width].

    Attributes
    ----------
    name
        Name in `AutoModelForCausalLM(…).named_modules()`.
    kind
        `attention`, `mlp` or `norm`.
    layer
        Index of the decoder layer it stands in.
    width
        Number of neurons (size of the output's last dim).
    """

    name: str
    kind: str
    layer: int
    width: int
