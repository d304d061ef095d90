"""The kinds of sites. A new kind is one row of `KINDS` and one module with its finder and its `Tap`.

Rows name their finder and tap, which are loaded once there is a model, because this module must not import torch.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from aura_dist.errors import AuraError, ConfigError
from aura_dist.sites.site import Site


@dataclass(frozen=True)
class Kind:
    """One kind of sites."""

    summary: str  # for `--help`
    finder: str  # `module:function`: decoder layer → {name within the layer, "" for the layer itself: width}
    tap: str  # `module:class`
    folds: bool = True  # whether `export` can fold a map of such a site into weights
    acts: bool = True  # whether an intervention can change such a site
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
    "experts": Kind(
        "neurons of a mixture's experts after activation, 0 at tokens that the router did not send there",
        finder="aura_dist.sites.experts:find_experts",
        tap="aura_dist.sites.experts:ExpertsTap",
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


def matching(sites: Iterable[Site], wanted: str) -> set[str]:
    """Names of the sites that one word of `--modules` chooses: a kind, an alias of kinds, or a name pattern."""
    chosen = {name for name, kind in KINDS.items() if wanted == name or wanted in kind.aliases}
    return {s.name for s in sites if (s.kind in chosen if chosen else fnmatch.fnmatchcase(s.name, wanted))}


def choose(
    sites: Sequence[Site], modules: Sequence[str], unmatched: Callable[[str], AuraError], default: str = "*"
) -> tuple[Site, ...]:
    """The sites that words of `--modules` choose, in their order.

    Words with `!` in front leave out sites that the others chose; where there are no others, those of `default`.
    Raises `unmatched(word)` if a word matches no site; ConfigError if nothing is left, or a word leaves out nothing.
    """
    left_out = [word for word in modules if word.startswith(EXCEPT)]
    chosen: set[str] = set()
    for wanted in [word for word in modules if word not in left_out] or [default]:
        names = matching(sites, wanted)
        if not names:
            raise unmatched(wanted)
        chosen |= names
    kept = set(chosen)
    for word in left_out:
        names = matching(sites, word.removeprefix(EXCEPT))
        if not names:
            raise unmatched(word)
        if not names & chosen:
            raise ConfigError(
                f"--modules {word!r}: expected a pattern of chosen modules, got one of others; leave it out"
            )
        kept -= names
    if not kept:
        words = " ".join(map(repr, left_out))
        raise ConfigError(
            f"--modules {words}: expected a module to be left, got none of {len(chosen)}; leave out fewer"
        )
    return tuple(s for s in sites if s.name in kept)


def except_for(names: Iterable[str]) -> str:
    """Words of `--modules` that leave out sites, those of all layers together, as one writes them in a shell."""
    patterns = dict.fromkeys(re.sub(r"\.[0-9]+(?=\.|$)", ".*", name) for name in names)
    return " ".join(f"'{EXCEPT}{pattern}'" for pattern in patterns)
