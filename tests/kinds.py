"""Two kinds of sites for tests alone: what a decoder layer returns, and what goes into its MLP's last linear layer."""

from dataclasses import dataclass

from torch import Tensor, nn

from aura_dist.sites.kinds import Kind
from aura_dist.sites.ownership import split_columns
from aura_dist.sites.tap import Fold, OutputTap, generic

ROWS = {
    "residual": Kind("outputs of decoder layers", "tests.kinds:find_layers", "tests.kinds:LayerTap", folds=False),
    "neurons": Kind("inputs of the MLPs' last linear layers", "tests.kinds:find_inputs", "tests.kinds:InputTap"),
}


def find_layers(layer):
    return {"": layer.get_submodule("mlp.down_proj").out_features}


class LayerTap(OutputTap):
    """Some layers return a tuple, whose first member is the hidden state."""

    def read(self, raw, num_seen, shape):
        return super().read(raw[0] if isinstance(raw, tuple) else raw, num_seen, shape)

    def write(self, raw, num_seen, change):
        if isinstance(raw, tuple):
            return (super().write(raw[0], num_seen, change), *raw[1:])
        return super().write(raw, num_seen, change)


def find_inputs(layer):
    return {"mlp.down_proj:input": layer.get_submodule("mlp.down_proj").in_features}


@dataclass(frozen=True)
class InputTap(OutputTap):
    def attach(self, model: nn.Module, callback):
        def hook(module, args: tuple[Tensor, ...]):
            changed = callback(args[0], False)
            return None if changed is None else (changed, *args[1:])

        return model.get_submodule(self.place).register_forward_pre_hook(hook)

    def seen_columns(self, plan, num_ranks):
        blocks = {"rowwise": 1}.get(plan.get(generic(self.place), "replicate"))
        return split_columns(self.width, num_ranks, blocks) if blocks else [((0, self.width),)] * num_ranks

    def fold(self, model, scale, shift):
        assert shift is None
        return {f"{self.place}.weight": Fold(scale, None, dim=1)}
