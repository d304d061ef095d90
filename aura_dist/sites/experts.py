"""A mixture's experts: the kind `experts`, their neurons, and the kind `routing`, what the router sends where.

An experts site has E · I values, expert by expert: the input of each expert's down projection, after activation and
gate, without the router's weight. Values are 0 at tokens that the router did not send to the expert. Llama 4 multiplies
the experts' input by the router's weight, so its values contain it.

T tokens of a batch, K experts of a token, S routed rows, H hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from aura_dist.errors import ModelError
from aura_dist.sites.ownership import Interval, split_columns
from aura_dist.sites.routed import Routed
from aura_dist.sites.tap import HOOKS_ONLY, Callback, Change, Fold, Handle, Tap, Vector, generic
from aura_dist.sites.transformers_adapter import WHOLE_EXPERTS, ShownExperts, are_apart, has_experts_interface

# the routing sites of experts: whether a token was sent, and the router's weight, 0 where it was not
ROUTED, WEIGHT = "routed", "weight"


def find_experts(layer: nn.Module) -> dict[str, int]:
    """Modules that hold a mixture's experts."""
    return {name: num_experts * width for name, num_experts, width in _experts(layer)}


def find_routing(layer: nn.Module) -> dict[str, int]:
    """Two sites of each such module, with one value for each expert."""
    return {f"{name}:{what}": num_experts for name, num_experts, _ in _experts(layer) for what in (ROUTED, WEIGHT)}


