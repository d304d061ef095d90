"""`Tap`: how one site of a model is listened to, changed, split over ranks and folded into weights.

Capture, interventions, the memory trace and `export` know a site by its tap alone. Each family of sites has a subclass
in a module of its own.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aura_dist.errors import ModelError
from aura_dist.ranks.torch_adapter import num_forward_hooks
from aura_dist.sites.ownership import Interval, split_columns
from aura_dist.sites.routed import Routed

Vector = NDArray[np.float32]
Callback = Callable[[Any, bool], Any]
Change = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]

HOOKS_ONLY = "use it with hooks (`generate --intervention`, `evaluate --intervention`)"

# transformers' styles of tensor parallelism → equal blocks of a module's output that are each split; 0 = whole output
OUTPUT_BLOCKS = {
    "colwise": 1, "packed_colwise": 2, "colwise_gather_output": 0, "colwise_rep": 0, "rowwise": 0,
    "rowwise_split_input": 0, "rowwise_rep": 0, "packed_rowwise": 0, "replicate": 0,
    "replicated_with_grad_allreduce": 0, "mla_kv_a_proj": 0, "all_reduce": 0, "local_params": 0,
}  # fmt: skip


class Handle(Protocol):
    """Ends what made it."""

    def remove(self) -> None: ...


@dataclass(frozen=True)
class Product:
    """The product of a matrix parameter, as it is before any change, with a vector along its `dim`."""

    weight: str
    vector: Vector
    dim: int


@dataclass(frozen=True)
class Fold:
    """What becomes of a parameter t along its `dim`: (t + offset) ⊙ scale − offset + shift.

    A scale of two dims goes along a parameter's first dim, and along `dim`.
    """

    scale: Vector
    shift: Vector | Product | None = None
    dim: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class Tap(ABC):
    """One site of one model."""

    site: str  # its name in the causal language model
    place: str  # name of its module in the model at hand, which may be the base model
    width: int  # number of neurons, whatever a rank sees of them
    owner: str = ""  # class of the module, for errors

    @classmethod
    def of(cls, module: nn.Module, site: str, place: str, width: int) -> Self:
        """The tap of a site of `module`."""
        return cls(site, place, width, type(module).__name__)

    @abstractmethod
    def attach(self, model: nn.Module, callback: Callback) -> Handle:
        """Call `callback(raw, alone)` whenever a forward of `model` has values here.

        `raw` is what the model holds here, in its own form. `alone` says that nobody else can hold it, so that it may
        be changed in place. What the callback returns replaces `raw`, unless it is None.
        """

    @abstractmethod
    def read(self, raw: object, num_seen: int, shape: tuple[int, int]) -> Tensor | Routed:
        """acts_BTD, [*shape, num_seen], from what `attach` passes; ModelError if `raw` holds something else."""

    @abstractmethod
    def write(self, raw: object, num_seen: int, change: Change) -> Any:
        """`raw` with its values changed; ModelError if `raw` holds no float values of `num_seen` neurons.

        `change(values, along)` returns the new values; `along` shapes a [num_seen] vector so that it multiplies them.
        """

    @abstractmethod
    def seen_columns(self, plan: Mapping[str, str], num_ranks: int) -> list[tuple[Interval, ...]] | None:
        """Per rank, the columns that `attach` passes under a tensor-parallel plan; None if it splits otherwise."""

    def fold(self, model: nn.Module, scale: Vector, shift: Vector | None) -> dict[str, Fold]:
        """Parameter's name → what becomes of it, so that the site's values become scale ⊙ values + shift.

        A name that the model lacks is a bias of zeros, which it needs where there is a shift. Kinds whose `folds` is
        False are not asked. ModelError if the module does not compute what its class says.
        """
        raise NotImplementedError


class OutputTap(Tap):
    """The output of a module that is called once a forward."""

    fresh: ClassVar[bool] = False  # whether the module returns a new tensor and keeps no reference to it
    what: ClassVar[str] = "output"  # for errors

    def attach(self, model: nn.Module, callback: Callback) -> Handle:
        def hook(module: nn.Module, args: object, output: object) -> Any:
            alone = self.fresh and num_forward_hooks(module) == 1 and not torch.is_grad_enabled()
            return callback(output, alone)

        return model.get_submodule(self.place).register_forward_hook(hook)

    def read(self, raw: object, num_seen: int, shape: tuple[int, int]) -> Tensor:
        num_rows, num_tokens = shape
        # some models flatten batch and token for a while, or add a dim of heads
        same = (*shape, num_seen), (num_rows * num_tokens, num_seen), (num_rows, 1, num_tokens, num_seen)
        if isinstance(raw, Tensor) and raw.shape in same:
            return raw.reshape(*shape, num_seen)
        got = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
        raise ModelError(f"module {self.site!r}: expected an {self.what} of shape {(*shape, num_seen)}, got {got}")

    def write(self, raw: object, num_seen: int, change: Change) -> Any:
        if isinstance(raw, Tensor) and raw.is_floating_point() and raw.shape[-1] == num_seen:
            return change(raw, _as_it_is)
        got = f"{raw.dtype} of shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else type(raw).__name__
        raise ModelError(
            f"module {self.site!r} ({self.owner}): a hook needs a float {self.what} of {num_seen} neurons, got {got}; "
            "load the model in another quantisation, or leave the module out by `fit --modules`"
        )

    def seen_columns(self, plan: Mapping[str, str], num_ranks: int) -> list[tuple[Interval, ...]] | None:
        blocks = OUTPUT_BLOCKS.get(plan.get(generic(self.place), "replicate"))
        if not blocks:
            return None if blocks is None else [((0, self.width),)] * num_ranks
        return split_columns(self.width, num_ranks, blocks)


def _as_it_is(constants_D: Tensor) -> Tensor:
    return constants_D


def generic(name: str) -> str:
    """A module's name with `*` for the layer numbers, as in the plans of tensor parallelism."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


@contextmanager
def attached(model: nn.Module, callbacks: Iterable[tuple[Tap, Callback]]) -> Iterator[None]:
    """Within the context, each tap of `model` has its callback.

    Nothing that `torch.compile` made runs meanwhile, because it calls no hook that came later. What it makes meanwhile
    would keep the hook for good.
    """
    with torch.compiler.set_stance("force_eager"), ExitStack() as handles:
        for tap, callback in callbacks:
            handles.callback(tap.attach(model, callback).remove)
        yield
