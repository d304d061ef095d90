"""fit --sequential: labelled text and a model → an intervention directory, in one pass and without a store.

Data flow: table → labels, token ids (checked before any weight is read) → the model, a layer at a time → for each
layer: pooled responses of all texts → statistics → maps → the texts go on under the maps.
"""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aura_dist.collecting.responses import LayerResponses
from aura_dist.collecting.run import Run
from aura_dist.config.verbs import SequentialConfig
from aura_dist.errors import ConfigError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.fitting import Fit, changeable, check_out
from aura_dist.interventions.methods import settle_options
from aura_dist.interventions.sequential import fit_by_layer
from aura_dist.interventions.use import LoadedModel, load_for_use
from aura_dist.models.hub import downloaded
from aura_dist.models.layerwise import closing, executor_of
from aura_dist.models.load import (
    ModelSource,
    check_positions,
    check_vocabulary,
    column_plans,
    load_config,
    skeleton,
    source_of,
    tokenizer_of,
)
from aura_dist.models.strategies.table import sharding_of
from aura_dist.planning.shortage import HOLDS, explained, smaller
from aura_dist.ranks.device import pick_device
from aura_dist.ranks.launch import start_team
from aura_dist.ranks.process import configure_rank
from aura_dist.ranks.signals import StopFlag
from aura_dist.ranks.team import Team
from aura_dist.scoring.in_memory import statistics_of
from aura_dist.sites.find import SiteTable, find_sites
from aura_dist.store.schema import StoreSpec
from aura_dist.text.chat import make_chat
from aura_dist.text.selection import Selection, select
from aura_dist.text.table import read_table
from aura_dist.text.tokenizer import DIGEST_RULE, tokenizer_digest
from aura_dist.text.tokens import TokenizedTexts

logger = logging.getLogger(__name__)


def run(config: SequentialConfig) -> None:
    """Write the intervention of `config.method`; with `config.onto`, that after the earlier one, as one."""
    if not config.out:  # `fit` would write nothing
        raise ConfigError("--out: expected the directory to write the intervention to, got ''")
    fit(config)


def fit(config: SequentialConfig) -> Intervention:
    """The same intervention, written only if `config.out` names a directory."""
    if config.out:
        check_out(config.out, config.onto)
    with StopFlag() as stop, start_team(sharding_of(config), pick_device(config.device)) as team:
        if (num_ranks := team.world.layout.world_size) > 1:
            raise ConfigError(
                f"--sequential: expected one process, because each layer is fitted on all texts, got {num_ranks}; "
                "start it without torchrun"
            )
        configure_rank(team.world.global_rank, 1)
        source = source_of(config)
        label_N, tokens, identity = _texts(config, source)
        table = find_sites(skeleton(load_config(source), source))
        with downloaded(team, source), explained("loading", team.world.device, lambda: HOLDS):
            loaded = load_for_use(source, team, config.onto, sharding_of(config).options)
        with closing(loaded.model):
            spec = _spec(config, source, loaded, table, identity)
            limit = spec.tokens_per_batch
            with explained("texts run", team.world.device, lambda: smaller("--tokens-per-batch", limit)):
                fitted = _fit(config, loaded, spec, tokens, label_N, team, stop)
    whole = fitted if loaded.intervention is None else fitted @ loaded.intervention
    if config.out:
        whole.save(config.out)
        logger.info(
            "wrote %s: %s changes %d of %d neurons%s", config.out, config.method, fitted.num_changed,
            fitted.num_neurons, f", onto {config.onto}" if config.onto else "",
        )  # fmt: skip
    return whole


def _texts(config: SequentialConfig, source: ModelSource) -> tuple[Any, TokenizedTexts, dict[str, Any]]:
    """[N] labels, token ids, and what identifies tokenizer and data."""
    model_config, which = load_config(source), Selection.of(config)  # the model first: its error says more
    table = read_table(config.data, which.columns, split=config.split)
    tokenizer = tokenizer_of(source)
    _, label_NC, tokens = select(table, which, lambda: tokenizer)
    check_vocabulary(model_config, tokens.largest_id)
    check_positions(model_config, int(tokens.num_tokens.max()), "--max-tokens")
    chat = {} if config.chat is None else {"chat": make_chat(tokenizer, config.chat, config.system).identity}
    identity = {
        "tokenizer": {
            "name": tokenizer.name_or_path, "rule": DIGEST_RULE, "sha256": tokenizer_digest(tokenizer), **chat
        },
        "data": {"path": table.source, "sha256": table.sha256, **which.identity, "token_ids": tokens.digest()},
    }  # fmt: skip
    return np.ascontiguousarray(label_NC[:, 0]), tokens, identity


def _spec(
    config: SequentialConfig, source: ModelSource, loaded: LoadedModel, table: SiteTable, identity: dict[str, Any]
) -> StoreSpec:
    """What fixes the responses; the same responses without --sequential have the same description, but for the maps."""
    directory, onto = Path(source.name), loaded.intervention
    model = {
        "name": str(directory.resolve()) if directory.is_dir() else source.name,
        "revision": source.revision,
        "class": table.model_class,
        **loaded.extras,
        "fingerprint": loaded.fingerprint,
    }
    pooling = settle_options(config.method, config.options)["pooling"]
    return StoreSpec(
        model=model, dtype=source.dtype, max_tokens=config.max_tokens, tokens_per_batch=config.task_tokens,
        skip_special_tokens=config.skip_special_tokens, skip_first_tokens=config.skip_first_tokens,
        poolings=(pooling,), concepts=(config.concept,), sites=changeable(table.select(config.modules), config.modules),
        intervention=None if onto is None else onto.identity(1.0), **identity,
    )  # fmt: skip


def _fit(
    config: SequentialConfig,
    loaded: LoadedModel,
    spec: StoreSpec,
    tokens: TokenizedTexts,
    label_N: Any,
    team: Team,
    stop: StopFlag,
) -> Intervention:
    model, executor = loaded.model, executor_of(loaded.model)
    assert executor is not None
    begun = time.perf_counter()
    plans = column_plans(model, spec.sites, {site.name: site.width for site in spec.sites}, team.world)
    texts = LayerResponses(model, executor, Run(spec, tokens, plans, team, stop))
    wanted = Fit(config.method, config.concept, config.modules, config.strength, config.options)
    statistics = partial(_statistics, label_N)
    with loaded.intervened(1.0), stop.deferred():
        texts.begin()
        # one forward, so that the earlier intervention is checked over all layers
        fitted: Intervention = executor.wave(
            partial(fit_by_layer, model, executor, spec, wanted, texts.of, statistics, texts.advance)
        )
    logger.info(
        "fitted in %.1f s; layers were read in %.1f s, of which the forward waited %.1f s",
        time.perf_counter() - begun, executor.reader.read_seconds, executor.reader.waited_seconds,
    )  # fmt: skip
    return fitted


def _statistics(label_N: Any, responses: Any, names: Any) -> Any:
    return statistics_of(responses, label_N, names)
