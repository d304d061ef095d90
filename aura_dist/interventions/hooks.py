"""Apply an intervention to a model in memory through its taps, and remove it without a trace."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.callbacks import Watch, affine, gated
from aura_dist.interventions.folded import check_not_folded
from aura_dist.interventions.gates import Gate
from aura_dist.interventions.methods import with_strength
from aura_dist.models.layerwise import whole_forwards
from aura_dist.models.strategies.tensor_plan import seen_columns
from aura_dist.ranks.torch_adapter import without_compiled_parts
from aura_dist.sites.find import SiteTable, decoder_layers_name, find_sites, own_names, tap_of
from aura_dist.sites.kinds import KINDS
from aura_dist.sites.site import Site
from aura_dist.sites.tap import Callback, Tap, attached
from aura_dist.sites.transformers_adapter import tensor_group, tensor_place

logger = logging.getLogger(__name__)


@contextmanager
def intervene(
    model: PreTrainedModel, intervention: Intervention, strength: float = 1.0, *, watch: Watch | None = None
) -> Iterator[PreTrainedModel]:
    """Within the context, the values z of each site become scale ⊙ z + shift, or go as far towards it as a gate says.

    Values of bfloat16 and float16 models are changed in float32 and rounded once. Weights are not touched: leaving
    the context restores the model bit for bit, and `strength=0` changes nothing.

    What `torch.compile` made calls no hook that came later, so within the context nothing of it runs: neither a model
    that is compiled, wholly or in parts, nor the steps that `generate` compiles by itself for a static cache.

    Parameters
    ----------
    model
        A causal language model, or its base model; compiled or not.
    intervention
        Its names and widths must match the model's sites.
    strength
        s ≥ 0: ω_s = 1 + s (ω − 1), b_s = s b.
    watch
        Is told the name of each gated site that a forward passes, and its gate's values: [batch, token, 1] of a gate of
        tokens, [batch, token, D] of units.

    Raises
    ------
    ModelError
        The model lacks a site, or the site has another width, or its weights carry the intervention, because `export`
        folded it in. A forward raises it too, if it does not call a site, because nothing would be changed there. Of
        modules that a layer holds in a list, such as a mixture's experts, it need not call all.
    """
    with without_compiled_parts(model) as whole:
        if not isinstance(whole, PreTrainedModel):
            raise ModelError(
                f"expected a model of transformers, got {type(whole).__name__}, whose forwards may call no hook; give "
                "the model that was wrapped, traced or exported"
            )
        check_not_folded(whole.config, intervention)
        maps = _maps(whole, intervention, strength)
        check = _EveryForward(*_groups(whole, [one.tap for one in maps]))
    if not maps:
        yield model
        return
    callbacks = [(one.tap, one.callback(check.note, watch)) for one in maps]
    with without_compiled_parts(model), attached(whole, callbacks), ExitStack() as hooks:
        for part in whole_forwards(whole):
            hooks.callback(part.register_forward_pre_hook(check.begin).remove)
            hooks.callback(part.register_forward_hook(check.end).remove)
        yield model
    check.warn_of_uncalled()


@dataclass(frozen=True)
class _Map:
    """What changes a site: the scale, the shift and the gate of the columns that its tap passes."""

    tap: Tap
    scale: NDArray[np.float32]
    shift: NDArray[np.float32] | None
    gate: Gate | None
    group: Any  # of the ranks that see the site's other columns; None where each sees all

    def callback(self, note: Callable[[str], None], watch: Watch | None) -> Callback:
        if self.gate is None:
            return affine(self.tap, self.scale, self.shift, note)
        return gated(self.tap, self.scale, self.shift, self.gate, note, self._add_up, watch)

    def _add_up(self, sums: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        return sums


def _maps(model: PreTrainedModel, intervention: Intervention, strength: float) -> list[_Map]:
    """The maps of the sites that change."""
    maps = []
    for site, tap in _taps(model, intervention).items():
        scale, shift = with_strength(*intervention.map_of(site), strength)
        if (scale != 1).any() or (shift is not None and shift.any()):
            columns, is_split = _seen(model, tap)
            gate = intervention.gate.get(site)
            maps.append(
                _Map(
                    tap, scale[columns], None if shift is None else shift[columns],
                    None if gate is None else gate.restricted(columns), tensor_group(model) if is_split else None,
                )
            )  # fmt: skip
    return maps


def _groups(model: PreTrainedModel, taps: Sequence[Tap]) -> tuple[dict[str, str], frozenset[str]]:
    """Site → its group, and the groups of which every forward must call a site.

    Each site is a group. The sites that a layer holds in a list are one, because a router chooses experts from it. A
    forward need not call a list of which only some sites change, because it may choose the others.
    """
    groups, sizes = {}, {}
    depth = decoder_layers_name(model).count(".") + 2
    for tap in taps:
        parts = tap.place.split(".")
        at = next((i for i in range(depth, len(parts)) if parts[i].isdecimal()), None)
        if at is not None:
            parts[at], listed = "*", model.get_submodule(".".join(parts[:at]))
            sizes[".".join(parts)] = len(list(listed.children()))
        groups[tap.site] = tap.site if at is None else ".".join(parts)
    changed = Counter(groups.values())
    return groups, frozenset(g for g, number in changed.items() if number >= sizes.get(g, 1))


class _Called(threading.local):
    """Groups that the forward which a thread runs has called so far."""

    def __init__(self) -> None:
        self.groups: set[str] = set()


class _EveryForward:
    """Hooks of a whole model that check that each of its forwards calls a site of each group that it must call."""

    def __init__(self, groups: Mapping[str, str], needed: frozenset[str]) -> None:
        self._groups = groups
        self._needed = needed
        self._now = _Called()
        self._ever: set[str] = set()
        self._num_forwards = 0

    def note(self, site: str) -> None:
        """Note that `site` was called."""
        self._now.groups.add(self._groups[site])
        self._ever.add(site)

    def begin(self, module: nn.Module, args: Any) -> None:
        """A forward pre-hook."""
        self._now.groups.clear()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook; ModelError if the forward has left out what it must call."""
        self._num_forwards += 1
        if self._needed <= self._now.groups:
            return
        missing = min(self._needed - self._now.groups)
        raise ModelError(
            f"module {missing!r} was not called in the forward pass, so that no hook can change its output: the model "
            "does without it, or a compiled or recorded forward (torch.compile, CUDA graphs) runs in its place; use "
            "the model uncompiled, leave the module out by `fit --modules`, or fold the intervention with `export`"
        )

    def warn_of_uncalled(self) -> None:
        """Name an expert that no token was sent to, if there is one."""
        left = [site for site in self._groups if site not in self._ever]
        if left and self._num_forwards:
            logger.warning("%d modules, %s among them, were called in no forward: nothing changed", len(left), left[0])


