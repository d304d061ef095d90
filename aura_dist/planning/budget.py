"""Bytes of a collection before it is run: what every rank holds in device and host memory, under any layout.

Pure functions of numbers. What is added up:

- *weights*: the base model to the last captured layer, split as the strategy splits it, and what it gathers at once;
- *activations*: of the largest batch (`ForwardCost`), and every neuron's pooled value for its rows;
- *queue*: row buffers of `NUM_BUFFERS` row chunks of the neurons that the rank writes, and one more being encoded;
- *runtime*: interpreter, libraries, and what a GPU's context takes (constants below);
- *texts*: before the weights are read, the tokenizer and the table of texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from aura_dist.planning.work import Machine, Spread, Tier, Work
from aura_dist.ranks.layout import Layout
from aura_dist.sites.ownership import plan_columns, split_columns

NUM_BUFFERS = 3

# measured on Linux, CPython 3.11, torch 2.13, as anonymous memory: interpreter, libraries, stacks, the heap's slack
RUNTIME_BYTES = 500_000_000
# what CUDA adds on the host, and context, kernels and cuBLAS workspace on the GPU: assumed, not measured here
CUDA_HOST_BYTES = 2_000_000_000
CUDA_DEVICE_BYTES = 1_200_000_000
# a caching allocator's blocks are rounded and split: assumed, not measured here
CUDA_SLACK = 1.1
# blocks that a CPU's forward has freed stay in the heap beside larger ones, which are mapped: measured, up to 1.45
CPU_SLACK = 1.6
# a fast tokenizer's tables, built from its file; texts as Python strings with their ids
TOKENIZER_BYTES_PER_FILE_BYTE = 18
TABLE_BYTES_PER_FILE_BYTE = 10


@dataclass(frozen=True)
class RankMemory:
    """Most that one rank holds, in bytes by purpose.

    `device` is the GPU's memory (empty on a CPU, where all is in `host`); `host` is anonymous memory while texts
    run; `preparing` is anonymous memory before the weights are read; `mapped` lies in files, read through the page
    cache; `disk` is what is offloaded to a disk; `streamed` is read again for every batch.
    """

    device: dict[str, int]
    host: dict[str, int]
    preparing: int
    mapped: int = 0
    disk: int = 0
    streamed: int = 0

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def anonymous_bytes(self) -> int:
        """Peak of the host's anonymous memory."""
        return max(sum(self.host.values()), self.preparing)

    def host_bytes(self, num_ranks: int) -> int:
        """What `num_ranks` ranks of a machine need: anonymous memory, and the mapped weights, which they share."""
        return max(num_ranks * sum(self.host.values()) + self.mapped, num_ranks * self.preparing)

    def fits(self, machine: Machine) -> bool:
        device = machine.device_bytes is None or self.device_bytes <= machine.device_bytes
        return device and (machine.host_bytes is None or self.host_bytes(machine.ranks_per_host) <= machine.host_bytes)


def rank_memory(work: Work, spread: Spread, machine: Machine) -> RankMemory:
    """What the rank that holds most holds.

    Weights on a rank: `replicate` all; `fsdp` and `zero3` a share of each tensor, and at any moment what stands
    outside the layers and two layers gathered whole; `tensor` its part of the split tensors; `dispatch` what is
    placed, and the largest layer that is brought in.
    """
    placed, gathered, away = _weights(work, spread, machine)
    activations = _activations(work, spread)
    queue = (NUM_BUFFERS + 1) * work.rows_chunk * owned_neurons(work.neurons, spread.layout.tensor) * work.stored_bytes
    runtime = RUNTIME_BYTES + (CUDA_HOST_BYTES if machine.gpu else 0)
    preparing = runtime + TOKENIZER_BYTES_PER_FILE_BYTE * work.tokenizer_bytes
    preparing += TABLE_BYTES_PER_FILE_BYTE * work.data_bytes
    texts = TABLE_BYTES_PER_FILE_BYTE * work.data_bytes
    host = {"runtime": runtime, "texts": texts, "queue": queue, "offloaded weights": away.get("cpu", 0)}
    device = {"weights": placed, "gathered weights": gathered, "activations": activations}
    mapped = 0
    if machine.gpu:
        device = {**device, "activations": ceil(CUDA_SLACK * activations), "runtime": CUDA_DEVICE_BYTES}
    else:
        device["activations"] = ceil(CPU_SLACK * activations)
        if work.mapped and spread.layout.strategy == "replicate":
            mapped, device["weights"] = placed, 0
        host, device = {**host, **device}, {}
    host = {purpose: size for purpose, size in host.items() if size}
    return RankMemory(device, host, preparing, mapped, away.get("disk", 0), sum(away.values()))


