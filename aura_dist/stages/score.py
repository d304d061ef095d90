"""score: every statistic of every neuron of a store, chunk column by chunk column.

It imports torch only to make a pooling from a store's tokens.

Data flow: rows that are finished → poolings that are made from tokens → spans that lack a statistic → Dask tasks, one a
span (several small spans share a task), a bounded number in flight → each reads and scores the chunk columns of its
spans, and writes their files → q-values over the model → tables and histograms.
"""

import asyncio
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import numpy as np
import zarr

from aura_dist.config.verbs import ScoreConfig
from aura_dist.errors import ClusterError, ConfigError, StoreError, brief
from aura_dist.ranks.progress import Progress
from aura_dist.scoring.cluster import LOCAL_KINDS, SCHEMES, dask_client, worker_shape
from aura_dist.scoring.column_sums import scoring_bytes
from aura_dist.scoring.scores import (
    OVER_MODEL,
    Basis,
    Pending,
    Span,
    adjust,
    basis_of,
    begin,
    discard,
    is_scored,
    make_array,
    pending,
    resolve_statistics,
    score_path,
    span_bytes,
)
from aura_dist.scoring.tables import best_neurons, by_layer, confounding_warning, score_table, top_table
from aura_dist.scoring.worker import Scored, Source, compile_kernels, score_spans
from aura_dist.store.access import check_writable, errors_of_writing, is_current, open_group, zarr_store
from aura_dist.store.consolidated import consolidate, forget_consolidated
from aura_dist.store.first_token import first_token_warnings
from aura_dist.store.launches import at_work
from aura_dist.store.record import SCORED, add_times
from aura_dist.store.schema import StoreSpec

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

NUM_SHOWN = 10
# Tasks known to the scheduler at once, per thread: enough to keep workers busy, few enough to keep this process small.
IN_FLIGHT = 4
MIN_IN_FLIGHT = 32
# Spans share a task up to so many bytes of responses: Dask takes milliseconds a task, as long as 5 MB take.
TASK_BYTES = 32 * 2**20
# Tasks for each thread at least, where there are as many spans, so that the threads end at about the same time.
TASKS_PER_THREAD = 8


def run(config: ScoreConfig) -> None:
    """Score what is not scored yet, then show each concept's distribution and best neurons."""
    group, spec, names = score(config)
    if "auroc" in names:
        for concept in spec.concepts:
            for pooling in spec.poolings:
                _show(group, spec, concept, pooling)


def score(config: ScoreConfig) -> tuple[zarr.Group, StoreSpec, Sequence[str]]:
    """Score what is not scored yet; returns the store, and the names of the statistics asked for."""
    names = resolve_statistics(config.statistics)
    shape = worker_shape(config.dask, config.num_workers, config.memory_limit, config.slurm)
    store = config.store if "://" in config.store else str(Path(config.store).resolve())
    group = open_group(store)  # before a mark is written, because there may be no store
    if not is_current(group):
        return group, _check_scored(config, store, group, names), names
    with at_work(store, zarr_store(store), "score", against=("score",), wait=not config.overwrite):
        return *_score_store(config, store, names, shape), names


def _check_scored(config: ScoreConfig, store: str, group: zarr.Group, names: Sequence[str]) -> StoreSpec:
    """The spec of a store that is only read; StoreError unless its scores are there."""
    spec = _chosen(config, StoreSpec.of(group))
    basis = basis_of(store, group, spec, partial=config.partial)
    if config.overwrite or not is_scored(group, spec, basis, names):
        check_writable(store, group)
    return spec


def _score_store(
    config: ScoreConfig, store: str, names: Sequence[str], shape: tuple[int, int]
) -> tuple[zarr.Group, StoreSpec]:
    group = open_group(store, to_write=True)
    basis = basis_of(store, group, StoreSpec.of(group), partial=config.partial)
    _make_poolings(config, store, group, basis)
    spec = _chosen(config, StoreSpec.of(group))
    if basis.partial:
        logger.warning("%d of %d rows are there: these scores are of them alone", basis.num_rows, basis.total_rows)
    if not config.overwrite:
        _begin(store, group, basis)
    left = pending(group, spec, names, overwrite=config.overwrite)
    if left:
        if not config.dask.startswith(SCHEMES):
            _check_memory(left, basis, len(spec.concepts), *shape)
        compile_kernels()
        source = Source(store, basis.runs, uuid.uuid4().hex)
        with dask_client(config.dask, config.num_workers, config.memory_limit, config.slurm) as client:
            if config.overwrite:  # only now that the workers are there
                _begin(store, group, basis, overwrite=_scored_paths(group, spec))
            if config.dask == "processes":  # every worker loads its kernels now, not within its first column
                client.run(compile_kernels)
            with errors_of_writing(store, "a score"):
                forget_consolidated(group)
            try:
                _score(client, group, spec, source, left)
            except StoreError as error:
                if config.dask in LOCAL_KINDS:
                    raise
                raise StoreError(f"{error} (from a worker, which must see the store under the same path)") from error
    if not OVER_MODEL.keys().isdisjoint(names):
        adjust(group, spec)
    consolidate(group)
    for warning in first_token_warnings(group, StoreSpec.of(group), spec.poolings):
        logger.warning(warning)
    return group, spec


