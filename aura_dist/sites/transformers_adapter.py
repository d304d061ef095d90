"""The one module that uses private or undocumented names of transformers; seen with 5.23."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from torch import Tensor, nn
from transformers import DynamicLayer, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file

# layers of a cache whose rows can be selected; layers of linear attention keep states, whose rows cannot
SELECTABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def unsplit_classes(model: PreTrainedModel) -> set[str]:
    """Names of the classes of modules that placement never splits: the decoder layers', where a model names them."""
    return set(model._no_split_modules or ())


def tensor_place(model: PreTrainedModel) -> tuple[int, int]:
    """(Rank, number of ranks) of this process among those that tensor parallelism splits `model` over."""
    num_ranks = getattr(model, "_tp_size", None) or 1
    return (model._device_mesh["tp"].get_local_rank() if num_ranks > 1 else 0), num_ranks


def tied_to(model: PreTrainedModel, parameter: str) -> list[str]:
    """Names of the parameters that are tied to `parameter` when weights are loaded."""
    tied = dict(model.all_tied_weights_keys)
    return [b for a, b in [*tied.items(), *((b, a) for a, b in tied.items())] if a == parameter]


def loaded_names(model: PreTrainedModel) -> Callable[[str], tuple[str, bool]]:
    """Name of a checkpoint's tensor → its name in `model`, and whether loading joins it with others or cuts it."""
    state, prefix = dict(model.state_dict()), model.base_model_prefix
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def loaded(name: str) -> tuple[str, bool]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        return renamed, pattern is not None

    return loaded


def holds_quantised(model: PreTrainedModel) -> bool:
    """Whether a weight of a linear layer is no plain tensor of floats."""
    weights = [m.weight.data for m in model.modules() if isinstance(m, nn.Linear)]
    return any(type(w) is not Tensor or not w.is_floating_point() for w in weights)


def implementations(config: PretrainedConfig) -> list[str | None]:
    """Which code computes attention and experts, as a configuration sets it; `to_dict` leaves both out."""
    return [config._attn_implementation, config._experts_implementation]


def find_file(name: str, revision: str | None, file: str) -> Path | None:
    """A file of a local directory or hub name; None where it is missing. OSError if the hub refuses."""
    path = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


@contextmanager
def hub_offline() -> Iterator[None]:
    """Context in which files of the hub come from the cache alone, as if HF_HUB_OFFLINE had been set at the start."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