def laid_over(
    model: PreTrainedModel, intervention: Intervention, strength: float
) -> AbstractContextManager[PreTrainedModel]:
    """`intervene` for a model that may have been cut after some layers: sites of the others are left out."""
    modules, own_name = {name for name, _ in model.named_modules()}, own_names(model)
    kept = [site for site in intervention.sites if own_name(site).partition(":")[0] in modules]
    return intervene(model, intervention.restricted(kept), strength)


def _seen(model: PreTrainedModel, tap: Tap) -> tuple[NDArray[np.intp], bool]:
    """The columns of a site that its tap passes on this rank, and whether other ranks see others of them."""
    rank, num_ranks = tensor_place(model)
    if num_ranks == 1:
        return np.arange(tap.width), False
    of_ranks = seen_columns(model.tp_plan, tap, num_ranks)
    columns = np.concatenate([np.arange(0), *(np.arange(start, stop) for start, stop in of_ranks[rank])])
    return columns, any(tuple(seen) != ((0, tap.width),) for seen in of_ranks)


def check_fits(
    table: SiteTable, intervention: Intervention, own_name: Callable[[str], str] = lambda name: name
) -> None:
    """ModelError unless every site of `intervention` is one of `table`'s, with the same width, and can be changed."""
    widths = {s.name: s.width for s in table.sites}
    kinds = {s.name: s.kind for s in table.sites}
    fixed = {name: kind for name, kind in kinds.items() if not KINDS[kind].acts}
    for site in intervention.sites:
        width = widths.get(own_name(site))
        if width is None:
            raise ModelError(f"the intervention does not fit {table.model_class}: it has no module {site!r}")
        if own_name(site) in fixed:
            raise ModelError(
                f"{site!r}: expected modules that an intervention can change, got one of kind {fixed[own_name(site)]}"
            )
        _check_width(intervention, site, width, table.model_class)
        gate, kind = intervention.gate.get(site), kinds[own_name(site)]
        if gate is not None and gate.row.of_token and not KINDS[kind].whole_tokens:
            raise ModelError(
                f"{site!r}: expected modules that hold all values of a token together with a gate of {gate.kind}, got "
                f"one of kind {kind}; leave it out by `fit --modules`, or fit another gate"
            )


def _taps(model: PreTrainedModel, intervention: Intervention) -> dict[str, Tap]:
    """Site → its tap in a model in memory; ModelError unless all fit.

    Quantised layers often are no `Linear`, so that no finder knows them. For them the name counts, and the width where
    the module says it; their output is checked when it comes.
    """
    table, own_name = find_sites(model), own_names(model)
    kinds = {s.name: s.kind for s in table.sites}
    others = [s for s in intervention.sites if own_name(s) not in kinds and _is_quantised(model, own_name(s))]
    check_fits(table, intervention.restricted(set(intervention.sites) - set(others)), own_name)
    for site in others:
        module = model.get_submodule(own_name(site))
        width = getattr(module, "out_features", getattr(module, "outfeatures", None))
        if isinstance(width, int):
            _check_width(intervention, site, width, table.model_class)
    return {
        site: tap_of(model, Site(site, kinds.get(own_name(site), ""), 0, len(intervention.map_of(site)[0])))
        for site in intervention.sites
    }


def _is_quantised(model: PreTrainedModel, name: str) -> bool:
    """Whether there is a module of this name without a float matrix, as quantised layers are."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return False
    floats = [p for p in module.parameters() if p.ndim == 2 and p.is_floating_point() and p.dtype.itemsize > 1]
    return not floats and not any(True for _ in module.children())


def _check_width(intervention: Intervention, site: str, width: int, model_class: str) -> None:
    for values in intervention.map_of(site):
        if values is not None and values.shape != (width,):
            raise ModelError(
                f"the intervention does not fit {model_class}: expected {width} neurons at {site!r}, "
                f"got {values.shape[0]}"
            )