def _experts(layer: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(name, number of experts, neurons of one)."""
    for name, module in layer.named_modules():
        if has_experts_interface(module) or _is_llama4(module):
            num_experts, *matrix = _shape(module)
            yield name, num_experts, matrix[0 if _is_transposed(module) else 1]


def _shape(module: Any) -> tuple[int, ...]:
    """Shape of the down projections, whatever a rank holds of them."""
    return tuple(getattr(module.down_proj, "ds_shape", module.down_proj.shape))


def _is_transposed(module: Any) -> bool:
    """Whether the down projections are [E, I, H], not [E, H, I]."""
    return _is_llama4(module) or bool(module.is_transposed)


def _is_llama4(module: nn.Module) -> bool:
    return any(kind.__name__ == "Llama4TextExperts" for kind in type(module).__mro__)


@dataclass(frozen=True)
class ExpertsTap(Tap):
    """The neurons of a mixture's experts; ω goes into the columns of the down projections."""

    num_experts: int = 0
    apart: bool = False  # whether each rank has whole experts

    @classmethod
    def of(cls, module: nn.Module, site: str, place: str, width: int) -> Self:
        return cls(site, place, width, type(module).__name__, _shape(module)[0], are_apart(module))

    def attach(self, model: nn.Module, callback: Callback) -> Handle:
        module = model.get_submodule(self.place)

        def see(routed: Routed) -> Tensor | None:
            changed: Tensor | None = callback(routed, False)
            return changed

        if _is_llama4(module):
            return _Llama4Experts(module, _router(model, self.place), see)
        return ShownExperts(module, see)

    def read(self, raw: object, num_seen: int, shape: tuple[int, int]) -> Routed:
        assert isinstance(raw, Routed)
        self._check(raw, num_seen)
        if raw.num_tokens != shape[0] * shape[1]:
            raise ModelError(f"module {self.site!r}: expected {shape[0] * shape[1]} tokens, got {raw.num_tokens}")
        return raw

    def write(self, raw: object, num_seen: int, change: Change) -> Tensor:
        assert isinstance(raw, Routed)
        self._check(raw, num_seen)
        return raw.changed(change)

    def _check(self, routed: Routed, num_seen: int) -> None:
        if routed.width != num_seen:
            raise ModelError(f"module {self.site!r} ({self.owner}): expected {num_seen} neurons, got {routed.width}")

    def seen_columns(self, plan: Mapping[str, str], num_ranks: int) -> list[tuple[Interval, ...]] | None:
        place, each = generic(self.place), self.width // self.num_experts
        style, of_weight = plan.get(place, "replicate"), plan.get(f"{place}.down_proj", "replicate")
        if self.apart or style == WHOLE_EXPERTS:
            of_ranks = split_columns(self.num_experts, num_ranks)
            return [tuple((first * each, last * each) for first, last in of_rank) for of_rank in of_ranks]
        if of_weight == "replicate":
            return [((0, self.width),)] * num_ranks
        if style != "moe_tp_experts" or each % num_ranks:
            return None
        return split_columns(self.width, num_ranks, self.num_experts)  # a part of each expert

    def fold(self, model: nn.Module, scale: Vector, shift: Vector | None) -> dict[str, Fold]:
        if shift is not None:
            raise ModelError(
                f"{self.site!r} ({self.owner}): a shift of experts cannot be folded, because each needs a bias of its "
                f"own; fit a method that only scales, or {HOOKS_ONLY}"
            )
        dim = 1 if _is_transposed(model.get_submodule(self.place)) else 2
        return {f"{self.place}.down_proj": Fold(scale.reshape(self.num_experts, -1), dim=dim)}


@dataclass(frozen=True)
class RoutingTap(Tap):
    """What a router sends to each expert: the name's end says whether it is tokens, 1 or 0, or weights."""

    def attach(self, model: nn.Module, callback: Callback) -> Handle:
        module = model.get_submodule(self.place)
        if _is_llama4(module):

            def after(router: Any, args: object, output: Any) -> None:
                weight_TK, expert_TK = output[0].topk(router.top_k, dim=-1)
                callback((expert_TK, weight_TK), False)

            return _router(model, self.place).register_forward_hook(after)

        def before(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            callback((*args, *kwargs.values())[1:3], False)

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def read(self, raw: object, num_seen: int, shape: tuple[int, int]) -> Tensor:
        assert isinstance(raw, tuple)
        expert_TK, weight_TK = raw
        if expert_TK.shape[0] != shape[0] * shape[1]:
            raise ModelError(f"{self.site!r}: expected {shape[0] * shape[1]} tokens, got {expert_TK.shape[0]}")
        values_TK = torch.ones_like(weight_TK) if self.site.endswith(f":{ROUTED}") else weight_TK
        acts_TE = values_TK.new_zeros((expert_TK.shape[0], self.width)).scatter_(1, expert_TK, values_TK)
        return acts_TE.view(*shape, self.width)

    def write(self, raw: object, num_seen: int, change: Change) -> Any:
        raise ModelError(f"{self.site!r}: expected a site that an intervention can change, got the router's choice")

    def seen_columns(self, plan: Mapping[str, str], num_ranks: int) -> list[tuple[Interval, ...]] | None:
        return [((0, self.width),)] * num_ranks  # every rank routes all tokens


def _router(model: nn.Module, experts: str) -> nn.Module:
    return model.get_submodule(f"{experts.rpartition('.')[0]}.router")


class _Llama4Experts:
    """`ShownExperts` for Llama 4, whose experts run all tokens in two batched products; those not routed are 0."""

    def __init__(self, experts: Any, router: Any, see: Callable[[Routed], Tensor | None]) -> None:
        self._experts, self._router, self._see = experts, router, see
        self._expert_S = self._token_S = torch.empty(0)
        self._mode = _BeforeDown(experts, self._rows)
        # the one that comes last is entered first, so that it sees what the others made
        self._handles: list[RemovableHandle] = [
            router.register_forward_hook(self._route),
            experts.register_forward_pre_hook(self._enter, prepend=True),
            experts.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _route(self, router: nn.Module, args: object, output: Any) -> None:
        expert_TK = output[0].topk(self._router.top_k, dim=-1).indices
        self._expert_S = expert_TK.reshape(-1)
        token_T = torch.arange(len(expert_TK), device=expert_TK.device)
        self._token_S = token_T.repeat_interleave(expert_TK.shape[1], output_size=expert_TK.numel())

    def _enter(self, module: nn.Module, args: object) -> None:
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _rows(self, acts_ETI: Tensor) -> Tensor:
        place = self._expert_S, self._token_S
        routed = Routed(acts_ETI[place], self._token_S, self._expert_S, len(acts_ETI), acts_ETI.shape[1])
        changed = self._see(routed)
        return acts_ETI if changed is None else acts_ETI.index_put(place, changed)


class _BeforeDown(TorchFunctionMode):
    """Passes the first argument of the batched product with the down projections through `change`."""

    def __init__(self, experts: Any, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._experts, self._change = experts, change

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.bmm and args[1] is self._experts.down_proj:
            args = (self._change(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))
