"""collect: labelled text → model → pooled responses of every neuron in a store.

Data flow: table → labels, token ids → sampled rows sorted by length (checked before any weight is read) → rank 0
makes the store, or checks that one that was begun has the same settings, and lists the tasks that are left → every
row worker claims tasks, longest first → batches → hooks pool on the device → row buffer → background writer → task
committed.
"""

import logging
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from transformers import PreTrainedModel

from aura_dist.collecting.description import Identity, describe, load_samples
from aura_dist.collecting.run import Run
from aura_dist.collecting.stream import stream
from aura_dist.config.verbs import CollectConfig
from aura_dist.errors import BudgetError, RunInterruptedError, StoreError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.hooks import laid_over
from aura_dist.interventions.use import find_intervention
from aura_dist.models.fingerprints import comparable
from aura_dist.models.hub import downloaded
from aura_dist.models.in_memory import InMemory
from aura_dist.models.layerwise import executor_of
from aura_dist.models.load import column_plans, source_of, token_plans
from aura_dist.models.on_disk import OnDisk, Subject
from aura_dist.models.quantization import check_can_load
from aura_dist.models.strategies.strategy import Spread
from aura_dist.models.strategies.table import Sharding, sharding_of
from aura_dist.planning.budget import CUDA_DEVICE_BYTES, with_largest_batch
from aura_dist.planning.disk import bytes_at, shortage_of_disk
from aura_dist.planning.estimate import Estimate, estimate
from aura_dist.planning.shortage import explained, largest
from aura_dist.planning.work import Machine, store_size, with_tokens
from aura_dist.ranks.device import device_memory, memory_within_reach, pick_device
from aura_dist.ranks.launch import start_team
from aura_dist.ranks.process import configure_rank, free_memory, local_ranks, return_freed_memory
from aura_dist.ranks.signals import StopFlag
from aura_dist.ranks.team import Team
from aura_dist.ranks.world import World
from aura_dist.sites.kinds import choose_tokens
from aura_dist.sites.pooling import POOLINGS, TOKENS, poolings_of
from aura_dist.store.access import check_writable, exists, open_group, zarr_store
from aura_dist.store.consolidated import consolidate
from aura_dist.store.grid import Task, rows_per_chunk
from aura_dist.store.launches import at_work
from aura_dist.store.record import (
    COLLECTED,
    add_times,
    check_same,
    count_without_numbers,
    counted_attempts,
    most_attempted,
    nonfinite_responses,
    unfinished,
    units_without_numbers,
)
from aura_dist.store.schema import Samples, StoreSpec, create_store, shard_widths, tasks_of
from aura_dist.store.tokens import token_arrays
from aura_dist.text.table import Table
from aura_dist.text.tokens import TokenizedTexts

logger = logging.getLogger(__name__)

PACKAGES = ("aura_dist", "torch", "transformers", "zarr", "zarrs", "numpy")


def run(config: CollectConfig, table: Table | None = None) -> None:
    """Collect from the model that the settings name, and from the data that they name, unless `table` holds it."""
    source = source_of(config)
    collect(config, OnDisk(source, sharding_of(config).options), pick_device(config.device), table)


def collect(config: CollectConfig, subject: Subject, device: str, table: Table | None = None) -> None:
    """Collect from `subject` on `device`, or continue a store that was begun; a finished store is left as it is."""
    with StopFlag() as stop, start_team(sharding_of(config), device) as team:
        configure_rank(team.world.global_rank, team.world.layout.world_size)
        samples, tokens, identity = team.once_a_host("samples", lambda: load_samples(config, subject, table))
        _log_lengths(samples, config.concepts)
        with downloaded(team, subject.source):
            spec = make_spec(config, subject, identity, lambda: team.once_a_host("fingerprint", subject.fingerprint))
            with _marked(config) if team.world.is_first else nullcontext():
                left = set(team.from_first("left", lambda: prepare_store(config, subject, spec, samples, tokens)))
                tasks = [t for t in tasks_of(samples.num_tokens, spec.tokens_per_batch) if t.index in left]
                if tasks:
                    with explained("texts run", team.world.device, lambda: _what_fits(config, subject, tokens, team)):
                        collect_tasks(config, subject, spec, tokens, tasks, team, stop)
                else:
                    logger.info("%s is finished: %d rows; --overwrite collects again", config.store, len(samples))
    if team.world.is_first:
        if tasks:
            report(config.store, samples, spec)
        consolidate(open_group(config.store, to_write=True))
        check_numbers(config.store, spec)


def _marked(config: CollectConfig) -> AbstractContextManager[None]:
    """Context in which the store is this launch's: to make it or continue it, or to replace it, which none may read."""
    # refuses what is not a store, and what is only read, before anything is written there
    if exists(config.store) and not config.overwrite and unfinished(group := open_group(config.store)):
        check_writable(config.store, group)
    against = ("collect", "score") if config.overwrite else ("collect",)
    return at_work(config.store, zarr_store(config.store), "collect", against=against, wait=not config.overwrite)