def _make_poolings(config: ScoreConfig, store: str, group: zarr.Group, basis: Basis) -> None:
    """Make from the store's tokens what it lacks of the poolings to score; with --overwrite, make those again.

    StoreError if the store has no tokens of some module, or lacks rows.
    """
    spec = StoreSpec.of(group)
    lacks = [pooling for pooling in config.pooling if pooling not in spec.poolings]
    again = [p for p in spec.repooled if config.overwrite and p in (config.pooling or spec.poolings)]
    if not lacks and not again:
        return
    if without := [site.name for site in spec.sites if site.name not in spec.tokens]:
        wanted = " ".join([*spec.poolings, *lacks])
        raise StoreError(
            f"--store {store!r}: --pooling {lacks[0]}: expected a pooling of the store ({', '.join(spec.poolings)}) "
            f"or tokens of all modules to make it from, found none of {without[0]}; collect with --pooling {wanted}"
        )
    if basis.partial:
        raise StoreError(
            f"--store {store!r}: --pooling {(lacks or again)[0]}: expected all rows, because it is made from their "
            f"tokens, found {basis.num_rows} of {basis.total_rows}; run the same `collect` to finish it"
        )
    with errors_of_writing(store, "a pooling"):
        resolve_name("aura_dist.collecting.repool:repool")(group, spec, [*again, *lacks])


def _chosen(config: ScoreConfig, spec: StoreSpec) -> StoreSpec:
    """The spec with the poolings to score alone; StoreError if the store has none, or lacks one."""
    chosen = tuple(config.pooling) or spec.poolings
    if not chosen:
        raise StoreError(
            f"--store {config.store!r}: expected --pooling, because the store holds tokens and no pooling, got none; "
            "name those to make from the tokens, such as --pooling max"
        )
    if lacks := [pooling for pooling in chosen if pooling not in spec.poolings]:
        raise StoreError(
            f"--store {config.store!r}: --pooling {lacks[0]}: expected some of the store's {', '.join(spec.poolings)}"
        )
    return replace(spec, poolings=chosen)


def _scored_paths(group: zarr.Group, spec: StoreSpec) -> list[str] | None:
    """Paths of the scores of the poolings of `spec`; None where these are all of the store's."""
    if set(spec.poolings) == set(StoreSpec.of(group).poolings):
        return None
    return [score_path(site.name, pooling) for site in spec.sites for pooling in spec.poolings]


def _begin(store: str, group: zarr.Group, basis: Basis, *, overwrite: Sequence[str] | None = ()) -> None:
    """Make `scores` ready for `basis`, without the arrays at the paths of `overwrite`; None: without any."""
    with errors_of_writing(store, "a score"):
        if overwrite is None or overwrite:
            discard(group, overwrite)
        if begin(group, basis):
            logger.warning("%s was scored on other rows than are there now: all scores are computed again", store)


def _check_memory(left: list[Pending], basis: Basis, num_concepts: int, limit: int, num_threads: int) -> None:
    """ConfigError before any worker is started, if a worker cannot hold its threads' chunk columns."""
    needed = max(
        scoring_bytes(basis.num_rows, p.chunk, p.item_bytes, num_concepts, num_threads)
        + num_threads * span_bytes(num_concepts, p.span)
        for p in left
    )
    if needed > limit:
        raise ConfigError(
            f"--memory-limit: expected at least {needed / 1e9:.2f}GB for a worker that scores {num_threads} chunk "
            f"columns of {basis.num_rows:,} rows at once, got {limit / 1e9:.2f}GB; raise it, or have fewer threads"
        )


