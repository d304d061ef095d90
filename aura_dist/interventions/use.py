"""A model ready for use: causal language model, tokenizer, and the intervention to apply to it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.hooks import check_fits, intervene
from aura_dist.models.extras import find_extras, with_extras
from aura_dist.models.identity import fingerprint
from aura_dist.models.load import ModelSource, load_causal, load_config, skeleton, tokenizer_of
from aura_dist.models.strategies.strategy import Options
from aura_dist.ranks.world import World
from aura_dist.sites.find import SiteTable, find_sites


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, its tokenizer, the fingerprint of its weights on disk, and maybe an intervention.

    `extras` is the record of an adapter and of code that came with the model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    intervention: Intervention | None
    extras: Mapping[str, Any] = field(default_factory=dict)

    def intervened(self, strength: float) -> AbstractContextManager[Any]:
        """Context in which the intervention, if there is one, changes the model."""
        return intervene(self.model, self.intervention, strength) if self.intervention else nullcontext(self.model)


def load_for_use(
    source: ModelSource, world: World, intervention_dir: str | None, options: Options | None = None
) -> LoadedModel:
    """Load model, tokenizer and intervention; an intervention that does not fit is refused before weights are read.

    ModelError if the model cannot be loaded, or the intervention was made for another one; StoreError if there is no
    intervention at `intervention_dir`.
    """
    config = load_config(source)
    whole = skeleton(config, source)
    extras = find_extras(source, whole)
    found = with_extras(fingerprint(source.name, source.revision, config), extras)
    intervention = None
    if intervention_dir is not None:
        intervention = load_intervention(intervention_dir, source, find_sites(whole), found)
    return LoadedModel(load_causal(source, world, options), tokenizer_of(source), found, intervention, extras)


def load_intervention(directory: str, source: ModelSource, table: SiteTable, found: str) -> Intervention:
    """The intervention at `directory`, for the model with these sites and the fingerprint `found`.

    ModelError if it was made for another model; StoreError if there is none.
    """
    intervention = Intervention.load(directory)
    check_fits(table, intervention)
    made_for = intervention.meta.get("model") or {}
    if (made_for.get("fingerprint") or found) != found:
        raise ModelError(
            f"--intervention {directory!r} was made for {made_for.get('name')!r} (fingerprint "
            f"{made_for['fingerprint'][:12]}), but --model {source.name!r} has {found[:12]}; fit one for this model"
        )
    return intervention
