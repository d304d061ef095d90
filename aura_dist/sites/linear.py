"""Outputs of linear layers: the kinds `attention` and `mlp`.

Linear layers are `nn.Linear`, `Conv1D` and their subclasses, routers left out, because they return several outputs.
"""

from collections.abc import Iterator

from torch import nn
from transformers import Conv1D

from aura_dist.sites.tap import Fold, OutputTap, Vector, fold_output


class LinearTap(OutputTap):
    """The output of a linear layer; ω goes into the weight's rows (columns for `Conv1D`) and the bias."""

    fresh = True

    def fold(self, model: nn.Module, scale: Vector, shift: Vector | None) -> dict[str, Fold]:
        module = model.get_submodule(self.place)
        weight, dim = ((3, self.width), 1) if isinstance(module, Conv1D) else ((self.width, 3), 0)
        return fold_output(self, module, scale, shift, weight, 3, dim)


def find_attention(layer: nn.Module) -> dict[str, int]:
    """Linear layers within attention: see `attention_modules`."""
    return {name: width for name, width, inside in _linear_layers(layer) if inside}


def find_mlp(layer: nn.Module) -> dict[str, int]:
    """The other linear layers."""
    return {name: width for name, width, inside in _linear_layers(layer) if not inside}


def _linear_layers(layer: nn.Module) -> Iterator[tuple[str, int, bool]]:
    """(name, width, whether within attention)."""
    attention = attention_modules(layer)
    for name, module in layer.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and "Router" not in type(module).__name__:
            width = module.out_features if isinstance(module, nn.Linear) else int(module.nf)
            yield name, width, name.rpartition(".")[0] in attention


def attention_modules(layer: nn.Module) -> set[str]:
    """Names of attention and all that is in it.

    Attention is a submodule whose class name contains "Attention", or whose own name contains "attn" (linear
    attention).
    """
    found: set[str] = set()
    for name, module in layer.named_modules():
        if name.rpartition(".")[0] in found or _is_attention(name, module):
            found.add(name)
    return found


def _is_attention(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    if not name or kind.endswith("DecoderLayer"):  # a whole layer: JambaAttentionDecoderLayer
        return False
    return "Attention" in kind or ("attn" in name.rpartition(".")[2] and any(True for _ in module.children()))
