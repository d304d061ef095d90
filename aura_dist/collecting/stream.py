"""The loop that every rank runs: it claims tasks, runs their batches, and hands row chunks to the writer.

Row workers claim tasks one by one, longest first. The ranks of a replica run their batches in step (`Team.claimed`),
because their forwards are collective. A rank without a batch runs a forward all the same, and drops its result.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from aura_dist.collecting.capture import Capture
from aura_dist.collecting.exchange import ColumnExchange
from aura_dist.collecting.run import Run, Step
from aura_dist.collecting.tokens import TokenSink
from aura_dist.collecting.waves import Waves
from aura_dist.models.layerwise import executor_of
from aura_dist.ranks.progress import Progress
from aura_dist.store.grid import Task
from aura_dist.store.record import Attempts
from aura_dist.store.writer import ChunkWriter, RowBuffer


def stream(
    model: PreTrainedModel, run: Run, tasks: Sequence[Task], writer: ChunkWriter, attempts: Attempts | None = None
) -> None:
    """Run this rank's share of `tasks` through a base model and hand the pooled responses to the writer.

    The first rank of a row worker notes in `attempts` each task that the row worker begins.

    Raises
    ------
    RunInterruptedError
        A signal came. All ranks of the replica stop at the same batch and drop their task.
    PeerError
        Another rank failed.
    StoreError
        The writer failed.
    """
    team = run.team
    queue = sorted(tasks, key=lambda t: (-t.num_tokens, t.index))
    progress = Progress("collect", sum(t.stop - t.start for t in tasks), sum(t.num_tokens for t in tasks))
    exchange = ColumnExchange(run.plans, run.dtypes, run.rows + 1, team) if team.world.layout.tensor > 1 else None
    count_row = None if writer.counts is None else run.rows
    sink = TokenSink(run, writer, run.token_plans) if run.token_plans else None
    capture = Capture(model, run.spec.sites, run.plans, run.spec.poolings, team.world.device, exchange, count_row, sink)
    if team.world.column_rank:
        attempts = None
    executor = executor_of(model)
    with capture.listening():
        if executor is None:
            _stream(run, queue, writer, capture, exchange, progress, attempts)
        else:
            Waves(executor, capture, run, writer, progress, attempts).run_all(queue)
    if team.world.is_first:
        progress.reach(team.add("rows", 0), team.add("tokens", 0))
        progress.finish()


def _stream(
    run: Run,
    queue: Sequence[Task],
    writer: ChunkWriter,
    capture: Capture,
    exchange: ColumnExchange | None,
    progress: Progress,
    attempts: Attempts | None,
) -> None:
    """Batch by batch through the whole model."""
    leads = run.team.world.column_rank == 0
    steps: list[Step] = []
    buffer: RowBuffer = {}

    def before() -> int | None:
        writer.check()
        return run.stop.received

    for turn in run.team.claimed("tasks", queue, before, lambda task: len(run.steps(task))):
        if turn is None:
            capture.skip(run.tokens.batch(slice(0, 1)))
            continue
        task, index = turn
        if index == 0:
            steps = run.steps(task)
            if attempts is not None:
                attempts.begin(task.index)
        chunk, batch, completes = steps[index]
        if batch.start == chunk.start:
            buffer = writer.free_buffer()
        capture.run(run.tokens.batch(batch), buffer, batch.start - chunk.start)
        if leads:
            run.count(batch, progress)
        if completes:
            copied = capture.copied()
            if exchange is not None:
                copied()
                exchange.complete(buffer)
            writer.write(task.index, chunk, buffer, copied)
        if index + 1 == len(steps):
            writer.commit(task.index)
