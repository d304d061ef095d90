"""An intervention as changes of a checkpoint's tensors: which, how, and what makes it impossible.

A site's tap says how a map enters its module's parameters; here those become tensors of the checkpoint. A bias that
the model lacks is added where a setting of its configuration can turn it on.
"""

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.models.load import skeleton
from aura_dist.models.quantization import method_of
from aura_dist.models.weights import FLOATS, Stored
from aura_dist.sites.find import find_sites, tap_of
from aura_dist.sites.kinds import KINDS
from aura_dist.sites.site import INPUT
from aura_dist.sites.tap import HOOKS_ONLY, Fold, Product, Vector
from aura_dist.sites.transformers_adapter import STACKED, loaded_names, tied_to

# settings of transformers' language models that turn biases of linear layers on, and the value that does
SWITCHES: dict[str, bool] = {
    "bias": True, "use_bias": True, "no_bias": False, "enable_bias": True, "attention_bias": True, "mlp_bias": True,
    "qkv_bias": True, "use_qkv_bias": True, "attention_out_bias": True, "proj_bias": True, "add_bias_linear": True,
}  # fmt: skip


@dataclass(frozen=True)
class FoldPlan:
    """All changes of a checkpoint."""

    folds: Mapping[str, tuple[Fold, ...]]  # name of a tensor in the checkpoint → what becomes of it, in this order
    # name of a weight in the checkpoint → (name, values [D]) of the bias that it gets
    added: Mapping[str, tuple[str, NDArray[np.float32]]]
    # settings of the configuration's text part: those that turn these biases on, and what it says of the folding
    switches: Mapping[str, Any]
    sites: tuple[str, ...]  # names of the folded sites, without those that the intervention does not change


def plan_folds(
    config: PretrainedConfig,
    model: PreTrainedModel,
    intervention: Intervention,
    stored: Iterable[Stored],
    multiply: Callable[[Stored, Vector, int], Vector],
) -> FoldPlan:
    """How to fold an intervention, which fits `model`, into a checkpoint with these tensors.

    `model` may be on the meta device; the intervention is at the wanted strength. `multiply` returns the product of a
    tensor of the checkpoint with a vector along one of its dims.

    Raises
    ------
    ModelError
        A site cannot be folded, because its kind cannot, its map has a gate, the checkpoint is quantised, lacks the
        site's weight or holds it in another layout, the weight is tied to another module's, the module does not
        compute what its class says, or a shift finds no bias. The message names the site.
    """
    if method := method_of(config):
        raise ModelError(
            f"the checkpoint is quantised ({method}): a scale cannot be folded into its weights; {HOOKS_ONLY}, or fit "
            "one for the checkpoint of float weights, fold it into that, and quantise the result"
        )
    names = _Names(model, stored)
    folds, missing, folded = _changes(model, intervention, names)
    needed = [bias for bias, changes in missing.items() if any(fold.shift is not None for fold in changes)]
    switches, biases = _with_biases(config, model, needed)

    def multiplied(fold: Fold) -> Fold:
        if not isinstance(fold.shift, Product):
            return fold
        return replace(fold, shift=multiply(names.stored_as(fold.shift.weight), fold.shift.vector, fold.shift.dim))

    added = {}
    for bias, width in biases.items():
        weight = names.stored_as(f"{bias.removesuffix('.bias')}.weight").name
        values = torch.zeros(width)
        for fold in missing.get(bias, []):
            values = changed(values, multiplied(fold))
        added[weight] = (names.of_new(bias, weight), values.float().numpy())
    made = {tensor: tuple(map(multiplied, changes)) for tensor, changes in folds.items()}
    return FoldPlan(made, added, switches, tuple(name for name in intervention.sites if name in folded))


_Changes = dict[str, list[Fold]]  # name of a parameter, or of a tensor in the checkpoint → what becomes of it