def _score(client: "Client", group: zarr.Group, spec: StoreSpec, source: Source, left: list[Pending]) -> None:
    """Score what is left, and log where the time went and how many neurons have no score."""
    num_columns, num_neurons = (sum(getattr(p, what) for p in left) for what in ("num_columns", "num_neurons"))
    num_rows = sum(stop - start for start, stop in source.runs)
    neuron_bytes = {(p.site, p.pooling): num_rows * p.item_bytes for p in left}
    num_unscored, seconds = 0, np.zeros(3)
    progress = Progress("score", num_columns, num_neurons, unit="chunk columns", cost_unit="neurons")
    num_spans = sum(int(np.count_nonzero(p.missing)) for p in left)
    most = max(1, num_spans // max(1, TASKS_PER_THREAD * sum(client.nthreads().values())))
    tasks = _tasks(_spans(group, spec, left), neuron_bytes, most)
    for task, scored in _results(client, source, tasks):
        num_unscored += scored.num_unscored
        seconds += scored.read_seconds, scored.compute_seconds, scored.write_seconds
        neurons = task[-1].stop - task[0].start
        progress.advance(
            sum(span.num_columns for span in task), neurons, neurons * neuron_bytes[task[0].site, task[0].pooling]
        )
    progress.finish()
    workers = sum(client.nthreads().values())  # counted at the end, because a cluster's jobs may start late
    add_times(group, SCORED, {"seconds": progress.elapsed_seconds, "neurons": num_neurons}, {"workers": workers})
    logger.info(
        "of the workers' time: reading %.0f %%, scoring %.0f %%, writing %.0f %%", *100 * seconds / seconds.sum()
    )
    if num_unscored:
        logger.warning("%d neurons have NaN responses and so no score", num_unscored)


def _spans(group: zarr.Group, spec: StoreSpec, left: list[Pending]) -> Iterator[Span]:
    """The spans to score; a site's array is made when its first one is asked for."""
    for item in left:
        make_array(group, spec, item.site, item.pooling)
        yield from item.spans()


def _tasks(spans: Iterator[Span], neuron_bytes: Mapping[tuple[str, str], int], most: int) -> Iterator[tuple[Span, ...]]:
    """Neighbouring spans of one site and pooling, as many as hold `TASK_BYTES` of responses, and at most `most`."""
    task: list[Span] = []
    for span in spans:
        if task:
            num_bytes = (span.stop - task[0].start) * neuron_bytes[task[0].site, task[0].pooling]
            if len(task) == most or num_bytes > TASK_BYTES or not task[-1].precedes(span):
                yield tuple(task)
                task = []
        task.append(span)
    if task:
        yield tuple(task)


def _results(
    client: "Client", source: Source, tasks: Iterator[tuple[Span, ...]]
) -> Iterator[tuple[tuple[Span, ...], Scored]]:
    """Each task's report as it comes, a bounded number of them in flight.

    StoreError of a task: a chunk that is missing or damaged, a store that a worker cannot see or write to. ClusterError
    if workers were lost again and again, or the scheduler was.
    """
    from distributed import Future, KilledWorker, as_completed

    in_flight: dict[str, tuple[Future, tuple[Span, ...]]] = {}
    finished = as_completed(loop=client.loop)

    def submit() -> int:
        """Submit until as many are in flight as workers can use; returns the number at which to call it again."""
        bound: int = max(MIN_IN_FLIGHT, IN_FLIGHT * sum(client.nthreads().values()))
        batch = list(islice(tasks, max(0, bound - len(in_flight))))
        keys = [f"score-{source.token}-{task[0].site}-{task[0].pooling}-{task[0].index}" for task in batch]
        for future, task in zip(client.map(partial(score_spans, source), batch, key=keys), batch, strict=True):
            in_flight[future.key] = future, task
            finished.add(future)
        return bound // 2

    try:
        low = submit()
        for futures in finished.batches():
            for future, scored in zip(futures, client.gather(futures), strict=True):
                yield in_flight.pop(future.key)[1], scored
            if len(in_flight) <= low:
                low = submit()
    except (CancelledError, asyncio.CancelledError) as error:
        raise ClusterError(f"the scheduler was lost: {brief(error)}; run `score` again: it does the rest") from error
    except (ImportError, RuntimeError) as error:
        raise ClusterError(f"a worker cannot run tasks: {brief(error)}; install the same aura_dist there") from error
    except KilledWorker as error:
        task = in_flight[str(error.task)][1]
        raise ClusterError(
            f"workers died again and again on {task[0].site}, neurons {task[0].start} to {task[-1].stop}: expected "
            "them to live; raise --memory-limit, or see the workers' logs"
        ) from error
    finally:
        client.cancel([future for future, _ in in_flight.values()], force=True)


def _show(group: zarr.Group, spec: StoreSpec, concept: str, pooling: str) -> None:
    table = score_table(group, spec, concept, pooling)
    print(f"\n{concept}, {pooling} pooling: {len(table):,} neurons\n{by_layer(table)}\n")
    print(top_table(best_neurons(table, NUM_SHOWN)))
    warning = confounding_warning(table)
    if warning:
        logger.warning("%s, %s pooling: %s", concept, pooling, warning)
