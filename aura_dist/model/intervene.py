"""Lay an intervention over a model in memory, by forward hooks, and take it off again without a trace."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from aura_dist.core.affine import with_strength
from aura_dist.core.sites import Site
from aura_dist.errors import ModelError
from aura_dist.model.sites import SiteTable, find_sites, own_names
from aura_dist.model.tensor_plan import seen_columns
from aura_dist.store.artifact import Intervention


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
        The intervention has a site that the model lacks, or one of another width.
    """
    check_fits(find_sites(model), intervention, own_name=own_names(model))
    with ExitStack() as hooks:
        for site in intervention.sites:
            scale, shift = with_strength(*intervention.map_of(site), strength)
            if (scale == 1).all() and (shift is None or not shift.any()):
                continue
            module = model.get_submodule(own_names(model)(site))
            columns = _seen(model, site, len(scale))
            scale, shift = scale[columns], None if shift is None else shift[columns]
            hooks.callback(module.register_forward_hook(_affine_hook(scale, shift)).remove)
        yield model


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
        scale, shift = intervention.map_of(site)
        width = widths.get(own_name(site))
        if width is None:
            raise ModelError(f"the intervention does not fit {table.model_class}: it has no module {site!r}")
        for values in (scale, shift):
            if values is not None and values.shape != (width,):
                raise ModelError(
                    f"the intervention does not fit {table.model_class}: expected {width} neurons at {site!r}, "
                    f"got {values.shape[0]}"
                )


def _affine_hook(scale: NDArray[np.float32], shift: NDArray[np.float32] | None) -> Callable[..., Tensor]:
    constants: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    def on(device: torch.device) -> tuple[Tensor, Tensor | None]:
        if device not in constants:
            moved = None if shift is None or not shift.any() else torch.tensor(shift, device=device)
            constants[device] = (torch.tensor(scale, device=device), moved)
        return constants[device]

    def apply(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        scale_D, shift_D = on(output.device)
        wide = torch.promote_types(output.dtype, torch.float32)
        changed = output.to(wide) * scale_D
        if shift_D is not None:
            changed = changed + shift_D
        return changed.to(output.dtype)

    return apply
