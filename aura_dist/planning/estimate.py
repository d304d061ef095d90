"""A model's configuration and the lengths of texts → what a collection or an evaluation takes; no weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import Conv1D, DynamicCache, PretrainedConfig, PreTrainedModel

from aura_dist.errors import ModelError
from aura_dist.evaluation.cached import only_attention
from aura_dist.interventions.gate_fitting import fitting_bytes
from aura_dist.models.load import DTYPES, ModelSource, check_positions, skeleton
from aura_dist.models.quantization import bits, by_library, check_converts, converts, method_of
from aura_dist.models.strategies.strategy import Spread, WeightSizes
from aura_dist.models.strategies.table import STRATEGIES, title
from aura_dist.models.strategies.tensor_plan import Plan, seen_columns, tensor_plan
from aura_dist.planning.budget import advice, survey, what_fits
from aura_dist.planning.seconds import (
    READ_RATE,
    TFLOPS,
    USUAL_RATES,
    EvaluationPlan,
    LanguageModelCost,
    Rates,
    Step,
    reading,
    run_seconds,
    schedule,
)
from aura_dist.planning.text import Report
from aura_dist.planning.trace import forward_cost
from aura_dist.planning.work import TOKEN_BYTES, ForwardCost, Machine, StoreSize, Work, store_size, with_tokens
from aura_dist.scoring.scores import score_layout, score_path
from aura_dist.sites.find import SiteTable, decoder_layers_name, find_sites, tap_of
from aura_dist.sites.kinds import KINDS, choose_tokens
from aura_dist.sites.pooling import POOLINGS, TOKENS, poolings_of
from aura_dist.sites.site import Site
from aura_dist.sites.tap import generic
from aura_dist.sites.transformers_adapter import WHOLE_EXPERTS_WEIGHT
from aura_dist.store.grid import columns_per_chunk, columns_per_shard, rows_per_chunk
from aura_dist.store.schema import (
    num_files,
    progress_layouts,
    response_layouts,
    stored_dtype,
    tasks_of,
    token_layouts,
)

LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Estimate:
    """A collection, whatever its sharding."""

    source: ModelSource
    num_tokens: NDArray[np.int32]  # of the rows, ascending
    table: SiteTable  # all sites of the model
    sites: tuple[Site, ...]  # the captured ones
    poolings: tuple[str, ...]
    chunks: dict[int, int]  # width of a site → columns of a chunk
    quantization: str  # of the weights, for people; empty where they are floats
    precisions: tuple[str, ...]  # dtype of each pooling's values: the forward's, or float32 where values are averaged
    splits: bool  # whether tensor parallelism can split the decoder layers
    work: Work
    num_tasks: int
    token_sites: tuple[Site, ...] = ()  # whose values are stored token by token


def estimate(
    source: ModelSource,
    config: PretrainedConfig,
    modules: Sequence[str],
    kept: Sequence[str],
    num_tokens: NDArray[np.int32],
    tokens_per_batch: int,
    *,
    keep_tokens: Sequence[str] = (),
    shortest: int,
    data_bytes: int,
    gpu: bool,
    tensor_ranks: int = 1,
    plan_file: str | None = None,
) -> Estimate:
    """The estimate of a collection of rows of `num_tokens` tokens (ascending), none below `shortest`.

    `kept` and `keep_tokens` are the words of `--pooling` and `--keep-tokens`. Columns will be split over
    `tensor_ranks`, by the user's `plan_file` if there is one.

    ConfigError if texts are longer than the model's positions; ModelError if `modules` match nothing, tensor
    parallelism is wanted and cannot split them, or the forward cannot be traced.
    """
    num_rows, longest = len(num_tokens), int(num_tokens[-1])
    tokenizer = Path(source.name) / "tokenizer.json"  # of a local model
    check_positions(config, longest, "--max-tokens")
    model = skeleton(config, source)
    check_converts(source.quantization, model)
    table = find_sites(model)
    sites, poolings = table.select(modules), poolings_of(kept)
    token_sites = choose_tokens(sites, keep_tokens, every=TOKENS in kept)
    split = _tensor_plan(model, sites, tensor_ranks, plan_file)
    prepare(model, 1 + max(s.layer for s in sites), source.dtype)
    stored = [np.dtype(stored_dtype(p, source.dtype)).itemsize for p in poolings]
    precisions = tuple(source.dtype if POOLINGS[p].selects else "float32" for p in poolings)
    stored_bits = bits(source.quantization, config)
    weights = weight_sizes(model, split, source.quantization)
    forward = forward_cost(model, sites, poolings, longest, on_cpu=not gpu)
    item_bytes, rows_chunk = max(stored, default=1), rows_per_chunk(num_rows)
    widest = max((site.width for site in token_sites), default=0)
    chunks = {s.width: columns_per_chunk(s.width, num_rows, item_bytes) for s in sites}
    neurons = tuple((s.width, columns_per_shard(s.width, chunks[s.width], rows_chunk, item_bytes)) for s in sites)
    by_layer = [
        tuple(n for n, s in zip(neurons, sites, strict=True) if s.layer == at) for at in {s.layer for s in sites}
    ]
    work = Work(
        weights=weights,
        forward=forward if stored_bits is None else _unpacking(model, forward),
        quantised=by_library(source.quantization, config),
        neurons=neurons,
        layer_neurons=max(by_layer, key=lambda layer: sum(width for width, _ in layer)),
        hidden_bytes=int(num_tokens.sum()) * hidden_size(config) * DTYPES[source.dtype].itemsize,
        stored_bytes=sum(stored),
        pooled_bytes=sum(DTYPES[p].itemsize for p in precisions),
        rows_chunk=rows_chunk,
        shortest=shortest,
        longest=longest,
        tokens_per_batch=tokens_per_batch,
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer.is_file() else 0,
        data_bytes=data_bytes,
        mapped=not gpu and is_mapped(model, source),
        kept_bytes=widest * TOKEN_BYTES[source.dtype],
    )
    splits, quantization = any(part for _, part in weights.layers), source.quantization or method_of(config)
    num_tasks = len(tasks_of(num_tokens, tokens_per_batch))
    return Estimate(
        source, num_tokens, table, sites, poolings, chunks, quantization, precisions, splits, work, num_tasks,
        token_sites,
    )  # fmt: skip


def hidden_size(config: PretrainedConfig) -> int:
    """Width of the hidden states; 0 where the configuration does not say it."""
    return int(getattr(config.get_text_config(decoder=True), "hidden_size", 0))


def _unpacking(model: PreTrainedModel, forward: ForwardCost) -> ForwardCost:
    """The cost where linear layers hold their weights in fewer bits.

    At most, one layer's weights are float32 while it computes, and beside its output there are the integer products
    and two scaled copies of them.
    """
    linear = [m.weight for m in model.base_model.modules() if isinstance(m, LINEAR)]
    largest, widest = (max(sizes, default=0) for sizes in ([w.numel() for w in linear], [max(w.shape) for w in linear]))
    return replace(
        forward, constant_bytes=forward.constant_bytes + 4 * largest, token_bytes=forward.token_bytes + 12 * widest
    )


def _tensor_plan(model: PreTrainedModel, sites: Sequence[Site], num_ranks: int, file: str | None) -> Plan:
    """The plan by which columns are split; for one rank, the plan of two ranks, empty where there is none."""
    if num_ranks == 1 and file is None:
        try:
            return tensor_plan(model, 2)
        except ModelError:
            return {}
    plan = tensor_plan(model, max(num_ranks, 2), file)
    for site in sites:
        seen_columns(plan, tap_of(model, site), num_ranks)
    return plan


def prepare(model: PreTrainedModel, num_layers: int, dtype: str) -> PreTrainedModel:
    """`model` (on the meta device) as `load_base` makes it: its first `num_layers` layers, in its dtype, frozen."""
    layers = model.get_submodule(decoder_layers_name(model))
    assert isinstance(layers, nn.ModuleList)
    del layers[num_layers:]
    return model.to(dtype=DTYPES[dtype]).eval().requires_grad_(False)


def is_split(plan: Plan, name: str) -> bool:
    """Whether tensor parallelism under `plan` splits the weight `name`; found as transformers finds it."""
    module, _, kind = generic(name).rpartition(".")
    style = plan.get(generic(name), plan.get(module, "replicate"))
    by_rows = style.startswith("rowwise") and kind == "bias"  # added once, after the sum over the ranks
    return ("wise" in style or "packed" in style or style == WHOLE_EXPERTS_WEIGHT) and not by_rows


def weight_sizes(model: PreTrainedModel, plan: Plan, quantization: str | None = None) -> WeightSizes:
    """Bytes of a prepared model's base: weights and buffers, by decoder layer, kept whole or split under `plan`.

    Weights that are stored in fewer bits, by `quantization` or in the checkpoint already, take as many.
    """
    stored_bits, fewer = bits(quantization, model.config), converts(quantization, model.config)
    layers_name = decoder_layers_name(model)
    base = model.base_model
    prefix = f"{model.base_model_prefix}." if base is not model else ""
    layers = [[0, 0] for _ in range(len(model.get_submodule(layers_name)))]
    outside = [0, 0]
    linear = {f"{n}.weight" for n, m in base.named_modules() if stored_bits is not None and fewer(type(m))}
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        within = (prefix + name).removeprefix(f"{layers_name}.")
        place = layers[int(within.partition(".")[0])] if within != prefix + name else outside
        size = ceil(tensor.numel() * (stored_bits or 0) / 8) if name in linear else tensor.nbytes
        place[int(is_split(plan, prefix + name))] += size
    return WeightSizes(tuple((a, b) for a, b in layers), (outside[0], outside[1]))


def is_mapped(model: PreTrainedModel, source: ModelSource) -> bool:
    """Whether a CPU can use the weights in their files: in a local safetensors checkpoint of the same dtype.

    Not where there is a mixture of experts, because transformers copies their weights into one tensor at load, nor
    with an adapter or quantised weights.
    """
    saved = getattr(model.config.get_text_config(decoder=True), "dtype", None)
    merged = any(p.ndim == 3 for p in model.parameters())
    merged = merged or source.adapter is not None or source.quantization is not None or bool(method_of(model.config))
    return saved == DTYPES[source.dtype] and not merged and any(Path(source.name).glob("*.safetensors"))


def collection_report(
    found: Estimate,
    origin: str,
    spread: Spread,
    machine: Machine,
    tflops: float | None = None,
    rates: Rates = USUAL_RATES,
    *,
    first_tokens: bool = True,
) -> Report:
    """All figures of a collection under `spread`, with advice if it does not fit.

    The rows come from `origin`; `first_tokens` says whether the store counts these. Each rank computes `tflops`
    TFLOP/s, by default as many as a usual rank.
    """
    work, num_tokens, world_size = found.work, found.num_tokens, spread.layout.world_size
    wanted = what_fits(work, spread, machine)
    others = survey(work, world_size, machine, splits=found.splits)
    batches = schedule(num_tokens.tolist(), work.rows_chunk, work.tokens_per_batch, work.forward)
    tflops = tflops or TFLOPS[machine.gpu, DTYPES[found.source.dtype].itemsize]
    compute, stream = run_seconds(batches, spread.layout, wanted.memory, tflops, rates)
    read = None
    if STRATEGIES[spread.layout.strategy].by_layer:
        read = reading(batches, spread.layout, wanted.memory, spread.options.get("wave_tokens"), rates)
        stream = max(0.0, read.seconds - compute)
    by_kind = {k: [s.width for s in found.table.sites if s.kind == k] for k in KINDS}
    widths = [s.width for s in found.sites]
    about = (found.table.model_class, found.source.dtype, found.quantization)
    return Report(
        model=f"{found.source.name} ({', '.join(filter(None, about))})",
        kinds={kind: (len(w), sum(w)) for kind, w in by_kind.items()},
        captured=(len(widths), sum(widths)),
        uncaptured=len(found.table.experts),
        rows=origin,
        store=_store_size(found, spread.layout.tensor, first_tokens=first_tokens),
        rows_chunk=work.rows_chunk,
        columns_chunk=tuple(sorted(set(found.chunks.values()))),
        num_tasks=found.num_tasks,
        batches=batches,
        longest=work.longest,
        tokens_per_batch=work.tokens_per_batch,
        layers=len(work.weights.layers),
        weights_bytes=work.weights.total_bytes,
        sharding=title(spread),
        world_size=world_size,
        num_replicas=spread.layout.num_replicas,
        memory=wanted.memory,
        device_bytes=wanted.memory.device_bytes,
        anonymous_bytes=wanted.memory.anonymous_bytes,
        host_bytes=wanted.memory.host_bytes(machine.ranks_per_host),
        machine=machine,
        tflops=tflops,
        compute_seconds=compute,
        stream_seconds=stream,
        reading=read,
        layer_cache_bytes=wanted.memory.streamed if spread.options.get("layer_cache") else 0,
        gate_bytes=fitting_bytes(found.sites, found.poolings, len(num_tokens)),
        fits=tuple(
            (title(f.spread), f.memory.device_bytes, f.memory.host_bytes(machine.ranks_per_host), f.tokens_per_batch)
            for f in others
        ),
        advice="" if wanted.tokens_per_batch == work.tokens_per_batch else advice(work, spread, machine, others),
    )


def _store_size(found: Estimate, num_ranks: int, *, first_tokens: bool) -> StoreSize:
    """Size of the store and its files, where `num_ranks` ranks share the columns."""
    sites, poolings, num_rows = found.sites, found.poolings, len(found.num_tokens)
    size = store_size(num_rows, found.work.rows_chunk, [site.width for site in sites], found.precisions)
    size = with_tokens(size, int(found.num_tokens.sum()), sum(s.width for s in found.token_sites), found.source.dtype)
    arrays = response_layouts(sites, poolings, found.source.dtype, num_rows)
    kept = len(found.token_sites)
    arrays |= progress_layouts(
        sites, poolings, (num_rows, 1), found.num_tasks, first_tokens=first_tokens, num_token_sites=kept
    )
    if found.token_sites:
        num_tokens, per_batch = found.num_tokens.tolist(), found.work.tokens_per_batch
        arrays |= token_layouts(found.token_sites, found.source.dtype, num_tokens, per_batch)
    scores = {
        score_path(site.name, pooling): score_layout(1, site.width, found.chunks[site.width])
        for site in sites
        for pooling in poolings
    }
    return replace(size, num_files=1 + num_files(arrays, num_ranks), score_files=num_files(scores))


def estimate_evaluation(
    model: PreTrainedModel,
    dtype: str,
    steps: Sequence[Step],
    tflops: float | None,
    *,
    gpu: bool,
    left_out: Sequence[str] = (),
) -> EvaluationPlan:
    """What an evaluation of `model` (on the meta device) takes: all `steps`, which the ranks share.

    The scorer, sampling, loading, communication and what `left_out` names are not counted. A model without a cache of
    keys and values computes earlier tokens again at every step; that is not counted either, and the plan says so.
    """
    longest = max((step.num_new for step in steps), default=1)
    selects = only_attention(DynamicCache(config=model.config))
    cost = model_cost(model, dtype, longest)
    rate = tflops or TFLOPS[gpu, DTYPES[dtype].itemsize]
    return EvaluationPlan(
        seconds=sum(cost.seconds(step, rate, READ_RATE[gpu]) for step in steps),
        flops=sum(map(cost.flops, steps)),
        gpu=gpu,
        left_out=" and ".join([*left_out, *([] if selects else ["what has no cache"])]),
    )


def model_cost(model: PreTrainedModel, dtype: str, longest: int) -> LanguageModelCost:
    """Cost of a model on the meta device, for texts of at most `longest` tokens."""
    head = model.get_output_embeddings().weight
    prepare(model, model.config.get_text_config(decoder=True).num_hidden_layers, dtype)
    sizes = weight_sizes(model, {})
    read_bytes = sum(map(sum, sizes.layers)) + head.numel() * DTYPES[dtype].itemsize
    return LanguageModelCost(forward_cost(model, [], [], max(2, longest)), 2.0 * head.numel(), read_bytes)
