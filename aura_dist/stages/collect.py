"""collect: labelled text → model → pooled responses of every neuron in a store.

Data flow: table → labels, token ids → sampled rows sorted by length (checked before any weight is read) →
store made, or compared and gone on with → tasks, longest first → batches → hooks pool on the device → row
buffer → background writer → task committed.
"""

import logging
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from aura_dist.config import CollectConfig
from aura_dist.core.partition import Task, make_batches, row_chunks, rows_per_chunk
from aura_dist.data.labels import check_classes, check_texts, parse_labels
from aura_dist.data.sampling import Sampling, sample_rows, without_mixed_negatives
from aura_dist.data.table import Table, read_table
from aura_dist.data.tokens import TokenizedTexts, load_tokenizer, tokenize, tokenizer_digest
from aura_dist.model.capture import Capture, row_buffer
from aura_dist.model.fingerprint import fingerprint
from aura_dist.model.intervene import intervene
from aura_dist.model.sharding import ModelSource, check_positions, load_base, load_config, pick_device, skeleton
from aura_dist.model.sites import find_sites
from aura_dist.model.use import load_intervention
from aura_dist.runtime.progress import Progress
from aura_dist.runtime.world import world_from_environment
from aura_dist.store.access import exists, open_group
from aura_dist.store.artifact import Intervention
from aura_dist.store.record import check_same, unfinished
from aura_dist.store.schema import Samples, StoreSpec, create_store, tasks_of
from aura_dist.store.writer import ChunkWriter

logger = logging.getLogger(__name__)

PACKAGES = ("aura_dist", "torch", "transformers", "zarr", "zarrs", "numpy")


def run(config: CollectConfig) -> None:
    """Collect, or go on with a store that was begun; a finished store is left as it is."""
    world = world_from_environment(config.sharding, pick_device(config.device))
    samples, tokens, identity = load_samples(config)
    spec = make_spec(config, identity, int(samples.num_tokens.max()))
    begun = exists(config.store)  # refuses what is not a store, also under --overwrite
    if config.overwrite or not begun:
        create_store(config.store, spec, samples, _provenance(config))
    group = open_group(config.store)
    check_same(config.store, group, spec, samples)
    left = set(unfinished(group))
    tasks = [t for t in tasks_of(samples.num_tokens, spec.tokens_per_batch) if t.index in left]
    if not tasks:
        logger.info("%s is finished: %d rows; --overwrite collects anew", config.store, len(samples))
        return
    source = ModelSource(config.model, config.revision, config.dtype)
    model = load_base(source, world, num_layers=1 + max(s.layer for s in spec.sites))
    with (
        laid_over(model, config),
        ChunkWriter(group, spec, lambda: row_buffer(spec, rows_per_chunk(len(samples)), world.device)) as writer,
    ):
        stream(model, spec, tokens, tasks, writer)
    for name, count in sorted(writer.nonfinite.items()):
        logger.warning("%s: %d responses are NaN or infinite", name, count)
    logger.info("wrote %s: %d rows, %d modules", config.store, len(samples), len(spec.sites))


def load_samples(config: CollectConfig) -> tuple[Samples, TokenizedTexts, dict[str, Any]]:
    """The rows to run, sorted by token count then row, and what identifies tokenizer and data."""
    others = list(dict.fromkeys([*config.concepts, *config.clean_negatives]))
    table = read_table(config.data, [config.text_column, *others], split=config.split)
    texts = check_texts(table, config.text_column)
    labels = parse_labels(table, others, config.threshold)
    check_classes(labels[:, : len(config.concepts)], config.concepts, config.data)
    kept = np.arange(len(table))
    if config.clean_negatives:
        mixed_from = labels[:, [others.index(c) for c in config.clean_negatives]]
        kept = without_mixed_negatives(labels[:, 0], mixed_from)
    tokenizer = load_tokenizer(config.model, config.revision)
    tokens = tokenize(
        texts, tokenizer, max_tokens=config.max_tokens, skip_special=config.skip_special_tokens, source=config.data
    )
    how = Sampling(config.num_positive, config.num_negative, config.match_length, config.seed)
    rows = kept[sample_rows(labels[kept, 0], tokens.num_tokens[kept], how)]
    rows = rows[np.lexsort((rows, tokens.num_tokens[rows]))]
    chosen = np.ascontiguousarray(labels[rows, : len(config.concepts)])
    check_classes(chosen, config.concepts, config.data)
    samples = Samples(rows, tokens.num_tokens[rows], chosen)
    _log_lengths(samples, config.concepts[0])
    return samples, tokens.take(rows), _identity(config, table, how, tokenizer_digest(tokenizer))


