"""Lay an intervention over a served model: while the model reads its checkpoint, find the sites; then map them.

Every name of the intervention is found among the checkpoint's tensors or the model's layers, or is an error. A
mixture's experts run in kernels that show no neurons, so their scales go into the down projections as these are read.
A stage of a pipeline reads all tensors, and lays maps on its own layers.

E experts, I neurons of one expert.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.gates import Gate
from aura_dist.interventions.methods import with_strength
from aura_dist.serving.maps import CALLED, SiteGate, SiteMap, attach, attach_residual
from aura_dist.serving.places import ELSEWHERE, Load, Place, generic, neurons_dim, plain_name, probe
from aura_dist.serving.strengths import Strengths
from aura_dist.sites.site import INPUT

_DOWN = re.compile(r"(?:(?P<expert>\d+)\.)?(?:down_proj|w2)(?:\.weight)?")


@dataclass(frozen=True)
class Ranks:
    """The ranks that share each layer, and what this rank knows of modules."""

    rank: int
    number: int
    reduce: Callable[[Tensor], Tensor]  # sums over the ranks
    whole_model: bool  # whether this rank has all layers
    partial: Callable[[nn.Module], bool]  # whether a module's outputs on the ranks are parts of a sum
    is_linear: Callable[[nn.Module], bool]
    takes_weights: Callable[[nn.Module], bool] = lambda module: False  # whether a kernel computes with its weights
    num_experts: int | None = None  # of the model, where this rank reads a share of them


@dataclass(frozen=True)
class _Site:
    """One site that changes; its map at strength 1."""

    name: str
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    gate: Gate | None

    @property
    def at_input(self) -> bool:
        return self.name.endswith(INPUT)

    @property
    def less(self) -> NDArray[np.float32]:
        """[D] ω − 1."""
        return (self.scale.astype(np.float64) - 1).astype(np.float32)

    @property
    def key(self) -> str:
        """The plain name of its module."""
        return plain_name(self.name.removesuffix(INPUT))


@dataclass(frozen=True)
class _Share:
    """The units of a site that a module has on this rank."""

    site: _Site
    here: NDArray[np.intp]  # their places among the module's units
    columns: NDArray[np.intp]  # their places among the site's units
    holders: NDArray[np.float32]  # [D] how many ranks have each of the site's units
    width: int  # of the module

    def spread(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """[width] values of the site's units here, and 0 for units of other sites."""
        whole = np.zeros(self.width, np.float32)
        whole[self.here] = values
        return whole