def prepare_store(
    config: CollectConfig, subject: Subject, spec: StoreSpec, samples: Samples, tokens: TokenizedTexts
) -> list[int]:
    """Make the store, or check one that was begun; returns the tasks that are left. One process of a launch runs it.

    BudgetError if it keeps tokens and the disk has no room for what is left of them.
    """
    begun = exists(config.store)  # refuses what is not a store, also under --overwrite
    if config.overwrite or not begun:
        check_room(config.store, spec, samples.num_tokens, freed_bytes=bytes_at(config.store) if begun else 0)
        kept = token_arrays(tokens, spec.tokens_per_batch) if spec.tokens else None
        versions = {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}}
        create_store(config.store, spec, samples, {"config": asdict(config), "versions": versions}, kept)
    group = open_group(config.store)
    check_same(config.store, group, _as_recorded(config, subject, spec, group), samples)
    tasks = tasks_of(samples.num_tokens, spec.tokens_per_batch)
    check_attempts(config, group, tasks)
    left = unfinished(group)
    if begun and left:
        rows = [samples.num_tokens[tasks[index].start : tasks[index].stop] for index in left]
        check_room(config.store, spec, np.concatenate(rows))
    return left


def check_room(store: str, spec: StoreSpec, num_tokens: NDArray[np.int32], freed_bytes: int = 0) -> None:
    """BudgetError if tokens are kept, and the disk has no room for rows of so many tokens each."""
    precisions = [spec.dtype if POOLINGS[p].selects else "float32" for p in spec.collected]
    size = store_size(len(num_tokens), rows_per_chunk(len(num_tokens)), [s.width for s in spec.sites], precisions)
    size = with_tokens(size, int(num_tokens.sum()), sum(s.width for s in spec.token_sites), spec.dtype)
    if refused := shortage_of_disk(store, size, freed_bytes):
        raise BudgetError(refused)


def _as_recorded(config: CollectConfig, subject: Subject, spec: StoreSpec, group: zarr.Group) -> StoreSpec:
    """`spec` with the model's fingerprint by the rule under which the store was begun."""
    begun_with: Any = group.attrs.get("model")
    recorded = begun_with.get("fingerprint") if isinstance(begun_with, dict) else None
    found = spec.model["fingerprint"]
    here = comparable(recorded, found, subject.earlier_fingerprint, f"--store {config.store}")
    return replace(spec, model={**spec.model, "fingerprint": here})


def check_attempts(config: CollectConfig, group: zarr.Group, tasks: Sequence[Task]) -> None:
    """StoreError if launches die in the same task again and again."""
    index, attempts = most_attempted(group)
    if config.max_attempts and attempts >= config.max_attempts:
        task = tasks[index]
        raise StoreError(
            f"--store {config.store!r}: {attempts} launches died in task {index} (rows {task.start} to "
            f"{task.stop - 1}, {task.num_tokens} tokens): expected fewer than {config.max_attempts}; see the end of "
            f"their logs, give the ranks more memory, and continue with --max-attempts {attempts + 1}"
        )


def collect_tasks(
    config: CollectConfig,
    subject: Subject,
    spec: StoreSpec,
    tokens: TokenizedTexts,
    tasks: Sequence[Task],
    team: Team,
    stop: StopFlag,
) -> None:
    """Have the ranks load the model together, and run this rank's share of `tasks` into the store."""
    # batches of tokens are the store's, because a file holds the tokens of one
    batch_tokens = None if spec.tokens else _batch_tokens(config, subject, tokens, team)
    return_freed_memory()  # of the tokenizer, before weights come
    begun = time.perf_counter()
    with subject.base(team.world, num_layers=1 + max(s.layer for s in spec.sites)) as model:
        group = open_group(config.store)
        plans = column_plans(model, spec.sites, shard_widths(group, spec), team.world)
        kept, by_layer = token_plans(model, spec.token_sites, team.world), executor_of(model) is not None
        run = Run(spec, tokens, plans, team, stop, batch_tokens, by_layer=by_layer, token_plans=kept)
        loaded = time.perf_counter()
        try:
            with (
                _intervened(model, config),
                stop.deferred(),
                counted_attempts(group) as attempts,
                run.writer(group) as writer,
            ):
                stream(model, run, tasks, writer, attempts)
        except RunInterruptedError:
            _note_times(group, team, loaded - begun, loaded)
            raise
        _note_times(group, team, loaded - begun, loaded)


