"""`Site`: a submodule whose output is stored or scaled; and how a user names several."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = {"attention": ("attention",), "mlp": ("mlp",), "norm": ("norm",), "all": ("attention", "mlp")}


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


def matching(sites: Iterable[Site], wanted: str) -> set[str]:
    """Names of the sites that one kind (`mlp`, `attention`, `norm`, `all`) or name pattern chooses."""
    return {
        s.name for s in sites if (s.kind in KINDS[wanted] if wanted in KINDS else fnmatch.fnmatchcase(s.name, wanted))
    }
