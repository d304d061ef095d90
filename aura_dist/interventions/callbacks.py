"""What a tap's callback does to a site's values: a map, with or without a gate. In torch, on any device."""

from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aura_dist.interventions.gates import Gate
from aura_dist.sites.tap import Callback, Tap

Vector = NDArray[np.float32]
Along = Callable[[Tensor], Tensor]
AddUp = Callable[[Tensor], Tensor]  # sums of a rank's columns → sums of all columns
Parts = Mapping[str, Tensor]
# takes a site, and its gate's values: […, 1] of tokens, […, D] of the units that this rank sees
Watch = Callable[[str, Tensor], None]


def affine(tap: Tap, scale: Vector, shift: Vector | None, note: Callable[[str], None]) -> Callback:
    """A callback that makes values scale ⊙ values + shift, in float32 at least, rounded once to their dtype.

    `scale` and `shift` are [D] for the columns that the tap passes. The callback tells `note` that the site was called.
    """
    moves = shift is not None and bool(shift.any())
    on = _on_devices({"scale": scale} | ({"shift": shift} if moves else {}))

    def apply(raw: object, alone: bool) -> Any:
        note(tap.site)

        def change(values: Tensor, along: Along) -> Tensor:
            own = on(values.device)
            wide = torch.promote_types(values.dtype, torch.float32)
            if wide == values.dtype and alone:  # fresh memory for a large output costs more than the product
                changed = values.mul_(along(own["scale"]))
            else:
                changed = values.to(wide) * along(own["scale"])
            if moves:
                changed += along(own["shift"])
            return changed.to(values.dtype)

        return tap.write(raw, len(scale), change)

    return apply


def gated(
    tap: Tap,
    scale: Vector,
    shift: Vector | None,
    gate: Gate,
    note: Callable[[str], None],
    add_up: AddUp,
    watch: Watch | None = None,
) -> Callback:
    """A callback that takes values as far towards scale ⊙ values + shift as the gate says; else as `affine`.

    Where the gate is 1, the values are those of `affine` bit for bit; where it is 0, they do not change. `watch` is
    told the site and the gate's values.
    """
    scales = bool((scale != 1).any())
    moves = shift is not None and bool(shift.any())
    on = _on_devices({"scale": scale} | ({"shift": shift} if moves else {}) | dict(gate.parts))
    logits: Callable[[Parts, Tensor, Along, AddUp], Tensor] = resolve_name(gate.row.in_torch)

    def apply(raw: object, alone: bool) -> Any:
        note(tap.site)

        def change(values: Tensor, along: Along) -> Tensor:
            own = on(values.device)
            wide = values.to(torch.promote_types(values.dtype, torch.float32))
            passing = torch.sigmoid(logits(own, wide, along, add_up))
            if watch is not None:
                watch(tap.site, passing)
            if scales:
                mapped = wide * along(own["scale"])
                if moves:
                    mapped += along(own["shift"])
            else:
                mapped = wide + along(own["shift"]) if moves else wide.clone()
            # fresh memory for a large output costs more than the sum
            into = None if torch.is_grad_enabled() else mapped
            return torch.lerp(wide, mapped, passing, out=into).to(values.dtype)

        return tap.write(raw, len(scale), change)

    return apply


def token_logits(parts: Parts, values: Tensor, along: Along, add_up: AddUp) -> Tensor:
    """[…, 1] w · z + c, from the sum of every rank's columns."""
    return add_up(values @ parts["weight"].to(values.dtype))[..., None] + parts["bias"]


def unit_logits(parts: Parts, values: Tensor, along: Along, add_up: AddUp) -> Tensor:
    """[…, D] q z² + l z + c."""
    logits = (values * along(parts["quadratic"])).add_(along(parts["linear"]))
    return (logits * values).add_(along(parts["constant"]))


def _on_devices(arrays: Mapping[str, Vector | None]) -> Callable[[torch.device], dict[str, Tensor]]:
    """Device → the arrays there, copied at the first call."""
    copies: dict[torch.device, dict[str, Tensor]] = {}

    def on(device: torch.device) -> dict[str, Tensor]:
        if device not in copies:
            with torch.inference_mode(False):  # they outlive this forward, and autograd takes no inference tensors
                copies[device] = {n: torch.tensor(v, device=device) for n, v in arrays.items() if v is not None}
        return copies[device]

    return on
