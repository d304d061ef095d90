"""The kinds of sites. A new kind is one row of `KINDS` and one module with its finder and its `Tap`.

Rows name their finder and tap, which are loaded once there is a model, because this module must not import torch.
"""

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from aura_dist.errors import AuraError, ConfigError
from aura_dist.sites.site import INPUT, Site


@dataclass(frozen=True)
class Kind:
    """One kind of sites."""

    summary: str  # for `--help`
    finder: str  # `module:function`: decoder layer → {name within the layer, "" for the layer itself: width}
    tap: str  # `module:class`
    folds: bool = True  # whether `export` can fold a map of such a site into weights
    acts: bool = True  # whether an intervention can change such a site
    # whether a tap passes all values of a token together, which a gate of tokens needs
    whole_tokens: bool = True
    aliases: tuple[str, ...] = ()  # further words of `--modules` that choose this kind, maybe with others

    def find(self, layer: Any) -> dict[str, int]:
        """What the finder finds."""
        found: dict[str, int] = resolve_name(self.finder)(layer)
        return found


DEFAULT = "mlp"  # what is collected where `--modules` chooses nothing
EXCEPT = "!"  # before a word of `--modules`: what it matches is left out

# in the order in which sites of one module come
KINDS: dict[str, Kind] = {
    "attention": Kind(
        "outputs of the linear layers within attention",
        finder="aura_dist.sites.outputs:find_attention",
        tap="aura_dist.sites.outputs:LinearTap",
        aliases=("all",),
    ),
    "mlp": Kind(
        "outputs of a decoder layer's other linear layers",
        finder="aura_dist.sites.outputs:find_mlp",
        tap="aura_dist.sites.outputs:LinearTap",
        aliases=("all",),
    ),
    "norm": Kind(
        "outputs of a decoder layer's norms, those within attention left out",
        finder="aura_dist.sites.outputs:find_norms",
        tap="aura_dist.sites.outputs:NormTap",
    ),
    "neurons": Kind(
        "inputs of the MLPs' last linear layers: neurons after activation and gate",
        finder="aura_dist.sites.inputs:find_neurons",
        tap="aura_dist.sites.inputs:InputTap",
    ),
    "heads": Kind(
        "inputs of attention's output projections: what the heads found, head by head",
        finder="aura_dist.sites.inputs:find_heads",
        tap="aura_dist.sites.inputs:InputTap",
    ),
    "inputs": Kind(
        "inputs of all other linear layers",
        finder="aura_dist.sites.inputs:find_other_inputs",
        tap="aura_dist.sites.inputs:InputTap",
    ),
    "residual": Kind(
        "outputs of decoder layers: the residual stream",
        finder="aura_dist.sites.residual:find_residual",
        tap="aura_dist.sites.residual:ResidualTap",
        folds=False,
    ),
    "experts": Kind(
        "neurons of a mixture's experts after activation, 0 at tokens that the router did not send there",
        finder="aura_dist.sites.experts:find_experts",
        tap="aura_dist.sites.experts:ExpertsTap",
        whole_tokens=False,
    ),
    "routing": Kind(
        "what a mixture's router sends to each expert: tokens (1 or 0) and weights; nothing can change it",
        finder="aura_dist.sites.experts:find_routing",
        tap="aura_dist.sites.experts:RoutingTap",
        folds=False,
        acts=False,
    ),
}


def kind_words() -> dict[str, str]:
    """Every word of `--modules` that is no name pattern → its summary."""
    words = {name: kind.summary for name, kind in KINDS.items()}
    for name, kind in KINDS.items():
        for alias in kind.aliases:
            words[alias] = f"{words[alias]} and {name}" if alias in words else name
    return words


def matching(sites: Iterable[Site], wanted: str, *, alike: bool = False) -> set[str]:
    """Names of the sites that one word of `--modules` chooses: a kind, an alias of kinds, or a name pattern.

    A pattern with a colon means sites with one in their names, such as inputs, and another one outputs; with `alike`
    it means both.
    """
    chosen = {name for name, kind in KINDS.items() if wanted == name or wanted in kind.aliases}
    if chosen:
        return {s.name for s in sites if s.kind in chosen}
    names = {s.name for s in sites if fnmatch.fnmatchcase(s.name, wanted)}
    return names if alike else {name for name in names if (":" in name) == (":" in wanted)}


