"""An intervention as changes of a checkpoint's tensors: which, how, and what makes it impossible.

A site's tap says how a map enters its module's parameters; here those become tensors of the checkpoint. A bias that
the model lacks is added where a setting of its configuration can turn it on.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedModel

from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.models.load import skeleton
from aura_dist.models.quantization import method_of
from aura_dist.models.weights import FLOATS, Stored
from aura_dist.sites.find import find_sites, tap_of
from aura_dist.sites.kinds import KINDS
from aura_dist.sites.tap import HOOKS_ONLY, Fold
from aura_dist.sites.transformers_adapter import loaded_names, tied_to

# settings of transformers' language models that turn biases of linear layers on, and the value that does
SWITCHES: dict[str, bool] = {
    "bias": True, "use_bias": True, "no_bias": False, "enable_bias": True, "attention_bias": True, "mlp_bias": True,
    "qkv_bias": True, "use_qkv_bias": True, "attention_out_bias": True, "proj_bias": True, "add_bias_linear": True,
}  # fmt: skip


@dataclass(frozen=True)
class FoldPlan:
    """All changes of a checkpoint."""

    folds: Mapping[str, Fold]  # name of a tensor in the checkpoint → what becomes of it
    # name of a weight in the checkpoint → (name, values [D]) of the bias that it gets
    added: Mapping[str, tuple[str, NDArray[np.float32]]]
    # settings of the configuration's text part: those that turn these biases on, and what it says of the folding
    switches: Mapping[str, Any]
    sites: tuple[str, ...]  # names of the folded sites, without those that the intervention does not change


def plan_folds(
    config: PretrainedConfig, model: PreTrainedModel, intervention: Intervention, stored: Iterable[Stored]
) -> FoldPlan:
    """How to fold an intervention, which fits `model`, into a checkpoint with these tensors.

    `model` may be on the meta device; the intervention is at the wanted strength.

    Raises
    ------
    ModelError
        A site cannot be folded, because its kind cannot, the checkpoint is quantised, lacks the site's weight or
        holds it in another layout, the weight is tied to another module's, the module does not compute what its
        class says, or a shift finds no bias. The message names the site.
    """
    if method := method_of(config):
        raise ModelError(
            f"the checkpoint is quantised ({method}): a scale cannot be folded into its weights; {HOOKS_ONLY}, or fit "
            "one for the checkpoint of float weights, fold it into that, and quantise the result"
        )
    names = _Names(model, stored)
    sites = {s.name: s for s in find_sites(model).sites}
    folds: dict[str, Fold] = {}
    folded: list[str] = []
    new_biases: dict[str, NDArray[np.float32]] = {}
    for name in intervention.sites:
        scale, shift = intervention.map_of(name)
        shift = shift if shift is not None and shift.any() else None
        if shift is None and (scale == 1).all():
            continue
        folded.append(name)
        site = sites[name]
        if not KINDS[site.kind].folds:
            raise ModelError(f"{name!r}: a map of a {site.kind} site cannot be folded into weights; {HOOKS_ONLY}")
        for parameter, fold in tap_of(model, site).fold(model, scale, shift).items():
            if not names.in_model(parameter):
                assert fold.shift is not None, "a bias is missed where there is a shift"
                new_biases[parameter] = fold.shift
                continue
            _check_not_tied(model, name, parameter)
            tensor = names.stored_as(parameter).name
            assert tensor not in folds, "no two sites share a parameter"
            folds[tensor] = fold
    switches, biases = _with_biases(config, model, list(new_biases))
    added = {}
    for bias, width in biases.items():
        weight = names.stored_as(f"{bias.removesuffix('.bias')}.weight").name
        added[weight] = (names.of_new(bias, weight), new_biases.get(bias, np.zeros(width, np.float32)))
    return FoldPlan(folds, added, switches, tuple(folded))


class _Names:
    """Names in the model → tensors in the checkpoint, as transformers maps them when it loads."""

    def __init__(self, model: PreTrainedModel, stored: Iterable[Stored]) -> None:
        self._shapes = _shapes(model)
        self._loaded = loaded_names(model)
        self._found: dict[str, list[tuple[Stored, bool]]] = {}
        for tensor in stored:
            name, converted = self._loaded(tensor.name)
            self._found.setdefault(name, []).append((tensor, converted))

    def in_model(self, name: str) -> bool:
        return name in self._shapes

    def stored_as(self, name: str) -> Stored:
        """The tensor of the checkpoint that becomes parameter `name`; ModelError if there is not exactly one."""
        found = self._found.get(name, [])
        if len(found) != 1:
            raise ModelError(f"expected one tensor of the checkpoint for {name!r}, found {len(found)}")
        tensor, converted = found[0]
        if converted:
            raise ModelError(
                f"the checkpoint holds {name!r} in another layout, as {tensor.name!r}: it cannot be folded; "
                "save the model with this version of transformers, or " + HOOKS_ONLY
            )
        expected = self._shapes[name]
        if tensor.shape != expected:
            raise ModelError(f"tensor {tensor.name!r} of the checkpoint: expected shape {expected}, got {tensor.shape}")
        if tensor.dtype not in FLOATS:
            raise ModelError(
                f"tensor {tensor.name!r} of the checkpoint: expected one of {', '.join(FLOATS)}, got {tensor.dtype}: "
                f"a scale cannot be folded into it; {HOOKS_ONLY}"
            )
        return tensor

    def of_new(self, bias: str, weight: str) -> str:
        """Name in the checkpoint of a bias that it lacks, from the name of the weight beside it."""
        name = weight.removesuffix("weight") + "bias"
        if not weight.endswith(".weight") or bias.rpartition(".")[0] not in self._loaded(weight)[0]:
            raise ModelError(f"the checkpoint holds the weight of {bias!r} as {weight!r}: a bias cannot be added to it")
        return name


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