@dataclass
class Laying:
    """One model that is loaded; `done` once its maps are laid."""

    model: nn.Module
    intervention: Intervention
    strengths: Strengths
    ranks: Ranks
    done: bool = field(default=False, init=False)
    _sites: dict[str, list[_Site]] = field(init=False)  # plain name of the module → its sites
    _seen: set[str] = field(default_factory=set, init=False)  # plain names of tensors, without `.weight`
    _folded: set[str] = field(default_factory=set, init=False)
    _experts: dict[str, dict[int, int]] = field(init=False)  # site → expert that was read → its neurons
    _dims: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict, init=False)  # of experts' neurons
    _places: dict[tuple[str, tuple[int, ...]], Place] = field(default_factory=dict, init=False)
    _found: dict[str, Place | None] = field(default_factory=dict, init=False)  # plain name of a module → its place
    _maps: list[str] = field(default_factory=list, init=False)
    _with_weights: dict[str, bool] = field(default_factory=dict, init=False)  # plain name → whether it has parameters

    def __post_init__(self) -> None:
        self._sites, self._experts = defaultdict(list), defaultdict(dict)
        if self.strengths.default > 0 or self.strengths.of_requests:
            for site in _changing(self.intervention):
                self._sites[site.key].append(site)
        for name, module in self.model.named_modules():
            here = next(module.parameters(), None) is not None
            self._with_weights[plain_name(name)] = here or self._with_weights.get(plain_name(name), False)

    def watched(self, weights: Iterable[tuple[str, Tensor]], load: Load) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors as the model's loader gets them; `load` is that loader."""
        for name, tensor in weights:
            key = plain_name(name)
            module = key.removesuffix(".weight")
            self._seen.add(module)
            if module in self._sites and key != module:
                self._found[module] = self._place(module, load, name, tensor)
            yield name, self._with_experts(load, name, tensor)

    def _place(self, module: str, load: Load, name: str, tensor: Tensor) -> Place | None:
        """The place of a module's tensor, as of the same tensor of other layers; None if this rank has none of it."""
        known = (generic(module)[0], tuple(tensor.shape))
        if known not in self._places:
            place = probe(self.model, load, name, tensor)
            if place is None:  # says nothing of other layers: a later one may be of this stage
                return None
            self._places[known] = place
        return self._places[known]

    def _held(self, key: str) -> bool | None:
        """Whether this stage of a pipeline has the module of that plain name, or the layer that it should be in.

        The layers of other stages have no parameters here. None if the served model names them in another way.
        """
        if self.ranks.whole_model:
            return True
        parts = key.split(".")
        names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((self._with_weights[name] for name in names if name in self._with_weights), None)

    def _with_experts(self, load: Load, name: str, tensor: Tensor) -> Tensor:
        """A tensor of down projections with its neurons scaled; others as they are."""
        parent, _, last = plain_name(name).rpartition(".experts.")
        sites = self._of_mixture(parent)
        down = _DOWN.fullmatch(last)
        if not sites or down is None or self._held(sites[0].key) is False:
            return tensor
        (site,) = sites
        if site.gate is not None or site.shift.any():
            raise ModelError(
                f"{site.name!r}: expected a map of experts that only scales, because vLLM's kernels show no neurons of "
                "theirs; fit a method that only scales, without a gate, or leave the module out"
            )
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ModelError(
                f"{site.name!r}: expected float weights of experts, got {tensor.dtype}; leave the module out"
            )
        if down["expert"] is None:
            along = self._of_experts(site, load, name, tensor)
        else:
            along = self._of_expert(site, int(down["expert"]), tensor)
        self._folded.add(site.name)
        at_strength, _ = with_strength(along, None, self.strengths.default)
        return (tensor.float() * torch.from_numpy(at_strength).to(tensor.device)).to(tensor.dtype)

    def _of_mixture(self, parent: str) -> list[_Site] | None:
        """The sites of the experts in the mixture of that plain name, which may be of its layer's only one.

        Checkpoints of Mixtral call `block_sparse_moe` what transformers calls `mlp`.
        """
        exact = self._sites.get(f"{parent}.experts")
        layer = parent.rpartition(".")[0]
        others = [sites for key, sites in self._sites.items() if layer and _layer_of_mixture(key) == layer]
        return exact or (others[0] if len(others) == 1 else None)

    def _of_expert(self, site: _Site, expert: int, tensor: Tensor) -> NDArray[np.float32]:
        """[I] the scales of one expert, whose down projection has its neurons as columns, as a linear layer."""
        width = tensor.shape[-1]
        num_experts, left = divmod(len(site.scale), width)
        if tensor.ndim != 2 or left or expert >= num_experts or self.ranks.num_experts not in (None, num_experts):
            of = f" of {self.ranks.num_experts}" if self.ranks.num_experts else ""
            raise self._other_experts(site, f"expert {expert}{of} with weights of shape {tuple(tensor.shape)}")
        self._experts[site.name][expert] = width
        return site.scale[expert * width :][:width]

    def _of_experts(self, site: _Site, load: Load, name: str, tensor: Tensor) -> NDArray[np.float32]:
        """The scales of all experts, shaped to multiply [E, outputs, I] or [E, I, outputs]."""
        width, left = divmod(len(site.scale), tensor.shape[0])
        if tensor.ndim != 3 or left or width not in tensor.shape[1:]:
            raise self._other_experts(site, f"experts with weights of shape {tuple(tensor.shape)}")
        known = (generic(plain_name(name))[0], tuple(tensor.shape))
        if tensor.shape[1] != tensor.shape[2]:
            dim: int | None = 1 if tensor.shape[1] == width else 2
        else:
            dim = self._dims.get(known) or neurons_dim(self.model, load, name, tensor)
        if dim is None:
            raise ModelError(
                f"{site.name!r}: expected weights of experts whose neurons can be told from their outputs, got square "
                f"ones ({name!r} of shape {tuple(tensor.shape)}), and {type(self.model).__name__} does not show which "
                "dim it reads as neurons; leave the module out, or serve what `export` writes"
            )
        self._dims[known] = dim
        return site.scale.reshape(tensor.shape[0], *((1, -1) if dim == 2 else (-1, 1)))

    def _check_experts(self, site: _Site) -> None:
        """ModelError if fewer experts were read one by one than the site has; more are an error when they are read."""
        read = self._experts.get(site.name)
        if read and self.ranks.num_experts is None and sum(read.values()) != len(site.scale):
            raise self._other_experts(site, f"{len(read)} experts with {sum(read.values())} neurons")

    def _other_experts(self, site: _Site, found: str) -> ModelError:
        return ModelError(
            f"{site.name!r} of {len(site.scale)} units: expected as many neurons of experts in the served model "
            f"{type(self.model).__name__}, found {found}; fit for the model that is served, or leave the module out"
        )

    def lay(self) -> str:
        """Map all sites; returns what was done, in a few words. ModelError names a site that cannot be mapped."""
        modules: dict[tuple[str, bool], list[tuple[_Site, Place]]] = defaultdict(list)
        num_sites = 0
        for key, sites in sorted(self._sites.items()):
            for site in sites:
                if site.name in self._folded:
                    self._check_experts(site)
                    continue
                if key not in self._found:
                    num_sites += self._lay_layer(site)
                    continue
                place = self._found[key]
                if place is not None:
                    modules[place.module.replace("*", generic(key)[1] or "", 1), site.at_input].append((site, place))
                elif self._held(key):  # else it is another stage's, as far as this one can tell
                    raise self._missing(site)
        for (name, at_input), here in modules.items():
            num_sites += self._lay_module(name, here, at_input=at_input)
        self.done = True
        folded = f", and scaled the weights of {len(self._folded)} sites of experts" if self._folded else ""
        return f"laid maps of {num_sites} sites on {len(self._maps)} modules of this rank{folded}"

    def _missing(self, site: _Site) -> ModelError:
        return ModelError(
            f"{site.name!r} of {len(site.scale)} units: expected it in the served model {type(self.model).__name__}, "
            "found no module that has them; fit for the model that is served, leave the module out, or serve what "
            "`export` writes"
        )

    def _lay_layer(self, site: _Site) -> int:
        """Map the residual stream after a decoder layer; the number of layers that are here."""
        inside = f"{site.key}."
        if site.at_input or site.key in self._seen or not any(name.startswith(inside) for name in self._seen):
            raise self._missing(site)
        if self._held(site.key) is False:
            return 0
        layers = [(n, m) for n, m in self.model.named_modules() if plain_name(n) == site.key and n]
        if len(layers) != 1 or generic(site.key)[1] is None or not site.key.rpartition(".")[2].isdecimal():
            raise self._missing(site)
        name, layer = layers[0]
        weight = next(layer.parameters(), None)
        if weight is None:
            raise self._missing(site)
        everything = np.arange(len(site.scale))
        at_all = [(site, everything)]
        attach_residual(layer, self._site_map(name, at_all, len(everything), weight.device, partial=False))
        return 1

    def _lay_module(self, name: str, here: list[tuple[_Site, Place]], *, at_input: bool) -> int:
        """Map the sites of one side of one module; the number of sites, or 0 if another stage has the module."""
        try:
            module = self.model.get_submodule(name)
            device = next(module.parameters()).device
        except (AttributeError, StopIteration):
            if self._held(plain_name(name)):
                raise self._missing(here[0][0]) from None
            return 0
        if self.ranks.takes_weights(module):
            raise ModelError(
                f"{here[0][0].name!r}: expected a module that vLLM calls for every token, got one whose weights its "
                "attention takes; leave it out, or serve what `export` writes"
            )
        numbers = []
        for one, at in here:
            index = at.inputs if at_input else at.outputs
            if index is None or tuple(module.get_parameter("weight").shape) != at.shape:
                raise self._missing(one)
            if at_input and bool((at.outputs == ELSEWHERE).any()):
                raise ModelError(
                    f"{one.name!r}: expected an input that one linear layer reads, got one that vLLM reads for several "
                    f"at once ({name}); leave the module out, or serve what `export` writes"
                )
            numbers.append((one, index.numpy()))
        partial = not at_input and self.ranks.number > 1 and self.ranks.partial(module)
        site_map = self._site_map(name + INPUT * at_input, numbers, len(numbers[0][1]), device, partial=partial)
        first = not partial or self.ranks.rank == 0
        attach(module, site_map, at_input=at_input, adds_bias=self.ranks.is_linear(module) and first)
        return len(here)

    def _site_map(
        self,
        name: str,
        sites: list[tuple[_Site, NDArray[np.intp]]],
        width: int,
        device: torch.device,
        *,
        partial: bool,
    ) -> SiteMap:
        """The map of `width` units, of which each site has those whose numbers are not `ELSEWHERE`."""
        less, shift, gates = np.zeros(width, np.float32), np.zeros(width, np.float32), []
        for site, numbers in sites:
            share = self._share(site, numbers, device)
            here, own_shift = share.here, site.shift[share.columns] * (not partial or self.ranks.rank == 0)
            if site.gate is None:
                less[here], shift[here] = site.less[share.columns], own_shift
            else:
                gates.append(self._site_gate(share, site.gate, own_shift, device, partial=partial))
        constants, whole = _tensors({"less": less, "shift": shift}, device), self.ranks.reduce if partial else None
        made = SiteMap(name, constants["less"], constants["shift"], self.strengths.of_tokens, whole)
        made.gates.extend(gates)
        self._maps.append(name)
        return made

    def _site_gate(
        self, share: _Share, gate: Gate, shift: NDArray[np.float32], device: torch.device, *, partial: bool
    ) -> SiteGate:
        kind, own = gate.row, gate.restricted(share.columns).parts
        shared = self.ranks.number > 1 and (partial or bool((share.holders < self.ranks.number).any()))
        if kind.of_token and shared and not partial:  # several ranks may hold a unit, and a sum counts it once
            own = {n: values / share.holders[share.columns] if kind.parts[n] else values for n, values in own.items()}
        parts = {n: share.spread(values) if kind.parts[n] else values for n, values in own.items()}
        moved = {"less": share.spread(share.site.less[share.columns]), "shift": share.spread(shift)}
        add_up = _summing(self.ranks.reduce) if shared else _as_it_is
        return SiteGate(kind, _tensors(moved, device), _tensors(parts, device), add_up)

    def _share(self, site: _Site, numbers: NDArray[np.intp], device: torch.device) -> _Share:
        """A site's units in a module whose units have these `numbers`; ModelError if no rank has one of them."""
        here = np.flatnonzero(numbers != ELSEWHERE)
        columns = numbers[here]
        if (columns >= len(site.scale)).any():
            raise self._missing(site)
        share = _Share(site, here, columns, self._holders(columns, len(site.scale), device), len(numbers))
        if not share.holders.all():
            raise self._missing(site)
        return share

    def _holders(self, columns: NDArray[np.intp], width: int, device: torch.device) -> NDArray[np.float32]:
        """[width] how many ranks hold each column; all ranks ask alike."""
        mine = torch.zeros(width, dtype=torch.float32, device=device)  # vLLM has the model's dtype as default
        mine[torch.from_numpy(columns).to(device)] = 1
        whole = mine if self.ranks.number == 1 else self.ranks.reduce(mine[None])[0]
        held: NDArray[np.float32] = whole.cpu().numpy()
        return held

    @property
    def called(self) -> bool:
        """Whether a forward has called any map."""
        return bool(CALLED & set(self._maps))

    def check_called(self, *, checked_before: bool) -> None:
        """ModelError if a forward has left out a map, because nothing would be changed there.

        A compiled forward that comes from vLLM's cache calls none; then a start must have checked it before.
        """
        left = [name for name in self._maps if name not in CALLED]
        if left and not (checked_before and not self.called):
            raise ModelError(
                f"module {left[0]!r} was not called in the forward pass, so that nothing can be changed there: vLLM "
                "computes without it, or in a kernel that takes its weights; leave it out, or serve what `export` "
                "writes. If an earlier start was cut off while it compiled, remove vLLM's cache"
            )


def _changing(intervention: Intervention) -> Iterator[_Site]:
    """The sites whose maps change something."""
    for name in intervention.sites:
        scale, shift = intervention.map_of(name)
        if (scale != 1).any() or (shift is not None and shift.any()):
            yield _Site(name, scale, np.zeros_like(scale) if shift is None else shift, intervention.gate.get(name))


def _layer_of_mixture(key: str) -> str | None:
    """`layers.0` of `layers.0.mlp.experts`; None if these are no experts."""
    mixture, dot, last = key.rpartition(".")
    return mixture.rpartition(".")[0] if dot and last == "experts" else None


def _summing(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def add_up(sums_T: Tensor) -> Tensor:
        return reduce(sums_T[..., None])[..., 0]  # collectives expect two dims

    return add_up


def _as_it_is(sums_T: Tensor) -> Tensor:
    return sums_T


def _tensors(arrays: dict[str, NDArray[np.float32]], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=torch.float32, device=device) for name, values in arrays.items()}
