"""A model on disk or on the hub, whose parts are read when they are first asked for; and one of either place."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from aura_dist.models.extras import find_extras, with_extras
from aura_dist.models.identity import earlier_fingerprint, fingerprint
from aura_dist.models.in_memory import InMemory
from aura_dist.models.layerwise import closing
from aura_dist.models.load import ModelSource, load_base, load_config, skeleton, tokenizer_of
from aura_dist.models.strategies.strategy import Options
from aura_dist.ranks.world import World
from aura_dist.sites.find import SiteTable, find_sites


@dataclass(frozen=True)
class OnDisk:
    """A model on disk or on the hub, and the options of the strategy that loads it."""

    source: ModelSource
    options: Options | None = None

    @cached_property
    def config(self) -> PretrainedConfig:
        return load_config(self.source)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        load_config(self.source)  # first, because its error says more about a wrong name
        return tokenizer_of(self.source)

    def sites(self) -> SiteTable:
        return find_sites(self.whole)

    @cached_property
    def whole(self) -> PreTrainedModel:
        """All modules, without weights."""
        return skeleton(self.config, self.source)

    def extras(self) -> dict[str, Any]:
        return find_extras(self.source, self.whole)

    def fingerprint(self) -> str:
        return with_extras(fingerprint(self.source, self.config), self.extras())

    def earlier_fingerprint(self) -> str:
        return with_extras(earlier_fingerprint(self.source, self.config), self.extras())

    @contextmanager
    def base(self, world: World, num_layers: int) -> Iterator[PreTrainedModel]:
        """The base model, loaded without the decoder layers from `num_layers` on."""
        model = load_base(self.source, world, self.options, num_layers=num_layers)
        with closing(model):
            yield model


Subject = OnDisk | InMemory  # what is collected from