def _identity(config: CollectConfig, table: Table, how: Sampling, tokenizer: str) -> dict[str, Any]:
    data = {
        "path": table.source,
        "sha256": table.sha256,
        "text_column": config.text_column,
        "threshold": config.threshold,
        "clean_negatives": list(config.clean_negatives),
        "sampling": asdict(how),
    }
    return {"data": data, "tokenizer": {"name": config.model, "sha256": tokenizer}}


def _log_lengths(samples: Samples, concept: str) -> None:
    positive, negative = (samples.num_tokens[samples.label[:, 0] == v] for v in (1, 0))
    logger.info(
        "%d rows: %d %s of %.1f tokens on average, %d not of %.1f",
        len(samples), len(positive), concept, positive.mean(), len(negative), negative.mean(),
    )  # fmt: skip


def make_spec(config: CollectConfig, identity: dict[str, Any], longest: int) -> StoreSpec:
    """What the store will hold; reads the model's configuration and the ends of its weights, not the weights."""
    source = ModelSource(config.model, config.revision, config.dtype)
    model_config = load_config(source)
    check_positions(model_config, longest, "--max-tokens")
    table = find_sites(skeleton(model_config))
    sites = table.select(config.modules)
    if table.experts:
        logger.warning(
            "%s keeps %d expert parameters as 3-D tensors (%s, ...): they are not captured",
            table.model_class, len(table.experts), table.experts[0],
        )  # fmt: skip
    found = fingerprint(config.model, config.revision, model_config)
    under = None
    if config.intervention is not None:
        under = load_intervention(config.intervention, source, table, found).identity(config.strength)
    return StoreSpec(
        model={
            "name": config.model,
            "revision": config.revision,
            "class": table.model_class,
            "fingerprint": found,
        },
        dtype=config.dtype,
        max_tokens=config.max_tokens,
        tokens_per_batch=config.tokens_per_batch,
        skip_special_tokens=config.skip_special_tokens,
        poolings=tuple(config.pooling),
        concepts=tuple(config.concepts),
        sites=sites,
        uncaptured=table.experts,
        intervention=under,
        **identity,
    )


def laid_over(model: PreTrainedModel, config: CollectConfig) -> AbstractContextManager[Any]:
    """Context in which `--intervention` lies over a base model, which may have been cut after some layers.

    Entered before the capture's hooks are: what is pooled is what the intervention leaves.
    """
    if config.intervention is None:
        return nullcontext()
    loaded = {f"{model.base_model_prefix}.{s.name}" for s in find_sites(model).sites}
    return intervene(model, Intervention.load(config.intervention).restricted(loaded), config.strength)


def _provenance(config: CollectConfig) -> dict[str, Any]:
    return {
        "config": asdict(config),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }


def stream(
    model: PreTrainedModel, spec: StoreSpec, tokens: TokenizedTexts, tasks: Sequence[Task], writer: ChunkWriter
) -> None:
    """Run `tasks` through a base model, longest first, and hand their pooled responses to the writer.

    `tokens` are in store order; a task is committed once all its rows are handed over.
    """
    num_tokens = tokens.num_tokens.tolist()
    rows = rows_per_chunk(len(num_tokens))
    progress = Progress("collect", sum(t.stop - t.start for t in tasks), sum(t.num_tokens for t in tasks))
    with Capture(model, spec.sites, model.base_model_prefix, spec.poolings) as capture:
        for task in sorted(tasks, key=lambda t: (-t.num_tokens, t.index)):
            for chunk in row_chunks(task, rows):
                buffer = writer.free_buffer()
                for batch_rows in make_batches(num_tokens, chunk, spec.tokens_per_batch):
                    capture.run(tokens.batch(batch_rows), buffer, batch_rows.start - chunk.start)
                    progress.advance(batch_rows.stop - batch_rows.start, sum(num_tokens[batch_rows]))
                capture.wait()
                writer.write(chunk.start, chunk.stop, buffer)
            writer.commit(task.index)
    progress.finish()
