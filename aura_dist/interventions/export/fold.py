"""An intervention as changes of a checkpoint's tensors: which, how, and what makes it impossible.

A site computes y = f(w, b); folded it computes ω ⊙ y + s by weights of its own. For linear layers ω goes into
the rows of the weight (columns for Conv1D) and into the bias, for norms into weight and bias; where a norm
multiplies by c + w (Gemma: c = 1) the stored weight becomes (c + w) ω − c. A shift is added to the bias.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.export.checkpoint import FLOATS, Stored
from aura_dist.interventions.export.switches import with_biases

HOOKS_ONLY = "use it with hooks (`generate --intervention`, `evaluate --intervention`)"


@dataclass(frozen=True)
class Fold:
    """What becomes of a tensor t along `dim`: (t + offset) ⊙ scale − offset + shift."""

    scale: NDArray[np.float32]
    shift: NDArray[np.float32] | None = None
    dim: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class FoldPlan:
    """All that is done to a checkpoint.

    Attributes
    ----------
    folds
        Name of a tensor in the checkpoint → what becomes of it.
    added
        Name of a weight in the checkpoint → (name, values [D]) of the bias that it gets.
    switches
        Settings of the configuration's text part that say that these biases are there.
    sites
        Names of the sites that are folded; not those that the intervention leaves as they are.
    """

    folds: Mapping[str, Fold] = field(default_factory=dict)
    added: Mapping[str, tuple[str, NDArray[np.float32]]] = field(default_factory=dict)
    switches: Mapping[str, bool] = field(default_factory=dict)
    sites: tuple[str, ...] = ()


def plan_folds(
    config: PretrainedConfig, model: PreTrainedModel, intervention: Intervention, stored: Iterable[Stored]
) -> FoldPlan:
    """How to fold an intervention, which fits `model`, into a checkpoint with these tensors.

    Parameters
    ----------
    config, model
        Of the checkpoint; the model may be on the meta device.
    intervention
        At the strength that is meant.
    stored
        All tensors of the checkpoint.

    Raises
    ------
    ModelError
        A site cannot be folded: the checkpoint is quantised, lacks the site's weight or holds it in another
        layout, the weight is tied to another module's, the module does not compute what its class says, or a
        shift finds no bias. The message names the site.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"the checkpoint is quantised: a scale cannot be folded into its weights; {HOOKS_ONLY}")
    names = _Names(model, stored)
    folds: dict[str, Fold] = {}
    sites: list[str] = []
    without_bias: dict[str, NDArray[np.float32]] = {}
    for site in intervention.sites:
        scale, shift = intervention.map_of(site)
        shift = shift if shift is not None and shift.any() else None
        if shift is None and (scale == 1).all():
            continue
        sites.append(site)
        module = model.get_submodule(site)
        _check_not_tied(model, site)
        dim = 1 if isinstance(module, Conv1D) else 0
        folds[names.stored_as(f"{site}.weight").name] = Fold(scale, None, dim, _offset(site, module))
        if getattr(module, "bias", None) is not None:
            folds[names.stored_as(f"{site}.bias").name] = Fold(scale, shift)
        elif shift is not None:
            without_bias[site] = shift
    switches, biases = with_biases(config, model, list(without_bias))
    added = {}
    for bias, width in biases.items():
        site = bias.removesuffix(".bias")
        values = without_bias.get(site, np.zeros(width, np.float32))
        weight = names.stored_as(f"{site}.weight").name
        added[weight] = (names.of_new(bias, weight), values)
    return FoldPlan(folds, added, switches, tuple(sites))


class _Names:
    """Names in the model → tensors in the checkpoint, as transformers maps them when it loads."""

    def __init__(self, model: PreTrainedModel, stored: Iterable[Stored]) -> None:
        self._model = model
        self._state = dict(model.state_dict())
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._found: dict[str, list[tuple[Stored, bool]]] = {}
        for tensor in stored:
            name, converted = self._in_model(tensor.name)
            self._found.setdefault(name, []).append((tensor, converted))

    def _in_model(self, name: str) -> tuple[str, bool]:
        """Name in the model, and whether the tensor is joined with others or cut on the way there."""
        prefix = self._model.base_model_prefix
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if renamed not in self._state and name in self._state:
            renamed, pattern = rename_source_key(name, [], [], prefix, self._state)
        return renamed, pattern is not None

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
        expected = tuple(self._state[name].shape)
        if tensor.shape != expected:
            raise ModelError(f"tensor {tensor.name!r} of the checkpoint: expected shape {expected}, got {tensor.shape}")
        if tensor.dtype not in FLOATS:
            raise ModelError(
                f"tensor {tensor.name!r} of the checkpoint: expected one of {', '.join(FLOATS)}, got {tensor.dtype}: "
                f"a scale cannot be folded into it; {HOOKS_ONLY}"
            )
        return tensor

    def of_new(self, bias: str, weight: str) -> str:
        """What a bias that the checkpoint lacks is called there, given the name of the weight beside it."""
        name = weight.removesuffix("weight") + "bias"
        if not weight.endswith(".weight") or bias.rpartition(".")[0] not in self._in_model(weight)[0]:
            raise ModelError(f"the checkpoint holds the weight of {bias!r} as {weight!r}: a bias cannot be added to it")
        return name


def _check_not_tied(model: PreTrainedModel, site: str) -> None:
    """ModelError if a parameter of `site` is another module's as well: folding would change that module too."""
    tied = dict(model.all_tied_weights_keys)
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, parameter in model.get_submodule(site).named_parameters(prefix=site):
        partners = [b for a, b in [*tied.items(), *((b, a) for a, b in tied.items())] if a == name]
        if partners or shared[id(parameter)] > 1:
            other = partners[0] if partners else "another module's"
            raise ModelError(f"{name!r} is tied to {other}: folding {site!r} would change that as well; {HOOKS_ONLY}")


@torch.no_grad()
def _offset(site: str, module: nn.Module) -> float:
    """The c of a module that multiplies by c + weight, found by running it on small random parameters.

    That folding gives ω f + s is checked on the way, whatever the class is called.

    Raises
    ------
    ModelError
        Neither c = 0 nor c = 1 gives that.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) + 0.25

    width = int(module.weight.shape[1 if isinstance(module, Conv1D) else 0])  # type: ignore[index]
    linear = isinstance(module, (nn.Linear, Conv1D))
    weight = draw(3, width) if isinstance(module, Conv1D) else draw(width, 3) if linear else draw(width)
    inputs, scale, shift = draw(2, 3 if linear else width), draw(width), draw(width)
    per_row = scale[:, None] if linear and not isinstance(module, Conv1D) else scale
    has_bias = getattr(module, "bias", None) is not None

    def run(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        parameters = {"weight": weight, **({"bias": bias} if has_bias else {})}
        output = torch.func.functional_call(module, parameters, (inputs,))
        assert isinstance(output, torch.Tensor)
        return output

    bias = draw(width)
    for offset in (0.0, 1.0):
        try:
            wanted = scale * run(weight, bias) + (shift if has_bias else 0)
            folded = run((weight + offset) * per_row - offset, bias * scale + shift)
        except Exception as error:  # a module that cannot be run on its own fails in its own way
            raise ModelError(f"{site!r} ({type(module).__name__}) cannot be checked: {error}; {HOOKS_ONLY}") from error
        if torch.allclose(wanted, folded, rtol=1e-4, atol=1e-5):
            return offset
    raise ModelError(f"{site!r} ({type(module).__name__}) is not linear in its weight; {HOOKS_ONLY}")
