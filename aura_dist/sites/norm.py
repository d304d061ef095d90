"""Outputs of the decoder layers' norms: the kind `norm`."""

from torch import nn
from transformers import Conv1D

from aura_dist.sites.linear import attention_modules
from aura_dist.sites.tap import Fold, OutputTap, Vector, fold_output


class NormTap(OutputTap):
    """The output of a norm; ω goes into its weight and bias."""

    def fold(self, model: nn.Module, scale: Vector, shift: Vector | None) -> dict[str, Fold]:
        return fold_output(self, model.get_submodule(self.place), scale, shift, (self.width,), self.width)


def find_norms(layer: nn.Module) -> dict[str, int]:
    """Norms outside attention, because those inside normalise heads."""
    attention = attention_modules(layer)
    found = {}
    for name, module in layer.named_modules():
        inside, weight = name.rpartition(".")[0] in attention, getattr(module, "weight", None)
        if not inside and _is_norm(module) and isinstance(weight, nn.Parameter) and weight.ndim == 1:
            found[name] = int(getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO 3 keeps the whole shape aside
    return found


def _is_norm(module: nn.Module) -> bool:
    kind = type(module).__name__
    return "Norm" in kind and "Router" not in kind and not isinstance(module, (nn.Linear, Conv1D))
