"""A model's configuration and the rows' lengths → the work of a collection, as `planning/budget.py` takes it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedModel

from aura_dist.errors import ModelError
from aura_dist.models.load import DTYPES, ModelSource, check_positions, skeleton
from aura_dist.models.strategies.tensor_plan import Plan, seen_columns, tensor_plan
from aura_dist.planning.sizes import is_mapped, prepare, tokenizer_bytes, weight_sizes
from aura_dist.planning.trace import forward_cost
from aura_dist.planning.work import Work
from aura_dist.sites.find import SiteTable, find_sites, tap_of
from aura_dist.sites.pooling import POOLINGS
from aura_dist.sites.site import Site
from aura_dist.store.grid import columns_per_chunk, rows_per_chunk
from aura_dist.store.schema import stored_dtype


@dataclass(frozen=True)
class Estimate:
    """What a collection will do, found without weights.

    Attributes
    ----------
    table, sites
        All sites of the model, and the captured ones.
    precisions
        The dtype that a pooled value has, by pooling: a mean is a float32 number, the others are the layer's own.
    splits
        Whether tensor parallelism can split the decoder layers.
    work
        Sizes and costs, whatever the sharding.
    """

    table: SiteTable
    sites: tuple[Site, ...]
    precisions: tuple[str, ...]
    splits: bool
    work: Work


def estimate(
    source: ModelSource,
    config: PretrainedConfig,
    modules: Sequence[str],
    poolings: Sequence[str],
    num_tokens: NDArray[np.int32],
    tokens_per_batch: int,
    *,
    shortest: int,
    data_bytes: int,
    gpu: bool,
    tensor_ranks: int = 1,
    plan_file: str | None = None,
) -> Estimate:
    """The estimate of a collection of rows of `num_tokens` tokens (ascending), of which `shortest` bounds the least.

    With `tensor_ranks` above 1 the columns will be split over them, by the user's `plan_file` if there is one.

    Raises
    ------
    ConfigError
        Texts are longer than the model's positions.
    ModelError
        `modules` match nothing, tensor parallelism is asked for and cannot split them, or the forward cannot be traced.
    """
    num_rows, longest = len(num_tokens), int(num_tokens[-1])
    check_positions(config, longest, "--max-tokens")
    model = skeleton(config)
    table = find_sites(model)
    sites = table.select(modules)
    split = _tensor_plan(model, sites, tensor_ranks, plan_file)
    prepare(model, 1 + max(s.layer for s in sites), source.dtype)
    stored = [np.dtype(stored_dtype(p, source.dtype)).itemsize for p in poolings]
    precisions = tuple(source.dtype if POOLINGS[p].selects else "float32" for p in poolings)
    weights = weight_sizes(model, split)
    work = Work(
        weights=weights,
        forward=forward_cost(model, sites, poolings, longest, on_cpu=not gpu),
        neurons=tuple((s.width, columns_per_chunk(s.width, num_rows, max(stored))) for s in sites),
        stored_bytes=sum(stored),
        pooled_bytes=sum(DTYPES[p].itemsize for p in precisions),
        rows_chunk=rows_per_chunk(num_rows),
        shortest=shortest,
        longest=longest,
        tokens_per_batch=tokens_per_batch,
        tokenizer_bytes=tokenizer_bytes(source),
        data_bytes=data_bytes,
        mapped=not gpu and is_mapped(model, source),
    )
    return Estimate(table, sites, precisions, any(part for _, part in weights.layers), work)


def _tensor_plan(model: PreTrainedModel, sites: Sequence[Site], num_ranks: int, file: str | None) -> Plan:
    """The plan by which columns are split, or would be: none where there is none, if no ranks are to share them."""
    if num_ranks == 1 and file is None:
        try:
            return tensor_plan(model, 2)
        except ModelError:
            return {}
    plan = tensor_plan(model, max(num_ranks, 2), file)
    for site in sites:
        seen_columns(plan, tap_of(model, site), num_ranks)
    return plan