def _batch_tokens(config: CollectConfig, subject: Subject, tokens: TokenizedTexts, team: Team) -> int | None:
    """Most tokens of a batch where weights are read for every batch and the user names no number; None elsewhere."""
    sharding, world = sharding_of(config), team.world
    asked = config.tokens_per_batch is not None
    if asked or isinstance(subject, InMemory) or not sharding.strategy.reads_every_batch(sharding.options):
        return None
    return int(team.from_first("tokens of a batch", lambda: _largest_batch(config, subject, tokens, sharding, world)))


def _largest_batch(
    config: CollectConfig, subject: OnDisk, tokens: TokenizedTexts, sharding: Sharding, world: World
) -> int:
    """Most tokens of a batch for which there is memory, by the estimate that `plan` makes."""
    gpu = world.device != "cpu"
    if gpu and "max_memory" in sharding.strategy.options and not sharding.options.get("max_memory"):
        return config.task_tokens  # accelerate fills a GPU to nine tenths, whatever else needs room
    work = _estimate(config, subject, tokens, gpu=gpu).work
    machine = Machine(gpu, device_memory(world.device), free_memory(), local_ranks())
    batch = with_largest_batch(work, Spread(world.layout, sharding.options), machine).tokens_per_batch
    logger.info("batches of at most %d tokens, because weights are read for each", batch)
    return batch


def _estimate(config: CollectConfig, subject: Subject, tokens: TokenizedTexts, *, gpu: bool) -> Estimate:
    """What `plan` would say of this collection."""
    return estimate(
        subject.source, subject.config, config.modules, config.pooling, tokens.num_tokens, config.task_tokens,
        keep_tokens=config.keep_tokens, shortest=int(tokens.num_tokens[0]), data_bytes=0, gpu=gpu,
    )  # fmt: skip


def _what_fits(config: CollectConfig, subject: Subject, tokens: TokenizedTexts, team: Team) -> str:
    """The largest setting for which there is memory, for a run that had too little."""
    sharding, device = sharding_of(config), team.world.device
    found = _estimate(config, subject, tokens, gpu=device != "cpu")
    within = memory_within_reach(device)
    machine = Machine(device != "cpu", None if within is None else within + CUDA_DEVICE_BYTES, free_memory(), 1)
    text = largest(found.work, Spread(team.world.layout, sharding.options), machine, splits=found.splits)
    return f"{text}, with --overwrite, because a store belongs to one size of batches" if "per-batch" in text else text


def _note_times(group: zarr.Group, team: Team, load_seconds: float, loaded: float) -> None:
    """Rank 0 records how much all ranks of this launch have done, and in which time."""
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


def check_numbers(store: str, spec: StoreSpec) -> None:
    """Say how many modules and units of a finished store are never finite; StoreError if more than half are not."""
    without = units_without_numbers(open_group(store))
    if not without:
        return
    text, most = count_without_numbers(without, spec.sites)
    if most:
        raise StoreError(
            f"--store {store!r}: {text}: expected at most half; check the weights, or collect again with --overwrite "
            "and a --dtype of a larger range (bfloat16, float32); the store is kept"
        )
    logger.warning("%s; they get no scores", text)


def _log_lengths(samples: Samples, concepts: Sequence[str]) -> None:
    if not concepts:
        logger.info("%d rows of %.1f tokens on average", len(samples), samples.num_tokens.mean())
        return
    positive, negative = (samples.num_tokens[samples.label[:, 0] == v] for v in (1, 0))
    logger.info(
        "%d rows: %d %s of %.1f tokens on average, %d not of %.1f",
        len(samples), len(positive), concepts[0], positive.mean(), len(negative), negative.mean(),
    )  # fmt: skip


def make_spec(
    config: CollectConfig, subject: Subject, identity: Identity, fingerprint: Callable[[], str] | None = None
) -> StoreSpec:
    """What the store will hold. The weights are hashed last, by `fingerprint` where several ranks share that."""
    check_can_load(subject.source, subject.config, sharding_of(config).strategy.name)
    table = subject.sites()
    sites = table.select(config.modules)
    intervention, found = find_intervention(subject, config.intervention, fingerprint or subject.fingerprint)
    under = None if intervention is None else intervention.identity(config.strength)
    tokens = choose_tokens(sites, config.keep_tokens, every=TOKENS in config.pooling)
    return describe(
        config, subject, table, sites, poolings_of(config.pooling), fingerprint=found, under=under, identity=identity,
        tokens=tokens,
    )  # fmt: skip


def _intervened(model: PreTrainedModel, config: CollectConfig) -> AbstractContextManager[Any]:
    """Context in which `--intervention` is applied to a base model, which may lack its last layers.

    It must be entered before the capture, because hooks run in the order in which they are registered: what is pooled
    is the output after the intervention.
    """
    if config.intervention is None:
        return nullcontext()
    return laid_over(model, Intervention.load(config.intervention), config.strength)
