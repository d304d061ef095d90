"""Which interventions a checkpoint carries already, because `export` folded them into its weights.

`export` writes a list into the language model's part of config.json, where transformers keeps it when a model is saved
again: {digest of the maps, method, strength} of each intervention, in the order in which they were folded.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from aura_dist.errors import ModelError
from aura_dist.interventions.artifact import Intervention, method_of
from aura_dist.models.fingerprints import FOLDED

# the file of an exported checkpoint that says how it was made
PROVENANCE_FILE = "aura_dist.json"


def folded_into(config: PretrainedConfig, model: str | None = None) -> list[dict[str, Any]]:
    """The records of a configuration; of a directory that an earlier version exported, what its `aura_dist.json` says.

    A record that no `export` wrote is left out.
    """
    found = getattr(config.get_text_config(decoder=True), FOLDED, None)
    if found is None and model is not None:
        with suppress(OSError, ValueError, AttributeError):
            made = json.loads((Path(model) / PROVENANCE_FILE).read_text(encoding="utf-8"))
            method = method_of(made["intervention"]) if isinstance(made.get("intervention"), Mapping) else "unknown"
            found = [{"digest": made.get("intervention_digest"), "method": method, "strength": made.get("strength")}]
    records = found if isinstance(found, list) else []
    return [dict(one) for one in records if isinstance(one, Mapping) and isinstance(one.get("digest"), str)]


def record_of(intervention: Intervention, strength: float) -> dict[str, Any]:
    """The record of an intervention that is folded at this strength."""
    return {"digest": intervention.digest, "method": method_of(intervention.meta), "strength": strength}


def check_not_folded(
    config: PretrainedConfig, intervention: Intervention, model: str | None = None, name: str = "the intervention"
) -> None:
    """ModelError if a model with this configuration, from the directory `model`, carries `intervention` already."""
    records = folded_into(config, model)
    if not records:
        return
    digest = intervention.digest
    for record in records:
        if record["digest"] == digest:
            raise ModelError(
                f"{name} ({record.get('method')}, digest {digest[:12]}): expected a model without it, got "
                f"{repr(model) if model else 'one'} whose weights carry it: export folded it in at strength "
                f"{record.get('strength')}; leave the intervention out, or use the model before the export"
            )
