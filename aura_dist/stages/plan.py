"""plan: what `collect` would take, before anything is spent; the model's configuration is read, never its weights.

Data flow: rows and their token counts (from the data, or an upper bound) → the model on the meta device → sites,
weights, a traced forward → `planning/budget.py` → tables, or a refusal that names the largest setting that fits.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig

from aura_dist.config.verbs import PlanConfig
from aura_dist.errors import AuraError, BudgetError, ConfigError
from aura_dist.models.load import DTYPES, ModelSource, load_config
from aura_dist.planning.estimate import Estimate, estimate
from aura_dist.planning.schedule import TFLOPS, run_seconds, schedule
from aura_dist.planning.store_size import store_size
from aura_dist.planning.text import Report, render
from aura_dist.planning.units import parse_bytes, show_bytes
from aura_dist.planning.what_fits import Fit, advice, fit, survey
from aura_dist.planning.work import Machine, Spread, Tier
from aura_dist.ranks.layout import parse_layout
from aura_dist.store.schema import tasks_of
from aura_dist.text.selection import Selection, select
from aura_dist.text.table import read_table
from aura_dist.text.tokens import load_tokenizer

MAX_RANKS_PER_HOST = 8


@dataclass(frozen=True)
class Rows:
    """Token counts of the rows that would be run, ascending, a lower bound of them, and where they come from."""

    num_tokens: NDArray[np.int32]
    shortest: int
    origin: str


def run(config: PlanConfig) -> None:
    """Print the plan; BudgetError if it does not fit."""
    report, refusal = make_plan(config)
    print(json.dumps(asdict(report), indent=2) if config.json else render(report))
    sys.stdout.flush()
    if refusal:
        raise BudgetError(refusal)


def make_plan(config: PlanConfig) -> tuple[Report, str]:
    """All figures, and why they do not fit: one line, empty if they do."""
    spread, machine = make_spread(config), make_machine(config)
    source = ModelSource(config.model, config.revision, config.dtype)
    model_config = load_config(source)
    rows = find_rows(config, model_config)
    found = estimate(
        source,
        model_config,
        config.modules,
        config.pooling,
        rows.num_tokens,
        config.tokens_per_batch,
        shortest=rows.shortest,
        data_bytes=Path(config.data).stat().st_size if config.data and Path(config.data).is_file() else 0,
        gpu=machine.gpu,
        tensor_ranks=spread.layout.tensor,
        plan_file=config.tensor_plan,
    )
    report, wanted = make_report(config, found, rows, spread, machine)
    fits = wanted.tokens_per_batch == config.tokens_per_batch
    return report, "" if fits else _refusal(config, wanted, machine, report.advice)


def make_machine(config: PlanConfig) -> Machine:
    """Where the ranks would run: a GPU where its memory is given, it is asked for, or there is one."""
    device = None if config.device_memory is None else parse_bytes(config.device_memory, "--device-memory")
    host = None if config.host_memory is None else parse_bytes(config.host_memory, "--host-memory")
    if config.device == "cpu" and device is not None:
        raise ConfigError("--device-memory: expected with a GPU, got --device cpu; use --host-memory")
    gpu = config.device == "cuda" or device is not None or (config.device == "auto" and torch.cuda.is_available())
    ranks = config.ranks_per_host or min(config.world_size, MAX_RANKS_PER_HOST)
    if ranks > config.world_size:
        raise ConfigError(f"--ranks-per-host: expected at most --world-size {config.world_size}, got {ranks}")
    return Machine(gpu, device, host, ranks)


def make_spread(config: PlanConfig) -> Spread:
    """How the weights would be spread."""
    layout = parse_layout(config.sharding, config.world_size)
    offload = config.offload.partition(":")
    if offload[0] not in ("none", "cpu", "nvme") or (offload[0] == "nvme") != bool(offload[2]):
        raise ConfigError(f"--offload: expected none, cpu or nvme:PATH, got {config.offload!r}")
    for name, given, strategy in (
        ("--offload", config.offload != "none", "zero3"),
        ("--max-memory", bool(config.max_memory), "dispatch"),
    ):
        if given and layout.strategy != strategy:
            raise ConfigError(f"{name}: expected with --sharding {strategy}, got --sharding {config.sharding}")
    return Spread(layout, offload[0], tuple(_tiers(config.max_memory)))


def _tiers(max_memory: list[str]) -> list[Tier]:
    """`0=70GiB cpu=200GiB` → tiers in the order in which they are filled; what is left goes to the disk."""
    sizes: dict[str, int] = {}
    for entry in max_memory:
        name, equals, size = entry.partition("=")
        if not equals or not (name == "cpu" or name.isdecimal()) or name in sizes:
            raise ConfigError(f"--max-memory: expected values such as 0=70GiB cpu=200GiB, each once, got {entry!r}")
        sizes[name] = parse_bytes(size, "--max-memory")
    if not sizes:
        return []
    order = sorted(sizes, key=lambda name: (name == "cpu", int(name) if name.isdecimal() else 0))
    return [*(Tier(name, sizes[name]) for name in order), Tier("disk", None)]


def find_rows(config: PlanConfig, model_config: PretrainedConfig) -> Rows:
    """The rows of the data if these can be read, otherwise as many as are asked for, of the largest length.

    Raises
    ------
    AuraError
        The data cannot be read and no numbers of rows are given.
    """
    asked = (config.num_positive or 0) + (config.num_negative or 0)
    reason = "no --data"
    if config.data:
        try:
            num_tokens = _sampled(config)
            return Rows(num_tokens, int(num_tokens[0]), f"{config.data}, tokenized and sampled")
        except AuraError as error:
            if not asked:
                raise
            reason = str(error)
    if not asked:
        raise ConfigError("expected --data, or --num-positive and --num-negative to say how many rows, got neither")
    positions = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = min(config.max_tokens, positions or config.max_tokens)
    origin = f"upper bound: every row with {longest} tokens ({reason})"
    return Rows(np.full(asked, longest, dtype=np.int32), 1, origin)


def _sampled(config: PlanConfig) -> NDArray[np.int32]:
    """Token counts, ascending, of the rows that `collect` would run; without concepts, of as many of the longest."""
    which = Selection.of(config)
    table = read_table(config.data, which.columns, split=config.split)
    _, _, tokens = select(table, which, lambda: load_tokenizer(config.model, config.revision))
    asked = (config.num_positive or 0) + (config.num_negative or 0)
    return tokens.num_tokens if config.concepts else tokens.num_tokens[-asked:]


def make_report(
    config: PlanConfig, found: Estimate, rows: Rows, spread: Spread, machine: Machine
) -> tuple[Report, Fit]:
    """All figures, and how the wanted setting fits."""
    work, num_tokens = found.work, rows.num_tokens
    wanted = fit(work, spread, machine)
    others = survey(work, config.world_size, machine, splits=found.splits)
    batches = schedule(num_tokens.tolist(), work.rows_chunk, config.tokens_per_batch, work.forward)
    tflops = config.tflops or TFLOPS["cuda" if machine.gpu else "cpu", DTYPES[config.dtype].itemsize]
    compute, stream = run_seconds(batches, spread.layout, wanted.memory, tflops)
    by_kind = {k: [s.width for s in found.table.sites if s.kind == k] for k in ("attention", "mlp", "norm")}
    widths = [s.width for s in found.sites]
    report = Report(
        model=f"{config.model} ({found.table.model_class}, {config.dtype})",
        kinds={kind: (len(w), sum(w)) for kind, w in by_kind.items()},
        captured=(len(widths), sum(widths)),
        uncaptured=len(found.table.experts),
        rows=rows.origin,
        store=store_size(len(num_tokens), work.rows_chunk, widths, found.precisions),
        rows_chunk=work.rows_chunk,
        columns_chunk=tuple(sorted({c for _, c in work.neurons})),
        num_tasks=len(tasks_of(num_tokens, config.tokens_per_batch)),
        batches=batches,
        longest=work.longest,
        tokens_per_batch=config.tokens_per_batch,
        layers=len(work.weights.layers),
        weights_bytes=work.weights.total_bytes,
        sharding=spread.name,
        world_size=config.world_size,
        num_replicas=spread.layout.num_replicas,
        memory=wanted.memory,
        device_bytes=wanted.memory.device_bytes,
        anonymous_bytes=wanted.memory.anonymous_bytes,
        host_bytes=wanted.memory.host_bytes(machine.ranks_per_host),
        machine=machine,
        tflops=tflops,
        compute_seconds=compute,
        stream_seconds=stream,
        fits=tuple(
            (f.spread.name, f.memory.device_bytes, f.memory.host_bytes(machine.ranks_per_host), f.tokens_per_batch)
            for f in others
        ),
        advice="" if wanted.tokens_per_batch == config.tokens_per_batch else advice(work, spread, machine, others),
    )
    return report, wanted


def _refusal(config: PlanConfig, wanted: Fit, machine: Machine, instead: str) -> str:
    """One line: what does not fit into what, and what would."""
    memory = wanted.memory
    if machine.device_bytes is not None and memory.device_bytes > machine.device_bytes:
        what = f"--device-memory {config.device_memory}: expected room for {show_bytes(memory.device_bytes)} a rank"
        parts = memory.device
    else:
        needed = memory.host_bytes(machine.ranks_per_host)
        what = f"--host-memory {config.host_memory}: expected room for {show_bytes(needed)} on a machine"
        parts = {**memory.host, "mapped weights": memory.mapped}
    most = ", ".join(f"{name} {show_bytes(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1])[:2])
    return f"{what} under --sharding {wanted.spread.name} ({most}); {instead}"
