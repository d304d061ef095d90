"""Biases that a checkpoint lacks, and the settings of its configuration that say whether they are there."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from aura_dist.errors import ModelError
from aura_dist.models.load import skeleton

# value that turns biases of linear layers on: all that transformers' configurations of language models have
SWITCHES: dict[str, bool] = {
    "bias": True, "use_bias": True, "no_bias": False, "enable_bias": True, "attention_bias": True, "mlp_bias": True,
    "qkv_bias": True, "use_qkv_bias": True, "attention_out_bias": True, "proj_bias": True, "add_bias_linear": True,
}  # fmt: skip


def with_biases(
    config: PretrainedConfig, model: PreTrainedModel, sites: Sequence[str]
) -> tuple[dict[str, bool], dict[str, int]]:
    """The settings under which all of `sites` have a bias; and name → width of every bias that they add.

    A setting counts if the model made with it differs in added biases alone, one at a site among them.

    Parameters
    ----------
    config, model
        The model as it is; `model` may be on the meta device.
    sites
        Modules without a bias that need one.

    Raises
    ------
    ModelError
        A site gets no bias from any setting.
    """
    before = _shapes(model)
    switches: dict[str, bool] = {}
    added: dict[str, int] = {}
    for site in sites:
        if f"{site}.bias" in added:
            continue
        for name, on in SWITCHES.items():
            if getattr(config.get_text_config(decoder=True), name, on) == on:
                continue
            new = _added(before, _shapes(skeleton(switched(config, {**switches, name: on}))))
            if new is not None and f"{site}.bias" in new:
                switches[name], added = on, new
                break
        else:
            raise ModelError(
                f"{site!r} has no bias to take the shift, and {type(model).__name__} has no setting that gives it one; "
                "leave it out by `fit --modules`, fit a method that only scales, or use hooks "
                "(`generate --intervention`, `evaluate --intervention`)"
            )
    return switches, added


def switched(config: PretrainedConfig, switches: Mapping[str, bool]) -> PretrainedConfig:
    """A copy of `config` with other settings in its text part."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config(decoder=True)
    for name, value in switches.items():
        setattr(text, name, value)
    return changed


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _added(before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
    """Name → width of what is new, if that is biases alone and all else is as before."""
    new: dict[str, Any] = {name: shape for name, shape in after.items() if name not in before}
    same = all(after.get(name) == shape for name, shape in before.items())
    if not same or not all(name.endswith(".bias") and len(shape) == 1 for name, shape in new.items()):
        return None
    return {name: shape[0] for name, shape in new.items()}