def _changes(
    model: PreTrainedModel, intervention: Intervention, names: "_Names"
) -> tuple[_Changes, _Changes, set[str]]:
    """Changes of the checkpoint's tensors, and of parameters that the model lacks; the sites that they fold."""
    sites = {s.name: s for s in find_sites(model).sites}
    folds: _Changes = defaultdict(list)
    missing: _Changes = defaultdict(list)
    folded = set()
    # a module's input is changed before its output
    for name in sorted(intervention.sites, key=lambda name: not name.endswith(INPUT)):
        scale, shift = intervention.map_of(name)
        shift = shift if shift is not None and shift.any() else None
        if shift is None and (scale == 1).all():
            continue
        if name in intervention.gate:
            raise ModelError(
                f"{name!r}: a map with a gate of {intervention.gate[name].kind} cannot be folded into weights, because "
                f"it acts at some tokens alone; {HOOKS_ONLY}, or in vLLM by the plugin (AURA_INTERVENTION)"
            )
        folded.add(name)
        site = sites[name]
        if not KINDS[site.kind].folds:
            raise ModelError(f"{name!r}: a map of a {site.kind} site cannot be folded into weights; {HOOKS_ONLY}")
        for parameter, fold in tap_of(model, site).fold(model, scale, shift).items():
            if not names.in_model(parameter):
                missing[parameter].append(fold)
                continue
            _check_not_tied(model, name, parameter)
            for tensor, part in names.parts(parameter, fold):
                folds[tensor].append(part)
    return folds, missing, folded


def changed(values: Tensor, fold: Fold, part: slice = slice(None)) -> Tensor:
    """Float64 values of a vector, of which `values` are `part`, after a fold."""
    scale, wide = torch.from_numpy(fold.scale[part]).double(), values.double()
    # (c + w) ω − c, written so that ω = 1 returns w exactly
    scaled = wide * scale + fold.offset * (scale - 1)
    assert not isinstance(fold.shift, Product), "a plan has multiplied it"
    return scaled if fold.shift is None else scaled + torch.from_numpy(fold.shift[part]).double()


class _Names:
    """Names in the model → tensors in the checkpoint, as transformers maps them when it loads."""

    def __init__(self, model: PreTrainedModel, stored: Iterable[Stored]) -> None:
        self._shapes = _shapes(model)
        self._loaded = loaded_names(model)
        self._found: dict[str, list[tuple[Stored, str]]] = {}
        for tensor in stored:
            name, how = self._loaded(tensor.name)
            self._found.setdefault(name, []).append((tensor, how))

    def in_model(self, name: str) -> bool:
        return name in self._shapes

    def stored_as(self, name: str) -> Stored:
        """The tensor of the checkpoint that becomes parameter `name`; ModelError if there is not exactly one."""
        found = self._found.get(name, [])
        if len(found) != 1:
            raise ModelError(
                f"expected one tensor of the checkpoint for {name!r}, found {len(found)}: it can neither be folded nor "
                f"take a bias; fit a method that only scales, or {HOOKS_ONLY}"
            )
        tensor, how = found[0]
        if how:
            raise ModelError(
                f"the checkpoint holds {name!r} in another layout, as {tensor.name!r}: it cannot be folded; "
                "save the model with this version of transformers, or " + HOOKS_ONLY
            )
        return _checked(tensor, self._shapes[name])

    def parts(self, name: str, fold: Fold) -> Iterator[tuple[str, Fold]]:
        """The tensors of the checkpoint that become parameter `name` → what becomes of each; ModelError as above."""
        found = self._found.get(name, [])
        if fold.scale.ndim == 1 or not all(how == STACKED for _, how in found):
            yield self.stored_as(name).name, _flat(fold, self._shapes[name])
            return
        expected = self._shapes[name]
        if len(found) != expected[0]:
            raise ModelError(f"expected {expected[0]} tensors of the checkpoint for {name!r}, found {len(found)}")
        in_order = sorted((tensor for tensor, _ in found), key=lambda t: [int(n) for n in re.findall(r"\d+", t.name)])
        for tensor, scale in zip(in_order, fold.scale, strict=True):
            yield _checked(tensor, expected[1:]).name, Fold(scale, None, fold.dim - 1)

    def of_new(self, bias: str, weight: str) -> str:
        """Name in the checkpoint of a bias that it lacks, from the name of the weight beside it."""
        name = weight.removesuffix("weight") + "bias"
        if not weight.endswith(".weight") or bias.rpartition(".")[0] not in self._loaded(weight)[0]:
            raise ModelError(f"the checkpoint holds the weight of {bias!r} as {weight!r}: a bias cannot be added to it")
        return name


