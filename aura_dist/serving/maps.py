"""Maps on the modules of a served model: z ← z + s g ((ω − 1) ⊙ z + b), in float32, rounded once.

A module gets a subclass of its own class, whose forward maps what goes in or comes out. So `torch.compile` traces the
map with the module, and CUDA graphs record it. Vectors are buffers, as weights are. The strength s is one, or one
of each token.

T tokens, D units of the module on this rank.
"""

from collections.abc import Callable
from functools import cache
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from aura_dist.errors import ModelError
from aura_dist.interventions.gates import GateKind
from aura_dist.serving.strengths import along

CALLED: set[str] = set()  # names of the maps that a forward, or the trace of one, has called

_IN, _OUT = "aura_dist_in", "aura_dist_out"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _note(name: str) -> bool:
    """Runs in every forward that is not compiled, and once where one is traced."""
    CALLED.add(name)
    return True


class SiteGate(nn.Module):
    """The gate of one of the sites of a module, and the map that it holds back: zeros for units of other sites."""

    less: Tensor
    shift: Tensor

    def __init__(
        self, kind: GateKind, moved: dict[str, Tensor], parts: dict[str, Tensor], add_up: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.of_token = kind.of_token
        for name, values in (moved | parts).items():
            self.register_buffer(name, values, persistent=False)
        self._names = tuple(parts)
        self._logits: Callable[..., Tensor] = resolve_name(kind.in_torch)
        self._add_up = add_up  # sums of this rank's units → sums of all units of the site

    def forward(self, z_TD: Tensor, seen_TD: Tensor) -> Tensor:
        """What is added to z; `seen_TD` are the values that the gate sees, where z is one rank's part of a sum."""
        parts = {name: self.get_buffer(name) for name in self._names}
        logits = self._logits(parts, seen_TD, _along_units, self._add_up)
        moved: Tensor = torch.sigmoid(logits) * (z_TD * self.less + self.shift)
        return moved


def _along_units(vector_D: Tensor) -> Tensor:
    """The units of served values are their last dim."""
    return vector_D


class SiteMap(nn.Module):
    """The maps of all sites of one side of a module."""

    less: Tensor
    shift: Tensor | None
    strength: Tensor

    def __init__(
        self, name: str, less: Tensor, shift: Tensor, strength: Tensor, whole: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("less", less, persistent=False)  # ω − 1
        self.register_buffer("shift", shift if bool(shift.any()) else None, persistent=False)
        self.register_buffer("strength", strength, persistent=False)
        self.gates = nn.ModuleList()
        self._whole = whole  # where values are one rank's part of a sum: sums them

    def forward(self, values: Tensor) -> Tensor:
        _note(self.name)
        if values.shape[-1] != self.less.shape[0]:
            raise ModelError(f"{self.name}: expected {self.less.shape[0]} units on this rank, got {values.shape[-1]}")
        z_TD = values.float()
        moved_TD = z_TD * self.less
        if self.shift is not None:
            moved_TD = moved_TD + self.shift
        seen_TD = z_TD
        if self._whole is not None and any(not gate.of_token for gate in self.gates):
            seen_TD = self._whole(z_TD.clone())  # on CPUs vLLM writes a sum into its argument
        for gate in self.gates:
            moved_TD = moved_TD + gate(z_TD, z_TD if gate.of_token else seen_TD)
        return (z_TD + along(self.strength, values) * moved_TD).to(values.dtype)


def attach(module: nn.Module, site_map: SiteMap, *, at_input: bool, adds_bias: bool) -> None:
    """Have `module` map its first argument, or its output, from now on.

    An output is a tensor, or a tuple whose first is one. `adds_bias` says whether what comes second is a bias that the
    caller adds, so that the site's values are the sum; else it is a residual stream, which a norm hands on.
    """
    if _OUT not in module._modules:
        kind: Any = type(module)
        module.__class__ = _mapped(kind, adds_bias)
    for name, here in ((_IN, at_input), (_OUT, not at_input)):
        if here or name not in module._modules:
            module.register_module(name, site_map if here else None)


def attach_residual(layer: nn.Module, site_map: SiteMap) -> None:
    """Have a decoder layer map the residual stream after it."""
    kind: Any = type(layer)
    if _OUT not in layer._modules:  # weights that are loaded again find it mapped
        layer.__class__ = _mapped_layer(kind)
    layer.register_module(_OUT, site_map)


@cache
def _mapped(kind: Any, adds_bias: bool) -> type[Any]:
    class Mapped(kind):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self.aura_dist_in is not None:
                if not args:
                    raise ModelError(f"{kind.__name__}: expected an input, got keywords alone")
                args = (self.aura_dist_in(args[0]), *args[1:])
            result = kind.forward(self, *args, **kwargs)
            if self.aura_dist_out is None:
                return result
            if not isinstance(result, tuple):
                return self.aura_dist_out(result)
            values, second, *more = result
            if adds_bias and second is not None:
                return (self.aura_dist_out(values + second) - second, second, *more)
            return (self.aura_dist_out(values), second, *more)

    return _named(Mapped, kind)


@cache
def _mapped_layer(kind: Any) -> type[Any]:
    class MappedLayer(kind):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            result = kind.forward(self, *args, **kwargs)
            if not isinstance(result, tuple):
                return self.aura_dist_out(result)
            values, residual, *more = result
            if residual is None:
                return (self.aura_dist_out(values), None, *more)
            # the next layer adds both, so the sum's place does not matter, and zeros keep it exact
            return (self.aura_dist_out(values + residual), torch.zeros_like(residual), *more)

    return _named(MappedLayer, kind)


def _named(made: type[Any], kind: type[Any]) -> type[Any]:
    """With the name of the class that it stands in for, because logs and a few checks go by it."""
    made.__name__, made.__qualname__, made.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return made
