"""A plan in words and tables, for the terminal."""

from dataclasses import dataclass

from aura_dist.planning.budget import RankMemory
from aura_dist.planning.seconds import Reading, Schedule
from aura_dist.planning.work import Machine, StoreSize
from aura_dist.units import show_bytes


@dataclass(frozen=True)
class Report:
    """Every figure of a plan; bytes and seconds."""

    model: str
    kinds: dict[str, tuple[int, int]]  # kind of site → (number of modules, number of neurons), in the whole model
    captured: tuple[int, int]  # the same of what `--modules` chose
    uncaptured: int
    rows: str
    store: StoreSize
    rows_chunk: int
    columns_chunk: tuple[int, ...]
    num_tasks: int
    batches: Schedule
    longest: int
    tokens_per_batch: int
    layers: int
    weights_bytes: int
    sharding: str
    world_size: int
    num_replicas: int
    memory: RankMemory
    device_bytes: int  # of one GPU
    anonymous_bytes: int  # of one rank's anonymous memory on the host
    host_bytes: int  # of a machine and all its ranks
    machine: Machine
    tflops: float
    compute_seconds: float
    stream_seconds: float
    reading: Reading | None  # of weights, layer by layer
    layer_cache_bytes: int  # of all layers' copies on the disk of each machine
    gate_bytes: dict[str, int]  # `fit --gate` → of a thread that fits the largest gate from this store alone
    # (sharding, device bytes, host bytes of a machine, largest tokens per batch or None) of every strategy
    fits: tuple[tuple[str, int, int, int | None], ...]
    advice: str  # what to change; empty where the plan fits


def render(report: Report) -> str:
    """The plan as text."""
    blocks = (_model(report), _store(report), _work(report), _memory(report), _fits(report))
    return "\n\n".join(map("\n".join, blocks))


def _ranks(report: Report) -> str:
    return f"{report.world_size} rank{'s' if report.world_size > 1 else ''}"


def _model(report: Report) -> list[str]:
    lines = [f"model    {report.model}"]
    lines += [f"  {kind:<9} {n:>5,} modules {neurons:>12,} neurons" for kind, (n, neurons) in report.kinds.items()]
    lines.append(f"  {'captured':<9} {report.captured[0]:>5,} modules {report.captured[1]:>12,} neurons")
    if report.uncaptured:
        lines.append(f"  {report.uncaptured} expert parameters are in no module that can be captured")
    lines.append(f"  to be loaded: {report.layers} decoder layers, no head, {show_bytes(report.weights_bytes)}")
    return lines


def _store(report: Report) -> list[str]:
    store, columns = report.store, " or ".join(f"{c:,}" for c in report.columns_chunk)
    lines = [f"store    {store.num_rows:,} rows"]
    if store.num_arrays:
        lines[0] += (
            f" × {store.num_neurons:,} neurons, {store.num_arrays:,} arrays, "
            f"{store.num_chunks:,} chunks of {report.rows_chunk} rows × {columns} columns"
        )
    if store.num_tokens:
        lines.append(f"  values of {store.num_tokens:,} tokens at {store.token_neurons:,} neurons")
    return [
        *lines,
        f"  {show_bytes(store.raw_bytes)} raw, about {show_bytes(store.compressed_bytes)} on disk",
        f"  {store.num_files:,} files, and {store.score_files:,} of scores",
    ]


def _work(report: Report) -> list[str]:
    batches, seconds = report.batches, report.compute_seconds + report.stream_seconds
    lines = [
        f"work     {report.num_tasks:,} tasks, {batches.num_batches:,} batches, {batches.num_tokens:,} tokens "
        f"({batches.num_padded_tokens:,} with padding)",
        f"  rows: {report.rows}",
        f"  {batches.flops:.3g} FLOPs: {report.compute_seconds:,.0f} s at {report.tflops:g} TFLOP/s on each of "
        f"{_ranks(report)}",
    ]
    if report.reading is not None:
        read, times = report.reading, "once" if report.reading.num_waves == 1 else f"{report.reading.num_waves} times"
        lines.append(
            f"  meanwhile each rank reads the layers {times}, {show_bytes(read.num_bytes)} in {read.seconds:,.0f} s; "
            f"{seconds:,.0f} s in all"
        )
        if report.layer_cache_bytes:
            lines.append(f"  --layer-cache takes {show_bytes(report.layer_cache_bytes)} on the disk of each machine")
    elif report.stream_seconds:
        lines.append(f"  offloaded weights brought in: {report.stream_seconds:,.0f} s more; {seconds:,.0f} s in all")
    return lines


def _memory(report: Report) -> list[str]:
    memory, replicas = report.memory, report.num_replicas
    lines = [
        f"memory   of one rank, {report.sharding} on {_ranks(report)}"
        f" ({replicas} replica{'s' if replicas > 1 else ''}), {report.tokens_per_batch:,} tokens a batch"
    ]
    for place, parts in (("GPU", memory.device), ("host", memory.host)):
        if parts:
            shown = ", ".join(f"{purpose} {show_bytes(size)}" for purpose, size in parts.items() if size)
            lines.append(f"  {place:<5} {show_bytes(sum(parts.values())):>8}: {shown}")
    peak, before = show_bytes(report.anonymous_bytes), show_bytes(memory.preparing)
    lines.append(f"  peak of anonymous memory {peak} ({before} while texts are read)")
    if memory.mapped:
        lines.append(f"  and weights of {show_bytes(memory.mapped)} read from their files through the page cache")
    if memory.disk:
        lines.append(f"  and {show_bytes(memory.disk)} offloaded to the disk")
    lines += [
        f"  later `fit --gate {kind}`: {show_bytes(size)} a thread, and more with --control"
        for kind, size in report.gate_bytes.items()
    ]
    return lines


def _fits(report: Report) -> list[str]:
    limits = [
        f"{show_bytes(size)} {what}"
        for size, what in ((report.machine.device_bytes, "a GPU"), (report.machine.host_bytes, "a machine"))
        if size is not None
    ]
    lines = [f"what fits {_ranks(report)}" + (f" of {', '.join(limits)}" if limits else " (no limit given)")]
    for name, device, host, largest in report.fits:
        sizes = (f"{show_bytes(device):>8} a GPU, " if report.machine.gpu else "") + f"{show_bytes(host):>8} a machine"
        verdict = "does not fit" if largest is None else f"fits, up to {largest:,} tokens a batch"
        lines.append(f"  {name:<20} {sizes}: {verdict}")
    return lines


def refusal(report: Report, device_memory: str | None, host_memory: str | None) -> str:
    """One line: what does not fit into the memory that the flags say, and what would; empty if all fits."""
    memory, machine = report.memory, report.machine
    if not report.advice:
        return ""
    if machine.device_bytes is not None and memory.device_bytes > machine.device_bytes:
        what = f"--device-memory {device_memory}: expected room for {show_bytes(memory.device_bytes)} a rank"
        parts = memory.device
    else:
        what = f"--host-memory {host_memory}: expected room for {show_bytes(report.host_bytes)} on a machine"
        parts = {**memory.host, "mapped weights": memory.mapped}
    most = ", ".join(f"{name} {show_bytes(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1])[:2])
    return f"{what} under --sharding {report.sharding} ({most}); {report.advice}"