def _checked(tensor: Stored, expected: tuple[int, ...]) -> Stored:
    if tensor.shape != expected:
        raise ModelError(f"tensor {tensor.name!r} of the checkpoint: expected shape {expected}, got {tensor.shape}")
    if tensor.dtype not in FLOATS:
        raise ModelError(
            f"tensor {tensor.name!r} of the checkpoint: expected one of {', '.join(FLOATS)}, got {tensor.dtype}: "
            f"a scale cannot be folded into it; {HOOKS_ONLY}"
        )
    return tensor


def _flat(fold: Fold, shape: tuple[int, ...]) -> Fold:
    """A fold of a tensor of three dims as one of the matrix of its last dim; other folds as they are."""
    if fold.scale.ndim == 1:
        return fold
    if fold.dim == 1:
        return Fold(fold.scale.reshape(-1))
    return Fold(np.broadcast_to(fold.scale[:, None], shape), dim=1)  # a view: each scale's rows share it


def _check_not_tied(model: PreTrainedModel, site: str, name: str) -> None:
    """ModelError if parameter `name` of `site` is another module's as well: folding would change that module too."""
    partners = tied_to(model, name)
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    if partners or shared[id(model.get_parameter(name))] > 1:
        other = partners[0] if partners else "another module's"
        raise ModelError(f"{name!r} is tied to {other}: folding {site!r} would change that as well; {HOOKS_ONLY}")


def _with_biases(
    config: PretrainedConfig, model: PreTrainedModel, biases: Sequence[str]
) -> tuple[dict[str, bool], dict[str, int]]:
    """The settings under which a model has all of `biases`, and name → width of every bias that they add.

    A setting counts if the model made with it differs in added biases alone, with a wanted one among them. `model` is
    as it is, maybe on the meta device, and lacks the parameters `biases`. ModelError if no setting adds one of them.
    """
    before = _shapes(model)
    switches: dict[str, bool] = {}
    added: dict[str, int] = {}
    for bias in biases:
        if bias in added:
            continue
        for name, on in SWITCHES.items():
            if getattr(config.get_text_config(decoder=True), name, on) == on:
                continue
            new = _added(before, _shapes(skeleton(_switched(config, {**switches, name: on}))))
            if new is not None and bias in new:
                switches[name], added = on, new
                break
        else:
            raise ModelError(
                f"{bias.removesuffix('.bias')!r} has no bias to take the shift, and {type(model).__name__} has no "
                "setting that gives it one; leave it out by `fit --modules`, fit a method that only scales, or "
                f"{HOOKS_ONLY}"
            )
    return switches, added


def _switched(config: PretrainedConfig, switches: Mapping[str, bool]) -> PretrainedConfig:
    """A copy of `config` with other settings in its text part."""
    changed = copy.deepcopy(config)
    changed.get_text_config(decoder=True).update(switches)
    return changed


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _added(before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
    """Name → width of the new parameters, if they are biases alone and all others are as before."""
    new = {name: shape for name, shape in after.items() if name not in before}
    same = all(after.get(name) == shape for name, shape in before.items())
    if not same or not all(name.endswith(".bias") and len(shape) == 1 for name, shape in new.items()):
        return None
    return {name: shape[0] for name, shape in new.items()}