def _check_one_side(sites: Iterable[Site], word: str, flag: str) -> None:
    """ConfigError for a pattern whose last `*` stands for nothing at a module's output, and for `INPUT` at its input.

    `'*.mlp.*'` means the modules of an MLP, so their outputs. `'*.down_proj*'` names one module, and may mean either.
    """
    names, stem = {s.name for s in sites}, word.rstrip("*")
    if ":" in word or stem == word:
        return
    if any(name + INPUT in names and fnmatch.fnmatchcase(name, stem) for name in names):
        raise ConfigError(
            f"{flag} {word!r}: expected a pattern of outputs or one of inputs, got one that matches both; write "
            f"{stem!r} for the outputs, or '{stem}{INPUT}' for the inputs"
        )


def choose(
    sites: Sequence[Site],
    modules: Sequence[str],
    unmatched: Callable[[str], AuraError],
    default: str | None = None,
    flag: str = "--modules",
) -> tuple[Site, ...]:
    """The sites that words of `--modules`, or of another `flag` like it, choose, in their order.

    Words with `!` in front leave out sites that the others chose, inputs and outputs alike; where there are no others,
    those of `default`, or of all sites. Raises `unmatched(word)` if a word matches no site; ConfigError if a pattern
    may mean inputs or outputs, nothing is left, or a word leaves out nothing.
    """
    left_out = [word for word in modules if word.startswith(EXCEPT)]
    choosing = [word for word in modules if word not in left_out] or ([] if default is None else [default])
    chosen: set[str] = set() if choosing else {s.name for s in sites}
    for wanted in choosing:
        _check_one_side(sites, wanted, flag)
        names = matching(sites, wanted)
        if not names:
            raise unmatched(wanted)
        chosen |= names
    kept = set(chosen)
    for word in left_out:
        names = matching(sites, word.removeprefix(EXCEPT), alike=True)
        if not names:
            raise unmatched(word)
        if not names & chosen:
            raise ConfigError(f"{flag} {word!r}: expected a pattern of chosen modules, got one of others; leave it out")
        kept -= names
    if not kept:
        words = " ".join(map(repr, left_out))
        raise ConfigError(f"{flag} {words}: expected a module to be left, got none of {len(chosen)}; leave out fewer")
    return tuple(s for s in sites if s.name in kept)


def choose_tokens(sites: Sequence[Site], keep_tokens: Sequence[str], *, every: bool) -> tuple[Site, ...]:
    """The captured sites whose values are kept token by token: those of `--keep-tokens`, or all.

    ConfigError if a word matches none of them, or as of `choose`.
    """

    def unmatched(word: str) -> ConfigError:
        return ConfigError(
            f"--keep-tokens {word!r}: expected a pattern of captured modules, got one that matches none of "
            f"{len(sites)} ({sites[0].name}, …); name others, or capture more with --modules"
        )

    if every or not keep_tokens:
        return tuple(sites) if every else ()
    return choose(sites, keep_tokens, unmatched, flag="--keep-tokens")


def except_for(names: Iterable[str], kept: Collection[str] = ()) -> str:
    """Words of `--modules` that leave out sites, as one writes them in a shell.

    Sites of all layers are left out together, unless one of `kept` would be left out with them, or the site is the
    layer itself, whose pattern would match all that is in layers. Sites that a layer holds in a list are left out
    together anyway, because another forward may call others of them.
    """

    def pattern(name: str) -> str:
        general = re.sub(r"\.[0-9]+(?=\.|$)", ".*", name)
        if general.count(".*") > 1:
            return general
        return name if general.endswith(".*") or fnmatch.filter(kept, general) else general

    return " ".join(f"'{EXCEPT}{word}'" for word in dict.fromkeys(map(pattern, names)))
