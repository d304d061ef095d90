"""Inputs of linear layers: the kinds `neurons` (into an MLP's last), `heads` (into attention's output projection) and
`inputs` (into all others).
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Conv1D

from aura_dist.errors import ModelError
from aura_dist.sites.outputs import Linear, linear_layers
from aura_dist.sites.ownership import Interval, split_columns
from aura_dist.sites.residual import hidden_width
from aura_dist.sites.site import INPUT
from aura_dist.sites.tap import HOOKS_ONLY, OUTPUT_BLOCKS, Callback, Fold, Handle, OutputTap, Product, Vector, generic

# last parts of names of attention's output projections, in transformers' models
_OUT = re.compile(r"(o|out|c|wo|dense|output)(_proj|_lin|_linear)?", re.IGNORECASE)


class InputTap(OutputTap):
    """What a linear layer is called with; ω goes into the weight's columns, and a shift, through them, into the bias.

    Other layers may read the same tensor. They see the old values, because only this layer's argument is replaced.
    """

    what: ClassVar[str] = "input"

    def attach(self, model: nn.Module, callback: Callback) -> Handle:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not args:
                raise ModelError(f"module {self.site!r} ({self.owner}): expected an input, got keywords alone")
            changed = callback(args[0], False)
            return None if changed is None else (changed, *args[1:])

        return model.get_submodule(self.place).register_forward_pre_hook(hook)

    def seen_columns(self, plan: Mapping[str, str], num_ranks: int) -> list[tuple[Interval, ...]] | None:
        style = plan.get(generic(self.place), "replicate")
        if style == "rowwise":  # the one style whose caller has a slice alone
            return split_columns(self.width, num_ranks)
        return [((0, self.width),)] * num_ranks if style in OUTPUT_BLOCKS else None

    def fold(self, model: nn.Module, scale: Vector, shift: Vector | None) -> dict[str, Fold]:
        module = model.get_submodule(self.place)
        dim = 0 if isinstance(module, Conv1D) else 1
        self._check(module, dim)
        weight = f"{self.place}.weight"
        folds = {weight: Fold(scale, None, dim)}
        if shift is not None:
            same = np.ones(model.get_parameter(weight).shape[1 - dim], np.float32)
            folds[f"{self.place}.bias"] = Fold(same, Product(weight, shift, dim))
        return folds

    @torch.no_grad()
    def _check(self, module: nn.Module, dim: int) -> None:
        """ModelError unless the module computes W x + b, whatever its class is called: random values show it."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator) + 0.25

        num_outputs = module.nf if isinstance(module, Conv1D) else 3  # a Conv1D shapes its output by itself
        row, (omega, moved), x = draw(1, self.width), draw(2, self.width), draw(2, self.width)
        bias = draw(num_outputs) if getattr(module, "bias", None) is not None else None

        def run(row: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
            weight = row.expand(num_outputs, self.width)
            parameters = {"weight": weight if dim else weight.T} | ({} if bias is None else {"bias": bias})
            output = torch.func.functional_call(module, parameters, (x,))
            assert isinstance(output, Tensor)
            return output

        try:
            wanted = run(row, bias, omega * x + (0 if bias is None else moved))
            folded = run(row * omega, None if bias is None else bias + row @ moved, x)
        except Exception as error:  # a module that cannot be run alone raises its own errors
            raise ModelError(f"{self.site!r} ({self.owner}) cannot be checked: {error}; {HOOKS_ONLY}") from error
        if not torch.allclose(wanted, folded, rtol=1e-4, atol=1e-5):
            raise ModelError(f"{self.site!r} ({self.owner}) is not linear in its input; {HOOKS_ONLY}")


def find_neurons(layer: nn.Module) -> dict[str, int]:
    """Inputs of the last linear layer of every MLP, shared experts included."""
    return _inputs(last for group in _mlps(layer).values() if (last := _last(group, hidden_width(layer))))


def find_heads(layer: nn.Module) -> dict[str, int]:
    """Inputs of the output projection of every attention, linear attention included."""
    groups: dict[str, list[Linear]] = {}
    for one in linear_layers(layer):
        if one.attention is not None:
            groups.setdefault(one.attention, []).append(one)
    return _inputs(last for group in groups.values() if (last := _output_projection(group, hidden_width(layer))))


def find_other_inputs(layer: nn.Module) -> dict[str, int]:
    """Inputs of the linear layers whose inputs are no neurons and no heads."""
    known = find_neurons(layer) | find_heads(layer)
    return {name: width for name, width in _inputs(linear_layers(layer)).items() if name not in known}


def _inputs(linears: Any) -> dict[str, int]:
    return {one.name + INPUT: one.num_inputs for one in linears}


def _mlps(layer: nn.Module) -> dict[str, list[Linear]]:
    """Linear layers outside attention by the module that holds them.

    A module with a convolution is a recurrent or state-space layer, which is no MLP.
    """
    groups: dict[str, list[Linear]] = {}
    for one in linear_layers(layer):
        holder = layer.get_submodule(one.parent)
        if one.attention is None and not any(isinstance(child, nn.Conv1d) for child in holder.children()):
            groups.setdefault(one.parent, []).append(one)
    return groups


def _last(group: list[Linear], hidden: int) -> Linear | None:
    """The linear layer that leads back to the hidden width, from where another leads (2 ×: gate and up in one)."""
    for one in reversed(group):
        widths = (one.num_inputs, 2 * one.num_inputs)
        into = [o for o in group if o is not one and o.num_inputs == hidden and o.num_outputs in widths]
        if one.num_outputs == hidden and into:
            return one
    return None


def _output_projection(group: list[Linear], hidden: int) -> Linear | None:
    """The one of attention's linear layers that leads back to the hidden width; by its name, or if no other does."""
    back = [one for one in group if one.num_outputs == hidden]
    named = [one for one in back if any(_OUT.fullmatch(part) for part in one.name.split(".")[-2:])]
    if named:
        return named[-1]
    # keys and values together may be as wide, as in JetMoE, whose output projection is no linear layer
    return back[0] if len(back) == 1 and back[0].name.rpartition(".")[2][0] not in "qkv" else None