def owned_neurons(neurons: Sequence[tuple[int, int]], num_ranks: int) -> int:
    """Neurons that the rank with most writes, whether each site's output is split or replicated over the ranks."""
    known: dict[tuple[int, int], int] = {}
    for width, chunk in set(neurons):
        if num_ranks == 1:
            known[width, chunk] = width
            continue
        whole: list[tuple[tuple[int, int], ...]] = [((0, width),)] * num_ranks
        plans = [*plan_columns(width, chunk, split_columns(width, num_ranks)), *plan_columns(width, chunk, whole)]
        known[width, chunk] = max(plan.num_owned for plan in plans)
    return sum(known[site] for site in neurons)


def _weights(work: Work, spread: Spread, machine: Machine) -> tuple[int, int, dict[str, int]]:
    """(placed on the device, gathered there for a while, place → bytes kept elsewhere)."""
    layout = spread.layout
    if spread.layout.strategy == "dispatch":
        return _dispatched(work, spread, machine)
    outside, layers = work.weights.per_tensor_rank(layout.tensor)
    total = outside + sum(layers)
    if layout.fsdp == 1 and layout.strategy != "zero3":
        return total, 0, {}
    gathered = outside + sum(sorted(layers)[-2:])
    share = ceil(total / layout.fsdp)
    if spread.offload == "none":
        return share, gathered, {}
    return 0, gathered, {"cpu" if spread.offload == "cpu" else "disk": share}


def _dispatched(work: Work, spread: Spread, machine: Machine) -> tuple[int, int, dict[str, int]]:
    """Layers in order onto the tiers; while not all fit the first, it keeps room for the largest layer brought in."""
    outside, layers = work.weights.per_tensor_rank(1)
    largest = max(outside, *layers)
    tiers = spread.tiers or default_tiers(work, machine)
    if tiers[0].limit_bytes is None or outside + sum(layers) <= tiers[0].limit_bytes:
        held = place((outside, *layers), tiers)
    else:
        held = place((outside, *layers), (replace(tiers[0], limit_bytes=tiers[0].limit_bytes - largest), *tiers[1:]))
    away = {name: size for name, size in held.items() if name == "disk" or (name == "cpu" and machine.gpu)}
    on_devices = [size for name, size in held.items() if name not in away]
    brought_in = largest if any(away.values()) else 0
    return max(on_devices, default=0), brought_in, away


def default_tiers(work: Work, machine: Machine) -> tuple[Tier, ...]:
    """One GPU, the host and the disk, each with what activations, queue and runtime leave of it."""
    activations = _activations(work, Spread(Layout("dispatch")))
    queue = (NUM_BUFFERS + 1) * work.rows_chunk * work.num_neurons * work.stored_bytes
    texts = TABLE_BYTES_PER_FILE_BYTE * work.data_bytes
    host_free = None if machine.host_bytes is None else machine.host_bytes - RUNTIME_BYTES - queue - texts
    if not machine.gpu:
        return (
            Tier("cpu", None if host_free is None else max(0, host_free - ceil(CPU_SLACK * activations))),
            Tier("disk", None),
        )
    free = None
    if machine.device_bytes is not None:
        free = max(0, machine.device_bytes - CUDA_DEVICE_BYTES - ceil(CUDA_SLACK * activations))
    host_free = None if host_free is None else max(0, host_free - CUDA_HOST_BYTES)
    return (Tier("0", free), Tier("cpu", host_free), Tier("disk", None))


def place(blocks: Sequence[int], tiers: Sequence[Tier]) -> dict[str, int]:
    """Bytes on each tier when `blocks` fill the tiers in order, none divided and none put before its forerunner."""
    held, at = {tier.name: 0 for tier in tiers}, 0
    for block in blocks:
        while at < len(tiers) - 1 and not _has_room(tiers[at], held[tiers[at].name] + block):
            at += 1
        held[tiers[at].name] += block
    return held


def _has_room(tier: Tier, size: int) -> bool:
    return tier.limit_bytes is None or size <= tier.limit_bytes


def _activations(work: Work, spread: Spread) -> int:
    """Of the largest batch; under `tensor` taken as not divided, with two copies of the widest output on the way."""
    pooled = work.batch_rows * work.num_neurons * work.pooled_bytes
    exchange = 0
    if spread.layout.tensor > 1:
        exchange = 2 * work.batch_tokens * max(width for width, _ in work.neurons) * work.pooled_bytes
    return work.forward.peak_bytes(work.batch_rows, work.longest, work.batch_tokens) + pooled + exchange
