"""score: the AUROC of every neuron of a store, one Dask task a chunk column. Never imports torch."""

import logging

from aura_dist.config import ScoreConfig
from aura_dist.runtime.cluster import check_settings, dask_client
from aura_dist.runtime.progress import Progress
from aura_dist.store.access import open_group
from aura_dist.store.describe import by_layer, confounding_warning, top_table
from aura_dist.store.schema import StoreSpec
from aura_dist.store.scores import Column, check_finished, compile_kernels, forget_handles, prepare, score_column
from aura_dist.store.view import score_table, top_neurons

logger = logging.getLogger(__name__)

NUM_SHOWN = 10


def run(config: ScoreConfig) -> None:
    """Score what is not scored yet, then show each concept's distribution and best neurons."""
    check_settings(config.dask, config.memory_limit)
    group = open_group(config.store)
    spec = StoreSpec.from_attributes(group.attrs)
    check_finished(config.store, group, spec)
    columns = prepare(group, spec)
    forget_handles()
    if columns:
        compile_kernels()
        unscored = _score(config, columns)
        if unscored:
            logger.warning("%d neurons have NaN responses and so no score", unscored)
    for concept in spec.concepts:
        for pooling in spec.poolings:
            _show(config.store, spec, concept, pooling)


def _score(config: ScoreConfig, columns: list[Column]) -> int:
    """Score `columns`; the number of neurons that have no score."""
    from distributed import as_completed

    neurons = sum(c.stop - c.start for c in columns)
    unscored = 0
    with dask_client(config.dask, config.num_workers, config.memory_limit) as client:
        progress = Progress("score", len(columns), neurons, unit="chunk columns", cost_unit="neurons")
        futures = client.map(score_column, [config.store] * len(columns), columns, pure=False)
        size = dict(zip((f.key for f in futures), columns, strict=True))
        for future in as_completed(futures):
            unscored += future.result()
            column = size[future.key]
            progress.advance(1, column.stop - column.start)
        progress.finish()
    return unscored


def _show(store: str, spec: StoreSpec, concept: str, pooling: str) -> None:
    table = score_table(open_group(store), spec, concept, pooling)
    print(f"\n{concept}, {pooling} pooling: {len(table):,} neurons\n{by_layer(table)}\n")
    print(top_table(top_neurons(store, concept, NUM_SHOWN, pooling)))
    warning = confounding_warning(table)
    if warning:
        logger.warning("%s, %s pooling: %s", concept, pooling, warning)
