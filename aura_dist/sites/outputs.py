"""Outputs of modules: of linear layers, the kinds `attention` and `mlp`, and of norms, the kind `norm`.

Linear layers are `nn.Linear`, `Conv1D` and their subclasses, routers left out, because they return several outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Conv1D

from aura_dist.errors import ModelError
from aura_dist.sites.tap import HOOKS_ONLY, Fold, OutputTap, Tap, Vector


class LinearTap(OutputTap):
    """The output of a linear layer; ω goes into the weight's rows (columns for `Conv1D`) and the bias."""

    fresh = True

    def fold(self, model: nn.Module, scale: Vector, shift: Vector | None) -> dict[str, Fold]:
        module = model.get_submodule(self.place)
        weight, dim = ((3, self.width), 1) if isinstance(module, Conv1D) else ((self.width, 3), 0)
        return _fold(self, module, scale, shift, weight, 3, dim)


class NormTap(OutputTap):
    """The output of a norm; ω goes into its weight and bias."""

    def fold(self, model: nn.Module, scale: Vector, shift: Vector | None) -> dict[str, Fold]:
        return _fold(self, model.get_submodule(self.place), scale, shift, (self.width,), self.width)


def find_attention(layer: nn.Module) -> dict[str, int]:
    """Linear layers within attention."""
    return {one.name: one.num_outputs for one in linear_layers(layer) if one.attention is not None}


def find_mlp(layer: nn.Module) -> dict[str, int]:
    """The other linear layers."""
    return {one.name: one.num_outputs for one in linear_layers(layer) if one.attention is None}


def find_norms(layer: nn.Module) -> dict[str, int]:
    """Norms outside attention, because those inside normalise heads."""
    attention = _attention_modules(layer)
    found = {}
    for name, module in layer.named_modules():
        inside, weight = name.rpartition(".")[0] in attention, getattr(module, "weight", None)
        if not inside and _is_norm(module) and isinstance(weight, nn.Parameter) and weight.ndim == 1:
            found[name] = int(getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO 3 keeps the whole shape aside
    return found


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer."""

    name: str  # within the decoder layer
    num_inputs: int
    num_outputs: int
    attention: str | None  # name of the attention module that it is in

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


def linear_layers(layer: nn.Module) -> Iterator[Linear]:
    """All linear layers of a decoder layer, in the order in which it holds them."""
    attention = _attention_modules(layer)
    for name, module in layer.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and "Router" not in type(module).__name__:
            if isinstance(module, nn.Linear):
                widths = module.in_features, module.out_features
            else:
                widths = int(module.nx), int(module.nf)
            yield Linear(name, *widths, attention.get(name.rpartition(".")[0]))


def _is_norm(module: nn.Module) -> bool:
    kind = type(module).__name__
    return "Norm" in kind and "Router" not in kind and not isinstance(module, (nn.Linear, Conv1D))


def _attention_modules(layer: nn.Module) -> dict[str, str]:
    """Names of attention and all that is in it → name of the outermost attention module around.

    Attention is a submodule whose class name contains "Attention", or whose own name contains "attn" (linear
    attention).
    """
    found: dict[str, str] = {}
    for name, module in layer.named_modules():
        around = found.get(name.rpartition(".")[0])
        if around is not None or _is_attention(name, module):
            found[name] = name if around is None else around
    return found


def _is_attention(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    if not name or kind.endswith("DecoderLayer"):  # a whole layer: JambaAttentionDecoderLayer
        return False
    return "Attention" in kind or ("attn" in name.rpartition(".")[2] and any(True for _ in module.children()))


@torch.no_grad()
def _fold(
    tap: Tap, module: nn.Module, scale: Vector, shift: Vector | None, weight: tuple[int, ...], inputs: int, dim: int = 0
) -> dict[str, Fold]:
    """`Tap.fold` for a module y = f(x; weight, bias), each of whose outputs has its own part of both, along `dim`.

    A module may multiply by c + weight (Gemma's norms: c = 1); its weight then becomes (c + weight) ω − c. A run of
    the module on small random parameters, with a weight of shape `weight` and `inputs` inputs, finds c, and shows that
    ω y + s comes out, whatever the module's class is called. ModelError if it does for neither c = 0 nor c = 1.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) + 0.25

    has_bias = getattr(module, "bias", None) is not None
    drawn, x = draw(*weight), draw(2, inputs)
    omega, moved, bias = (draw(tap.width) for _ in range(3))
    along = omega[:, None] if len(weight) == 2 and dim == 0 else omega

    def run(weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {"weight": weight, "bias": bias} if has_bias else {"weight": weight}
        output = torch.func.functional_call(module, parameters, (x,))
        assert isinstance(output, Tensor)
        return output

    for offset in (0.0, 1.0):
        try:
            wanted = omega * run(drawn, bias) + (moved if has_bias else 0)
            folded = run((drawn + offset) * along - offset, bias * omega + moved)
        except Exception as error:  # a module that cannot be run alone raises its own errors
            raise ModelError(f"{tap.site!r} ({tap.owner}) cannot be checked: {error}; {HOOKS_ONLY}") from error
        if torch.allclose(wanted, folded, rtol=1e-4, atol=1e-5):
            return {f"{tap.place}.weight": Fold(scale, None, dim, offset), f"{tap.place}.bias": Fold(scale, shift)}
    raise ModelError(f"{tap.site!r} ({tap.owner}) is not linear in its weight; {HOOKS_ONLY}")
