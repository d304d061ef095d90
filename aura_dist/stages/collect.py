"""collect: labelled text → model → pooled responses of every neuron in a store.

Data flow: table → labels, token ids → sampled rows sorted by length (checked before any weight is read) → rank 0
makes the store, or compares it and goes on with it, and lists the tasks that are left → every row worker claims
tasks, longest first → batches → hooks pool on the device → row buffer → background writer → task committed.
"""

import logging
import platform
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from transformers import PreTrainedModel

from aura_dist.collecting.stream import Run, stream
from aura_dist.config.verbs import CollectConfig
from aura_dist.errors import RunInterruptedError, StoreError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.hooks import laid_over
from aura_dist.interventions.use import load_intervention
from aura_dist.models.identity import fingerprint
from aura_dist.models.load import (
    ModelSource,
    check_positions,
    check_vocabulary,
    column_plans,
    load_base,
    load_config,
    pick_device,
    sharding_options,
    skeleton,
)
from aura_dist.ranks.launch import start_team
from aura_dist.ranks.process import configure_rank
from aura_dist.ranks.signals import StopFlag
from aura_dist.ranks.team import Team
from aura_dist.sites.find import find_sites
from aura_dist.store.access import exists, open_group
from aura_dist.store.grid import Task
from aura_dist.store.record import check_same, counted_attempts, most_attempted, nonfinite_responses, unfinished
from aura_dist.store.schema import Samples, StoreSpec, chunk_widths, create_store, tasks_of
from aura_dist.store.times import COLLECTED, add_times
from aura_dist.text.labels import check_classes, check_texts, parse_labels
from aura_dist.text.sampling import Sampling, sample_rows, without_mixed_negatives
from aura_dist.text.table import Table, read_table
from aura_dist.text.tokens import TokenizedTexts, load_tokenizer, tokenize, tokenizer_digest

logger = logging.getLogger(__name__)

PACKAGES = ("aura_dist", "torch", "transformers", "zarr", "zarrs", "numpy")


def run(config: CollectConfig) -> None:
    """Collect, or go on with a store that was begun; a finished store is left as it is."""
    with start_team(config.sharding, pick_device(config.device)) as team, StopFlag() as stop:
        configure_rank(team.world.global_rank, team.world.layout.world_size)
        samples, tokens, identity = load_samples(config)
        spec = make_spec(config, identity, int(samples.num_tokens.max()))
        left = set(team.from_first("left", lambda: prepare_store(config, spec, samples)))
        tasks = [t for t in tasks_of(samples.num_tokens, spec.tokens_per_batch) if t.index in left]
        if not tasks:
            logger.info("%s is finished: %d rows; --overwrite collects anew", config.store, len(samples))
            return
        collect_tasks(config, spec, tokens, tasks, team, stop)
    if team.world.is_first:
        report(config.store, samples, spec)


def prepare_store(config: CollectConfig, spec: StoreSpec, samples: Samples) -> list[int]:
    """Make the store, or compare one that was begun; the tasks that are left. For one process of a launch."""
    begun = exists(config.store)  # refuses what is not a store, also under --overwrite
    if config.overwrite or not begun:
        create_store(config.store, spec, samples, _provenance(config))
    group = open_group(config.store)
    check_same(config.store, group, spec, samples)
    check_attempts(config, group, tasks_of(samples.num_tokens, spec.tokens_per_batch))
    return unfinished(group)


def check_attempts(config: CollectConfig, group: zarr.Group, tasks: Sequence[Task]) -> None:
    """StoreError if launches die in the same task again and again."""
    index, attempts = most_attempted(group)
    if config.max_attempts and attempts >= config.max_attempts:
        task = tasks[index]
        raise StoreError(
            f"--store {config.store!r}: {attempts} launches died in task {index} (rows {task.start} to "
            f"{task.stop - 1}, {task.num_tokens} tokens): expected fewer than {config.max_attempts}; see their last "
            f"words, give the ranks more memory, and go on with --max-attempts {attempts + 1}"
        )


def collect_tasks(
    config: CollectConfig, spec: StoreSpec, tokens: TokenizedTexts, tasks: Sequence[Task], team: Team, stop: StopFlag
) -> None:
    """Load the model as the ranks hold it together, and run this rank's share of `tasks` into the store."""
    source = ModelSource(config.model, config.revision, config.dtype)
    begun = time.perf_counter()
    model = load_base(source, team.world, sharding_options(config), num_layers=1 + max(s.layer for s in spec.sites))
    group = open_group(config.store)
    plans = column_plans(model, spec.sites, chunk_widths(group, spec), team.world)
    run = Run(spec, tokens, plans, team, stop)
    loaded = time.perf_counter()
    try:
        with _intervened(model, config), stop.deferred(), counted_attempts(group) as begin, run.writer(group) as writer:
            stream(model, run, tasks, writer, begin)
    except RunInterruptedError:
        _note_times(group, team, loaded - begun, loaded)
        raise
    _note_times(group, team, loaded - begun, loaded)


def _note_times(group: zarr.Group, team: Team, load_seconds: float, loaded: float) -> None:
    """Rank 0 notes what all ranks of this launch have done, and how long it took."""
    if not team.world.is_first:
        return
    amounts = {
        "seconds": time.perf_counter() - loaded,
        "load_seconds": load_seconds,
        "rows": team.add("rows", 0),
        "tokens": team.add("tokens", 0),
    }
    about = {"ranks": team.world.layout.world_size, "device": team.world.device}
    add_times(group, COLLECTED, amounts, about)


def report(store: str, samples: Samples, spec: StoreSpec) -> None:
    """Say what was written; StoreError if some of it is still missing."""
    group = open_group(store)
    missing = unfinished(group)
    if missing:
        raise StoreError(f"--store {store!r}: {len(missing)} tasks are missing; run the same command again")
    for name, count in nonfinite_responses(group).items():
        logger.warning("%s: %d responses are NaN or infinite", name, count)
    logger.info("wrote %s: %d rows, %d modules", store, len(samples), len(spec.sites))


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
    model_config = load_config(ModelSource(config.model, config.revision, config.dtype))
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
    tokens = tokens.take(rows)
    check_vocabulary(model_config, tokens.largest_id)
    identity = {
        "tokenizer": {"name": config.model, "sha256": tokenizer_digest(tokenizer)},
        # token ids last: a setting that changes them is a better name for what differs
        "data": {**_data_identity(config, table, how), "token_ids": tokens.digest()},
    }
    return samples, tokens, identity


def _data_identity(config: CollectConfig, table: Table, how: Sampling) -> dict[str, Any]:
    return {
        "path": table.source,
        "sha256": table.sha256,
        "text_column": config.text_column,
        "threshold": config.threshold,
        "clean_negatives": list(config.clean_negatives),
        "sampling": asdict(how),
    }


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
    directory = Path(config.model)
    under = None
    if config.intervention is not None:
        under = load_intervention(config.intervention, source, table, found).identity(config.strength)
    return StoreSpec(
        model={
            "name": str(directory.resolve()) if directory.is_dir() else config.model,  # whence it is read later
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


def _intervened(model: PreTrainedModel, config: CollectConfig) -> AbstractContextManager[Any]:
    """Context in which `--intervention` lies over a base model, which may have been cut after some layers.

    Entered before the capture's hooks are: what is pooled is what the intervention leaves.
    """
    if config.intervention is None:
        return nullcontext()
    return laid_over(model, Intervention.load(config.intervention), config.strength)


def _provenance(config: CollectConfig) -> dict[str, Any]:
    return {
        "config": asdict(config),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }
