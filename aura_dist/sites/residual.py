"""What a decoder layer returns: the residual stream after it, the kind `residual`."""

from typing import Any

from torch import Tensor, nn

from aura_dist.sites.outputs import find_norms, linear_layers
from aura_dist.sites.tap import Change, OutputTap


class ResidualTap(OutputTap):
    """The hidden state that a decoder layer returns, alone or first in a tuple."""

    def read(self, raw: object, num_seen: int, shape: tuple[int, int]) -> Tensor:
        return super().read(raw[0] if isinstance(raw, tuple) and raw else raw, num_seen, shape)

    def write(self, raw: object, num_seen: int, change: Change) -> Any:
        if isinstance(raw, tuple) and raw:
            return (super().write(raw[0], num_seen, change), *raw[1:])
        return super().write(raw, num_seen, change)


def find_residual(layer: nn.Module) -> dict[str, int]:
    """The layer itself."""
    return {"": hidden_width(layer)}


def hidden_width(layer: nn.Module) -> int:
    """Width of the hidden state: of the layer's own norms, else of what its first linear layer reads.

    Where modules within the layer have the norms, the narrowest counts, because Zamba's attention reads two states.
    """
    norms = find_norms(layer)
    own = [width for name, width in norms.items() if "." not in name]
    return own[0] if own else min(norms.values(), default=None) or next(linear_layers(layer)).num_inputs
