"""Where the sites of a model are: found from its classes alone, on the meta device too."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name

from torch import nn
from transformers import Conv1D, PreTrainedModel

from aura_dist.errors import ModelError
from aura_dist.sites.kinds import DEFAULT, KINDS, choose
from aura_dist.sites.site import Site
from aura_dist.sites.tap import OutputTap, Tap
from aura_dist.sites.transformers_adapter import unsplit_classes


@dataclass(frozen=True)
class SiteTable:
    """All sites of a model in model order, and the expert parameters that no site covers."""

    model_class: str
    sites: tuple[Site, ...]
    experts: tuple[str, ...]

    def select(self, modules: Sequence[str]) -> tuple[Site, ...]:
        """The sites that words of `--modules` choose, in model order.

        ModelError if a word matches nothing; the message lists what there is. ConfigError as of `choose`.
        """
        return choose(
            self.sites,
            modules,
            lambda word: ModelError(f"--modules {word!r} matches nothing in {self.model_class}; {self._found()}"),
            default=DEFAULT,
        )

    def _found(self) -> str:
        parts = []
        for kind in KINDS:
            names = [s.name for s in self.sites if s.kind == kind]
            parts.append(f"{kind}: {len(names)}" + (f" ({', '.join(names[:2])}, …)" if names else ""))
        text = "found " + ", ".join(parts)
        if self.experts:
            text += f"; {len(self.experts)} expert parameters ({self.experts[0]}, …), which cannot be captured"
        return text


def find_sites(model: PreTrainedModel) -> SiteTable:
    """Every site of a causal language model, or of its base model under its own names; on any device, meta included."""
    layers_name = decoder_layers_name(model)
    layers = model.get_submodule(layers_name)
    assert isinstance(layers, nn.ModuleList)
    sites, experts = [], []
    for index, layer in enumerate(layers):
        prefix = f"{layers_name}.{index}"
        place_of = {name: place for place, (name, _) in enumerate(layer.named_modules())}
        found = [(name, kind, width) for kind, row in KINDS.items() for name, width in row.find(layer).items()]
        for name, kind, width in sorted(found, key=lambda f: place_of[f[0].partition(":")[0]]):
            sites.append(Site(f"{prefix}.{name}" if name else prefix, kind, index, width))
        known = {name.partition(":")[0] for name, _, _ in found}
        # a convolution's weights have three dims too, and are no experts
        known |= {name for name, module in layer.named_modules() if isinstance(module, nn.Conv1d)}
        stacked = [name for name, p in layer.named_parameters() if _is_stacked(layer, name, p)]
        experts += [f"{prefix}.{name}" for name in stacked if name.rpartition(".")[0] not in known]
    return SiteTable(type(model).__name__, tuple(sites), tuple(experts))


def _is_stacked(layer: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter holds the matrices of several experts: as three dims, or one below the other (DBRX)."""
    owner = layer.get_submodule(name.rpartition(".")[0])
    if parameter.ndim != 2 or isinstance(owner, (nn.Linear, Conv1D)):
        return parameter.ndim == 3 and len(parameter) > 1  # RWKV mixes tokens by vectors of three dims
    return "Expert" in type(owner).__name__


def tap_of(model: PreTrainedModel, site: Site) -> Tap:
    """The tap of a site that `model` has: of its kind's family, or a module's output where it is of no kind."""
    family: type[Tap] = resolve_name(KINDS[site.kind].tap) if site.kind else OutputTap
    place = own_names(model)(site.name).partition(":")[0]
    return family.of(model.get_submodule(place), site.name, place, site.width)


def decoder_layers_name(model: PreTrainedModel) -> str:
    """Name of the list of decoder layers: the longest `ModuleList` of the classes transformers never splits.

    Where a model names no such classes, it is the longest list of modules of one class that hold linear layers.
    ModelError if there is no such list, or several that look alike.
    """
    whole = unsplit_classes(model)
    lists: dict[str, nn.ModuleList] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _are_layers(module, whole)
    }
    within = set(model.get_decoder().modules())  # a vision-language model has lists of other layers beside
    lists = {n: m for n, m in lists.items() if m in within} or lists
    lists = {n: m for n, m in lists.items() if "vision" not in n} or lists
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
