"""Poolings that a finished store lacks, made from the tokens that it keeps, as `collect` makes them, bit for bit.

A batch of the store has its tokens' values laid out as its forward had them, and the same functions pool them. Sums on
a GPU add in another order, so poolings that add may differ from those in the last bit.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor

from aura_dist.models.load import DTYPES
from aura_dist.sites.kinds import KINDS
from aura_dist.sites.pooling import POOLINGS, TokenMask
from aura_dist.sites.routed import Routed
from aura_dist.sites.site import Site
from aura_dist.store.access import get_array, get_sharded
from aura_dist.store.consolidated import forget_consolidated
from aura_dist.store.grid import make_batches, rows_per_chunk
from aura_dist.store.schema import (
    ArrayLayout,
    StoreSpec,
    activation_path,
    create_arrays,
    first_token_path,
    response_layouts,
    stored_dtype,
)
from aura_dist.store.shards import Write, shard_writes
from aura_dist.store.tokens import StoredTokens, TokenValues
from aura_dist.store.zarr_adapter import run_in_zarr

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Batch:
    rows: slice
    tokens: slice  # of all tokens
    there_BT: Tensor  # whether a place holds a token
    mask: TokenMask


def repool(group: zarr.Group, spec: StoreSpec, poolings: Sequence[str]) -> None:
    """Make poolings of all sites of a finished store from its tokens, in place of those that were made before.

    All sites must have tokens. The attribute `repooled` names a pooling once all of it is written. StoreError if a
    shard of tokens is missing or damaged.
    """
    begun, tokens = time.perf_counter(), StoredTokens.of(group)
    num_tokens = np.diff(tokens.offset).tolist()
    chunks = list(_row_chunks(tokens, num_tokens, spec.tokens_per_batch))
    forget_consolidated(group)
    create_arrays(group, response_layouts(spec.sites, poolings, spec.dtype, len(num_tokens)))
    for pooling in poolings:
        counts_D = np.concatenate([_pool(group, spec, site, pooling, tokens, chunks) for site in spec.sites])
        if POOLINGS[pooling].of_token and not spec.skip_first_tokens:
            _write_counts(group, first_token_path(pooling), counts_D)
        before: Any = group.attrs.get("repooled", [])
        group.attrs["repooled"] = list(dict.fromkeys([*before, pooling]))
    logger.info(
        "made %s from %d tokens of %d modules in %.1f s",
        ", ".join(poolings), tokens.num_tokens, len(spec.sites), time.perf_counter() - begun,
    )  # fmt: skip


def _write_counts(group: zarr.Group, path: str, counts_D: NDArray[np.uint32]) -> None:
    create_arrays(group, {path: ArrayLayout(counts_D.shape, counts_D.shape, "uint32", ("unit",), 0)})
    get_array(group, path)[...] = counts_D


def _row_chunks(tokens: StoredTokens, num_tokens: Sequence[int], tokens_per_batch: int) -> Iterator[list[_Batch]]:
    """The batches of each row chunk, those of the store."""
    counted, size = tokens.field("counted").astype(np.bool_), rows_per_chunk(len(num_tokens))
    for start in range(0, len(num_tokens), size):
        rows_of = make_batches(num_tokens, slice(start, min(start + size, len(num_tokens))), tokens_per_batch)
        yield [_batch(tokens, num_tokens, counted, rows) for rows in rows_of]


def _batch(tokens: StoredTokens, num_tokens: Sequence[int], counted: NDArray[np.bool_], rows: slice) -> _Batch:
    within = slice(int(tokens.offset[rows.start]), int(tokens.offset[rows.stop]))
    there_BT = np.arange(num_tokens[rows.stop - 1]) < np.array(num_tokens[rows])[:, None]
    mask_BT = np.zeros_like(there_BT)
    mask_BT[there_BT] = counted[within]
    ids_BT = np.zeros(there_BT.shape, np.int32)
    ids_BT[there_BT] = tokens.field("input_ids")[within]
    return _Batch(rows, within, torch.from_numpy(there_BT), TokenMask.build(mask_BT, "cpu", ids_BT))


def _pool(
    group: zarr.Group, spec: StoreSpec, site: Site, pooling: str, tokens: StoredTokens, chunks: Sequence[list[_Batch]]
) -> NDArray[np.uint32]:
    """Write a site's pooled values; returns [D] in how many rows they are the first token's."""
    array, values = get_sharded(group, activation_path(site.name, pooling)), tokens.values(site.name)
    how, counts_D = POOLINGS[pooling], np.zeros(site.width, np.uint32)
    for batches in chunks:
        rows = slice(batches[0].rows.start, batches[-1].rows.stop)
        pooled_ND = torch.empty((rows.stop - rows.start, site.width), dtype=DTYPES[stored_dtype(pooling, spec.dtype)])
        for batch in batches:
            acts = _acts(values, batch, DTYPES[spec.dtype], dense=KINDS[site.kind].whole_tokens)
            pooled_BD = how.pool(batch.mask, acts)
            pooled_ND[batch.rows.start - rows.start : batch.rows.stop - rows.start] = pooled_BD
            if how.of_token:
                counts_D += batch.mask.count_first(pooled_BD, acts, how.of_token)[0].numpy().astype(np.uint32)
        run_in_zarr(_all(list(shard_writes(array, (rows.start, 0), pooled_ND.numpy()))))
    return counts_D


def _acts(values: TokenValues, batch: _Batch, dtype: torch.dtype, *, dense: bool) -> Tensor | Routed:
    """The values of a batch in the dtype of its forward, as it had them: as rows of one expert where not `dense`."""
    stored = torch.from_numpy(values.stored(batch.tokens))
    acts_BTD = torch.zeros((*batch.there_BT.shape, stored.shape[1]), dtype=dtype)
    acts_BTD[batch.there_BT] = stored.view(dtype)
    if dense:
        return acts_BTD
    num_tokens = batch.there_BT.numel()
    token_S = torch.arange(num_tokens)
    return Routed(acts_BTD.view(num_tokens, -1), token_S, torch.zeros_like(token_S), 1, num_tokens)


async def _all(writes: Sequence[Write]) -> None:
    await asyncio.gather(*(write() for write in writes))
