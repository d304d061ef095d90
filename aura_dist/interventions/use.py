"""A model ready for use: causal language model, tokenizer, and the intervention to apply to it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.callbacks import Watch
from aura_dist.interventions.folded import check_not_folded
from aura_dist.interventions.hooks import check_fits, intervene
from aura_dist.models.fingerprints import comparable
from aura_dist.models.load import ModelSource, load_causal
from aura_dist.models.on_disk import OnDisk, Subject
from aura_dist.models.quantization import FLAG, check_can_load
from aura_dist.models.strategies.strategy import Options
from aura_dist.ranks.team import Team
from aura_dist.sites.find import SiteTable

INTERVENTION = "--intervention"


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

    def intervened(self, strength: float, watch: Watch | None = None) -> AbstractContextManager[Any]:
        """Context in which the intervention, if there is one, changes the model; `watch`: see `intervene`."""
        if self.intervention is None:
            return nullcontext(self.model)
        return intervene(self.model, self.intervention, strength, watch=watch)


def load_for_use(
    source: ModelSource, team: Team, intervention_dir: str | None, options: Options | None = None
) -> LoadedModel:
    """Load model, tokenizer and intervention; an intervention that does not fit is refused before weights are read.

    The weights are hashed once a host. ModelError if the model cannot be loaded, or the intervention was made for
    another one or is in its weights already; StoreError if there is no intervention at `intervention_dir`.
    """
    subject = OnDisk(source, options)
    check_can_load(source, subject.config, team.world.layout.strategy)
    key = f"fingerprint of {source.name}"
    intervention, found = find_intervention(
        subject, intervention_dir, lambda: team.once_a_host(key, subject.fingerprint)
    )
    model = load_causal(source, team.world, options)
    return LoadedModel(model, subject.tokenizer, found, intervention, subject.extras())


def find_intervention(
    subject: Subject, directory: str | None, fingerprint: Callable[[], str], flag: str = INTERVENTION
) -> tuple[Intervention | None, str]:
    """The intervention at `directory`, if there is one, and the model's fingerprint.

    `fingerprint` is called after all checks that need no weights. `flag` names the directory in errors, which are
    those of `load_intervention` and `check_made_for`.
    """
    if directory is None:
        return None, fingerprint()
    intervention = load_intervention(directory, subject.source, subject.config, subject.sites(), flag)
    found = fingerprint()
    check_made_for(intervention, directory, subject.source, found, subject.earlier_fingerprint, flag)
    return intervention, found


def load_intervention(
    directory: str, source: ModelSource, config: PretrainedConfig, table: SiteTable, flag: str = INTERVENTION
) -> Intervention:
    """The intervention at `directory`, for the model with this configuration and these sites.

    ModelError if it does not fit, or the model's weights carry it already; StoreError if there is none.
    """
    intervention = Intervention.load(directory)
    check_fits(table, intervention)
    check_not_folded(config, intervention, source.name, f"{flag} {directory!r}")
    return intervention


def check_made_for(
    intervention: Intervention,
    directory: str,
    source: ModelSource,
    found: str,
    earlier: Callable[[], str],
    flag: str = INTERVENTION,
) -> None:
    """ModelError if the intervention was made for another model than that of the fingerprint `found`.

    `earlier` computes the model's fingerprint by the rule of earlier versions.
    """
    made_for = intervention.meta.get("model") or {}
    recorded = str(made_for.get("fingerprint") or "")
    here = comparable(recorded, found, earlier, f"{flag} {directory}")
    if recorded and here != recorded:
        ways = [
            f"with {FLAG} {q}" if q else f"with no {FLAG}" for q in (made_for.get("quantization"), source.quantization)
        ]
        then, now = (f", {way}" if ways[0] != ways[1] else "" for way in ways)
        raise ModelError(
            f"{flag} {directory!r} was made for {made_for.get('name')!r} (fingerprint {recorded[:12]}{then}), "
            f"but --model {source.name!r} has {here[:12]}{now}; fit one for this model"
        )
