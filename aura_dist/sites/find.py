"""Which submodules are captured or scaled: found on the meta device, from a model's classes alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from aura_dist.errors import ModelError
from aura_dist.sites.site import Site, matching


@dataclass(frozen=True)
class SiteTable:
    """All sites of a model in model order, and the expert parameters that no site covers."""

    model_class: str
    sites: tuple[Site, ...]
    experts: tuple[str, ...]

    def select(self, modules: Sequence[str]) -> tuple[Site, ...]:
        """The sites that kinds (`mlp`, `attention`, `norm`, `all`) or name patterns choose, in model order.

        Raises
        ------
        ModelError
            One of `modules` matches nothing; the message lists what there is.
        """
        chosen: set[str] = set()
        for wanted in modules:
            names = matching(self.sites, wanted)
            if not names:
                raise ModelError(f"--modules {wanted!r} matches nothing in {self.model_class}; {self._found()}")
            chosen |= names
        return tuple(s for s in self.sites if s.name in chosen)

    def _found(self) -> str:
        parts = []
        for kind in ("attention", "mlp", "norm"):
            names = [s.name for s in self.sites if s.kind == kind]
            parts.append(f"{kind}: {len(names)}" + (f" ({', '.join(names[:2])}, …)" if names else ""))
        text = "found " + ", ".join(parts)
        if self.experts:
            text += f"; {len(self.experts)} expert parameters ({self.experts[0]}, …), which cannot be captured"
        return text


def find_sites(model: PreTrainedModel) -> SiteTable:
    """Every site of a causal language model (on any device, meta included).

    `attention` are linear layers under a submodule whose class name contains "Attention" or whose own name
    contains "attn" (linear attention); `mlp` the decoder layers' other linear layers; `norm` the decoder
    layers' norms outside attention (those inside work on heads). Linear layers are `nn.Linear` and `Conv1D`
    and their subclasses, routers left out: they give more than one output.
    """
    layers_name = decoder_layers_name(model)
    layers = model.get_submodule(layers_name)
    assert isinstance(layers, nn.ModuleList)
    sites, experts = [], []
    for index, layer in enumerate(layers):
        prefix = f"{layers_name}.{index}"
        sites += [Site(name, kind, index, width) for name, kind, width in _sites_of_layer(layer, prefix)]
        experts += [f"{prefix}.{name}" for name in _experts_of_layer(layer)]
    return SiteTable(type(model).__name__, tuple(sites), tuple(experts))


def _sites_of_layer(layer: nn.Module, prefix: str) -> Iterator[tuple[str, str, int]]:
    """(name, kind, width) of a decoder layer's linear layers and norms."""
    in_attention: set[str] = set()
    for name, module in layer.named_modules():
        parent = name.rpartition(".")[0]
        inside = parent in in_attention
        if inside or _is_attention(name, module):
            in_attention.add(name)
        width = _width(module)
        if width is None:
            continue
        linear = isinstance(module, (nn.Linear, Conv1D))
        if linear:
            yield f"{prefix}.{name}", "attention" if inside else "mlp", width
        elif not inside:
            yield f"{prefix}.{name}", "norm", width


def _is_attention(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    if not name or kind.endswith("DecoderLayer"):  # a whole layer: JambaAttentionDecoderLayer
        return False
    return "Attention" in kind or ("attn" in name.rpartition(".")[2] and any(True for _ in module.children()))


def _experts_of_layer(layer: nn.Module) -> Iterator[str]:
    """Names of 3-D parameters, convolutions left out."""
    convolutions = {f"{name}.weight" for name, module in layer.named_modules() if isinstance(module, nn.Conv1d)}
    return (name for name, p in layer.named_parameters() if p.ndim == 3 and name not in convolutions)


def _width(module: nn.Module) -> int | None:
    if "Router" in type(module).__name__:
        return None
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, Conv1D):
        return int(module.nf)
    weight = getattr(module, "weight", None)
    if "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter) and weight.ndim == 1:
        return int(getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO 3 keeps the whole shape aside
    return None


def decoder_layers_name(model: PreTrainedModel) -> str:
    """Name of the list of decoder layers: the longest `ModuleList` of the classes transformers never splits.

    Where a model names no such classes, it is the longest list of modules of one class that hold linear layers.

    Raises
    ------
    ModelError
        The model has no such list, or several that cannot be told apart.
    """
    whole = set(model._no_split_modules or ())
    lists: dict[str, nn.ModuleList] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _are_layers(module, whole)
    }
    lists = {n: m for n, m in lists.items() if "vision" not in n}
    decoders = {n: m for n, m in lists.items() if "encoder" not in n.split(".")} or lists
    longest = [n for n, m in decoders.items() if len(m) == max(map(len, decoders.values()))]
    if not longest or (not whole and len(longest) > 1):
        raise ModelError(
            f"{type(model).__name__}: expected one list of decoder layers, of class "
            f"{' or '.join(sorted(whole)) or 'unnamed'}, found {' and '.join(longest) or 'none'}; "
            "this architecture is not supported"
        )
    return longest[0]


def _are_layers(modules: nn.ModuleList, whole: set[str]) -> bool:
    if whole:  # FSDP2 puts a class of its own in front of a layer's
        return all(any(kind.__name__ in whole for kind in type(m).__mro__) for m in modules)
    one_class = len({type(m) for m in modules}) == 1
    return one_class and any(isinstance(m, (nn.Linear, Conv1D)) for m in modules[0].modules())


def own_names(model: PreTrainedModel) -> Callable[[str], str]:
    """Names in the causal language model → names in `model`, which may be its base."""
    prefix = f"{model.base_model_prefix}."
    is_base = model.base_model is model
    return lambda site: site.removeprefix(prefix) if is_base else site
