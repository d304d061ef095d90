"""A model ready for use: causal language model, tokenizer, and the intervention to apply to it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.folded import check_not_folded
from aura_dist.interventions.hooks import check_fits, intervene
from aura_dist.models.extras import find_extras, with_extras
from aura_dist.models.fingerprints import comparable
from aura_dist.models.identity import earlier_fingerprint, fingerprint
from aura_dist.models.load import ModelSource, load_causal, load_config, skeleton, tokenizer_of
from aura_dist.models.quantization import FLAG, check_can_load
from aura_dist.models.strategies.strategy import Options
from aura_dist.ranks.team import Team
from aura_dist.sites.find import SiteTable, find_sites


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, its tokenizer, the fingerprint of the checkpoint, and maybe an intervention.

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
    source: ModelSource, team: Team, intervention_dir: str | None, options: Options | None = None
) -> LoadedModel:
    """Load model, tokenizer and intervention; an intervention that does not fit is refused before weights are read.

    The weights are hashed once a host. ModelError if the model cannot be loaded, or the intervention was made for
    another one or is in its weights already; StoreError if there is no intervention at `intervention_dir`.
    """
    config = load_config(source)
    check_can_load(source.quantization, config, team.world.layout.strategy)
    whole = skeleton(config, source)
    extras = find_extras(source, whole)
    intervention = None
    if intervention_dir is not None:
        intervention = load_intervention(intervention_dir, source, config, find_sites(whole))
    found = with_extras(team.once_a_host(f"fingerprint of {source.name}", lambda: fingerprint(source, config)), extras)
    if intervention is not None and intervention_dir is not None:

        def earlier() -> str:
            return with_extras(earlier_fingerprint(source, config), extras)

        check_made_for(intervention, intervention_dir, source, found, earlier)
    return LoadedModel(load_causal(source, team.world, options), tokenizer_of(source), found, intervention, extras)


def load_intervention(directory: str, source: ModelSource, config: PretrainedConfig, table: SiteTable) -> Intervention:
    """The intervention at `directory`, for the model with this configuration and these sites.

    ModelError if it does not fit, or the model's weights carry it already; StoreError if there is none.
    """
    intervention = Intervention.load(directory)
    check_fits(table, intervention)
    check_not_folded(config, intervention, source.name, f"--intervention {directory!r}")
    return intervention


def check_made_for(
    intervention: Intervention, directory: str, source: ModelSource, found: str, earlier: Callable[[], str]
) -> None:
    """ModelError if the intervention was made for another model than that of the fingerprint `found`.

    `earlier` computes the model's fingerprint by the rule of earlier versions.
    """
    made_for = intervention.meta.get("model") or {}
    recorded = str(made_for.get("fingerprint") or "")
    here = comparable(recorded, found, earlier, f"--intervention {directory}")
    if recorded and here != recorded:
        ways = [
            f"with {FLAG} {q}" if q else f"with no {FLAG}" for q in (made_for.get("quantization"), source.quantization)
        ]
        then, now = (f", {way}" if ways[0] != ways[1] else "" for way in ways)
        raise ModelError(
            f"--intervention {directory!r} was made for {made_for.get('name')!r} (fingerprint {recorded[:12]}{then}), "
            f"but --model {source.name!r} has {here[:12]}{now}; fit one for this model"
        )
