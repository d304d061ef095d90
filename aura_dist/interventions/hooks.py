"""Lay an intervention over a model in memory, by forward hooks, and take it off again without a trace."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.methods import with_strength
from aura_dist.models.strategies.tensor_plan import seen_columns
from aura_dist.sites.find import SiteTable, find_sites, own_names
from aura_dist.sites.site import Site


@contextmanager
def intervene(model: PreTrainedModel, intervention: Intervention, strength: float = 1.0) -> Iterator[PreTrainedModel]:
    """Within the context, each site of `model` gives scale ⊙ output + shift.

    Outputs of bfloat16 and float16 models are scaled in float32 and rounded once. Weights are not touched:
    leaving the context gives back the model bit for bit, and `strength=0` never leaves it.

    Parameters
    ----------
    model
        A causal language model, or its base model.
    intervention
        Names and widths must be those of the model's sites.
    strength
        s ≥ 0: ω_s = 1 + s (ω − 1), b_s = s b.

    Raises
    ------
    ModelError
        The intervention has a site that the model lacks, or one of another width; or, of the first forward, that it
        does not call a site: nothing would be changed there.
    """
    _check_model(model, intervention)
    called: dict[str, bool] = {}
    with ExitStack() as hooks:
        for site in intervention.sites:
            scale, shift = with_strength(*intervention.map_of(site), strength)
            if (scale == 1).all() and (shift is None or not shift.any()):
                continue
            module = model.get_submodule(own_names(model)(site))
            columns = _seen(model, site, len(scale))
            scale, shift = scale[columns], None if shift is None else shift[columns]
            called[site] = False
            hooks.callback(module.register_forward_hook(affine_hook(site, scale, shift, called)).remove)
        for whole in {model, model.base_model}:  # some call parts of their base model, never that itself
            hooks.callback(whole.register_forward_hook(_all_called(called)).remove)
        yield model


def _all_called(called: Mapping[str, bool]) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook of a whole model: ModelError once a whole forward has left a site out."""

    def check(module: nn.Module, args: Any, output: Any) -> None:
        missing = next((site for site, was_called in called.items() if not was_called), None)
        if missing is not None:
            raise ModelError(
                f"module {missing!r} was not called in the forward pass, so that no hook can change its output; "
                "leave it out by `fit --modules`, or fold the intervention with `export`"
            )

    return check


def laid_over(
    model: PreTrainedModel, intervention: Intervention, strength: float
) -> AbstractContextManager[PreTrainedModel]:
    """`intervene` for a model that may have been cut after some layers: sites of the others are left out."""
    modules, own_name = {name for name, _ in model.named_modules()}, own_names(model)
    kept = [site for site in intervention.sites if own_name(site) in modules]
    return intervene(model, intervention.restricted(kept), strength)


def _seen(model: PreTrainedModel, site: str, width: int) -> NDArray[np.intp]:
    """The columns of a site's output that its hook gets on this rank: all, or its own under tensor parallelism."""
    num_ranks = getattr(model, "_tp_size", None) or 1
    if num_ranks == 1:
        return np.arange(width)
    rank = model._device_mesh["tp"].get_local_rank()
    mine = seen_columns(model.tp_plan, own_names(model)(site), Site(site, "", 0, width), num_ranks)[rank]
    return np.concatenate([np.arange(0), *(np.arange(start, stop) for start, stop in mine)])


def check_fits(
    table: SiteTable, intervention: Intervention, own_name: Callable[[str], str] = lambda name: name
) -> None:
    """ModelError unless every site of `intervention` is one of `table`'s, with the same width."""
    widths = {s.name: s.width for s in table.sites}
    for site in intervention.sites:
        width = widths.get(own_name(site))
        if width is None:
            raise ModelError(f"the intervention does not fit {table.model_class}: it has no module {site!r}")
        _check_width(intervention, site, width, table.model_class)


def _check_model(model: PreTrainedModel, intervention: Intervention) -> None:
    """The same for a model in memory, whose layers may have been replaced by quantised ones.

    Such layers often are no `Linear`: what counts is that there is a module of that name, and its width where it
    tells it. What it gives is checked when it gives it.
    """
    table, own_name = find_sites(model), own_names(model)
    known = {s.name for s in table.sites}
    others = [s for s in intervention.sites if own_name(s) not in known and _is_quantised(model, own_name(s))]
    check_fits(table, intervention.restricted(set(intervention.sites) - set(others)), own_name)
    for site in others:
        module = model.get_submodule(own_name(site))
        width = getattr(module, "out_features", getattr(module, "outfeatures", None))
        if isinstance(width, int):
            _check_width(intervention, site, width, table.model_class)


def _is_quantised(model: PreTrainedModel, name: str) -> bool:
    """Whether there is a module of this name that holds no float matrix, as quantised layers do not."""
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


def affine_hook(
    site: str, scale: NDArray[np.float32], shift: NDArray[np.float32] | None, called: dict[str, bool] | None = None
) -> Callable[[nn.Module, Any, Any], Tensor]:
    """A forward hook that gives scale ⊙ output + shift, in float32 at least, rounded once to the output's dtype.

    Parameters
    ----------
    site
        Name for errors.
    scale, shift
        [D] of what the module gives: of all its neurons or, where it gives a slice of them, of that slice.
    called
        Where the hook notes that it was called, under the site's name.

    The hook raises ModelError if the output is not a float tensor of D neurons.
    """
    constants: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    def on(device: torch.device) -> tuple[Tensor, Tensor | None]:
        if device not in constants:
            with torch.inference_mode(False):  # they outlive this forward, and autograd takes no inference tensors
                moved = None if shift is None or not shift.any() else torch.tensor(shift, device=device)
                constants[device] = (torch.tensor(scale, device=device), moved)
        return constants[device]

    def apply(module: nn.Module, args: Any, output: Any) -> Tensor:
        if called is not None:
            called[site] = True
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.shape[-1] != len(scale):
            raise ModelError(_unfit(site, module, output, len(scale)))
        scale_D, shift_D = on(output.device)
        wide = torch.promote_types(output.dtype, torch.float32)
        if wide == output.dtype and _is_ours_alone(module):
            changed = output.mul_(scale_D)  # fresh memory for a large output costs more than the product
            return changed if shift_D is None else changed.add_(shift_D)
        changed = output.to(wide) * scale_D
        if shift_D is not None:
            changed += shift_D
        return changed.to(output.dtype)

    return apply


def _is_ours_alone(module: nn.Module) -> bool:
    """Whether nobody else can hold the output of `module`: it is new, no other hook has seen it, nor autograd."""
    hooks = len(module._forward_hooks) + len(torch.nn.modules.module._global_forward_hooks)
    return isinstance(module, (nn.Linear, Conv1D)) and hooks == 1 and not torch.is_grad_enabled()


def _unfit(site: str, module: nn.Module, output: Any, width: int) -> str:
    got = f"{output.dtype} of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    return (
        f"module {site!r} ({type(module).__name__}): a hook needs a float output of {width} neurons, got {got}; "
        "load the model in another quantisation, or leave the module out by `fit --modules`"
    )
