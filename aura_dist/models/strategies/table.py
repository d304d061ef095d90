"""The strategies, and what `--sharding` and its options mean. Imports no torch."""

from dataclasses import MISSING, dataclass, fields
from typing import Any

from aura_dist.errors import ConfigError
from aura_dist.models.strategies.dispatch import Dispatch
from aura_dist.models.strategies.layers import Layers
from aura_dist.models.strategies.replicate import Replicate
from aura_dist.models.strategies.split import Fsdp, Tensor
from aura_dist.models.strategies.strategy import Options, Spread, Strategy
from aura_dist.models.strategies.zero3 import Zero3
from aura_dist.ranks.layout import Layout

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Replicate(),
        Fsdp(),
        Tensor(),
        Zero3(),
        Dispatch(),
        Layers(),
    )
}


@dataclass(frozen=True)
class Sharding:
    """The value of `--sharding`, the strategy that it names, and the strategy's options, parsed."""

    spelled: str
    strategy: Strategy
    options: Options

    def layout(self, world_size: int) -> Layout:
        """The parallel axes; ConfigError if they do not fit so many ranks."""
        return self.strategy.layout(self.spelled, world_size)

    def collective(self, layout: Layout) -> bool:
        """Whether a forward runs collectives."""
        return self.strategy.collective(layout)


def parse_sharding(spelled: str, given: Options | None = None) -> Sharding:
    """What `--sharding` means, with the options that were set: name of the setting → its value.

    ConfigError if there is no such strategy, it would not look at one of the options, or an option has a wrong value.
    """
    strategy = next((s for s in STRATEGIES.values() if s.takes(spelled)), None)
    if strategy is None:
        known = ", ".join(spelling for s in STRATEGIES.values() for spelling in s.spellings)
        raise ConfigError(f"--sharding: expected one of {known}, got {spelled!r}")
    for name in given or {}:
        if name not in strategy.options:
            users = " or ".join(s.name for s in STRATEGIES.values() if name in s.options)
            raise ConfigError(
                f"--{name.replace('_', '-')}: expected with --sharding {users}, got --sharding {spelled}; leave it out"
            )
    return Sharding(spelled, strategy, strategy.parse(given or {}))


def sharding_of(config: Any) -> Sharding:
    """What the settings of a verb mean: `parse_sharding` of those options that differ from their default.

    `config` is a dataclass with `sharding` and any of the strategies' options.
    """
    known = {name for strategy in STRATEGIES.values() for name in strategy.options}
    given = {}
    for spec in fields(config):
        default = spec.default if spec.default_factory is MISSING else spec.default_factory()
        about_machine = spec.metadata.get("group") == "machine"  # of `plan`, whatever the strategy
        if spec.name in known and not about_machine and getattr(config, spec.name) != default:
            given[spec.name] = getattr(config, spec.name)
    return parse_sharding(config.sharding, given)


def check_generates(config: Any) -> None:
    """ConfigError if the strategy that the settings of a verb name cannot continue texts."""
    strategy = sharding_of(config).strategy
    if not strategy.generates:
        able = ", ".join(s.name for s in STRATEGIES.values() if s.generates)
        raise ConfigError(
            f"--sharding {strategy.name}: expected a strategy that continues texts ({able}), because this one would "
            "read all weights for each token; use --sharding dispatch for a model that is larger than memory"
        )


def title(spread: Spread) -> str:
    """`--sharding` and the options that say `spread`, as a user writes them."""
    return STRATEGIES[spread.layout.strategy].title(spread)
