"""Run a trained method on the model and the texts that a store was collected from."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aura_dist.errors import InputError, ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.methods import FromModel, Scales, Shifts
from aura_dist.interventions.use import LoadedModel, load_for_use
from aura_dist.models.fingerprints import comparable
from aura_dist.models.hub import downloaded
from aura_dist.models.identity import earlier_fingerprint
from aura_dist.models.load import ModelSource, load_config
from aura_dist.models.strategies.table import parse_sharding
from aura_dist.ranks.device import pick_device
from aura_dist.ranks.launch import start_team
from aura_dist.ranks.process import configure_rank
from aura_dist.ranks.team import Team
from aura_dist.sites.site import Site
from aura_dist.store.access import read_array
from aura_dist.store.schema import StoreSpec
from aura_dist.text.chat import make_chat
from aura_dist.text.table import read_table
from aura_dist.text.tokenizer import TokenizerSettings
from aura_dist.text.tokens import TokenizedTexts, tokenize


@dataclass(frozen=True)
class Training:
    """Input of a trained method: a model, N texts, and which of them carry the concept."""

    # causal, on its device, in eval mode, its weights without gradients, under the intervention of `fit --onto`
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: Sequence[Site]  # where to act, in model order: each map has `site.width` values
    tokens: TokenizedTexts  # N texts, cut as in the store
    is_positive: NDArray[np.bool_]  # [N]
    options: Mapping[str, Any]  # the method's options → values
    team: Team  # the ranks that train together; each must return the same maps
    identity: str = ""  # digest of all other inputs but the sites and the options
    state: Path | None = None  # a file in which rank 0 keeps what it has learned; None: nothing is kept


def train_maps(
    group: zarr.Group,
    spec: StoreSpec,
    concept: str,
    sites: Sequence[Site],
    method: FromModel,
    options: Mapping[str, Any],
    earlier: Intervention | None,
    state: Path | None,
    sharding: str = "replicate",
) -> tuple[tuple[Scales, Shifts], list[NDArray[Any]]]:
    """The trained (scales, shifts), alike on all ranks, and the arrays of the store that they depend on.

    Raises
    ------
    InputError
        The store has no such concept, or its texts cannot be read or have changed.
    ModelError
        The store's model cannot be loaded, or has changed.
    """
    which = spec.index_of(concept, str(group.store_path))
    rows, labels = read_array(group, "samples/row"), read_array(group, "samples/label")[:, which]
    train = resolve_name(method.train)
    labelled = np.flatnonzero(labels >= 0)
    training = as_collected(group, spec, earlier, sharding, together=True)
    with training as (loaded, team), torch.enable_grad():
        tokens = team.once_a_host("tokens", lambda: stored_tokens(group, spec, rows, loaded.tokenizer))
        digest = hashlib.sha256(json.dumps([spec.to_attributes(), concept, getattr(earlier, "digest", None)]).encode())
        digest.update(rows.tobytes() + labels.tobytes())
        scales, shifts = train(
            Training(
                loaded.model, loaded.tokenizer, sites, tokens.take(labelled), labels[labelled] == 1, options,
                team, digest.hexdigest(), state,
            )
        )  # fmt: skip
    return (scales, shifts), [rows, labels]


@contextmanager
def as_collected(
    group: zarr.Group,
    spec: StoreSpec,
    earlier: Intervention | None,
    sharding: str = "replicate",
    *,
    together: bool = False,
) -> Iterator[tuple[LoadedModel, Team]]:
    """Within the context, the model that a store was collected from, spread over the ranks, under `earlier`.

    `together`: see `start_team`. ModelError if it cannot be loaded, or has changed.
    """
    collected_with: Any = group.attrs.get("config", {})
    how = TokenizerSettings(collected_with.get("tokenizer_ids"), collected_with.get("tokenizer_option", {}))
    adapter, quantization = (spec.model.get("adapter") or {}).get("name"), spec.model.get("quantization")
    source = ModelSource(
        spec.model["name"], spec.model["revision"], spec.dtype, adapter, tokenizer=how, quantization=quantization
    )
    with start_team(parse_sharding(sharding), pick_device("auto"), together=together) as team:
        configure_rank(team.world.global_rank, team.world.layout.world_size)
        with downloaded(team, source):
            loaded = replace(load_for_use(source, team, None), intervention=earlier)
        recorded = spec.model["fingerprint"]
        here = comparable(
            recorded, loaded.fingerprint, lambda: earlier_fingerprint(source, load_config(source)), "the store"
        )
        if here != recorded:
            raise ModelError(
                f"{source.name!r}: expected the weights that the store was collected from (fingerprint "
                f"{recorded[:12]}), got others ({here[:12]}); restore them, or collect again"
            )
        with loaded.intervened(1.0):
            yield loaded, team


def stored_tokens(
    group: zarr.Group, spec: StoreSpec, rows: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase
) -> TokenizedTexts:
    """The store's texts in its order; InputError unless their tokens are those that were collected."""
    source, column = str(spec.data["path"]), str(spec.data["text_column"])
    collected_with: Any = group.attrs.get("config", {})
    table = read_table(source, [column], split=str(collected_with.get("split", "train")))
    texts = [str(table.columns[column][row]) for row in rows if row < len(table)]
    chat = spec.tokenizer.get("chat")
    tokens = tokenize(
        texts, tokenizer, max_tokens=spec.max_tokens, skip_special=spec.skip_special_tokens,
        skip_first=spec.skip_first_tokens, source=source,
        chat=None if chat is None else make_chat(tokenizer, chat["role"], chat["system"]),
    )  # fmt: skip
    if tokens.digest() != spec.data["token_ids"]:
        raise InputError(
            f"data {source!r}: expected the texts that the store was collected from, got others; restore the file, or "
            "collect again"
        )
    return tokens
