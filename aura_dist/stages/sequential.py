"""fit --sequential: labelled text and a model → an intervention directory, in one pass and without a store.

Data flow: table → labels, token ids (checked before any weight is read) → the model, a layer at a time → for each
layer: pooled responses of all texts → statistics → maps → the texts go on under the maps.
"""

import logging
import time
from contextlib import ExitStack
from functools import partial

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from aura_dist.collecting.description import describe, load_samples
from aura_dist.collecting.responses import LayerResponses
from aura_dist.collecting.run import Run
from aura_dist.config.verbs import SequentialConfig
from aura_dist.errors import ConfigError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.fitting import Fit, changeable, check_out, finish
from aura_dist.interventions.hooks import laid_over
from aura_dist.interventions.methods import settle_options
from aura_dist.interventions.sequential import fit_by_layer
from aura_dist.interventions.use import find_intervention
from aura_dist.models.layerwise import executor_of
from aura_dist.models.load import column_plans, source_of
from aura_dist.models.on_disk import OnDisk
from aura_dist.models.quantization import check_can_load
from aura_dist.models.strategies.table import sharding_of
from aura_dist.planning.shortage import HOLDS, explained, smaller
from aura_dist.ranks.device import pick_device
from aura_dist.ranks.launch import start_team
from aura_dist.ranks.process import configure_rank
from aura_dist.ranks.signals import StopFlag
from aura_dist.scoring.in_memory import statistics_of

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
    sharding = sharding_of(config)
    with (
        StopFlag("nothing is written: run the same command again") as stop,
        start_team(sharding, pick_device(config.device)) as team,
    ):
        if (num_ranks := team.world.layout.world_size) > 1:
            raise ConfigError(
                f"--sequential: expected one process, because each layer is fitted on all texts, got {num_ranks}; "
                "start it without torchrun"
            )
        configure_rank(team.world.global_rank, 1)
        subject = OnDisk(source_of(config), sharding.options)
        samples, tokens, identity = load_samples(config, subject)
        check_can_load(subject.source, subject.config, sharding.strategy.name)
        table = subject.sites()
        sites = changeable(table.select(config.modules), config.modules)
        earlier, found = find_intervention(subject, config.onto, subject.fingerprint, "--onto")
        under = None if earlier is None else earlier.identity(1.0)
        pooling = settle_options(config.method, config.options)["pooling"]
        spec = describe(config, subject, table, sites, [pooling], fingerprint=found, under=under, identity=identity)
        limit = config.task_tokens
        with ExitStack() as stack:
            with explained("loading", team.world.device, lambda: HOLDS):
                base = subject.base(team.world, num_layers=1 + max(site.layer for site in sites))
                model = stack.enter_context(base)
            stack.enter_context(explained("texts run", team.world.device, lambda: smaller("--tokens-per-batch", limit)))
            if earlier is not None:
                stack.enter_context(laid_over(model, earlier, 1.0))
            plans = column_plans(model, spec.sites, {site.name: site.width for site in spec.sites}, team.world)
            fitted = _fit(config, model, Run(spec, tokens, plans, team, stop), samples.label[:, 0])
    return finish(fitted, config.method, earlier, config.onto, config.out)


def _fit(config: SequentialConfig, model: PreTrainedModel, run: Run, label_N: NDArray[np.int8]) -> Intervention:
    """The fitted intervention alone, under what is laid over the model."""
    executor = executor_of(model)
    assert executor is not None
    begun = time.perf_counter()
    texts = LayerResponses(model, executor, run)
    wanted = Fit(config.method, config.concept, config.modules, config.strength, config.options)
    statistics = partial(statistics_of, label_N)
    texts.begin()
    # one forward, so that it is checked that the earlier intervention acts in every layer
    fitted: Intervention = executor.wave(
        partial(fit_by_layer, model, executor, run.spec, wanted, texts.of, statistics, texts.advance)
    )
    logger.info(
        "fitted in %.1f s; layers were read in %.1f s, of which the forward waited %.1f s",
        time.perf_counter() - begun, executor.reader.read_seconds, executor.reader.waited_seconds,
    )  # fmt: skip
    return fitted
