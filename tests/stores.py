"""Synthetic stores, written as `collect` writes them but without a model: known values, any size."""

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import zarr

from aura_dist.sites.site import Site
from aura_dist.store.access import get_array, open_group
from aura_dist.store.record import commit
from aura_dist.store.schema import Samples, StoreSpec, activation_path, create_store, tasks_of
from aura_dist.store.shards import shard_writes
from aura_dist.store.zarr_adapter import run_in_zarr

TOKENS_PER_BATCH = 256


def make_spec(widths: Sequence[int], concepts: Sequence[str], dtype: str = "float32") -> StoreSpec:
    return StoreSpec(
        model={"name": "synthetic", "revision": None, "class": "none", "fingerprint": "0"},
        tokenizer={"name": "synthetic", "sha256": "0"},
        dtype=dtype,
        max_tokens=128,
        tokens_per_batch=TOKENS_PER_BATCH,
        skip_special_tokens=False,
        poolings=("max",),
        concepts=tuple(concepts),
        data={"path": "synthetic", "sha256": "0"},
        sites=tuple(Site(f"layers.{i}.up", "mlp", i, width) for i, width in enumerate(widths)),
    )


def make_labels(rng: np.random.Generator, num_rows: int, num_concepts: int) -> np.ndarray:
    """int8 [N, C]: one in five positive; from the second concept on, one in ten is not labelled."""
    label = (rng.random((num_rows, num_concepts)) < 0.2).astype(np.int8)
    label[:, 1:][rng.random((num_rows, num_concepts - 1)) < 0.1] = -1
    label[rng.permutation(num_rows)[:2]] = [[0], [1]]
    return label


def write_responses(array: zarr.Array, values: np.ndarray) -> None:
    """Write the first rows of a site's responses, whole row chunks or all, as the product does."""
    rows = array.shards[0]
    for start in range(0, len(values), rows):
        for write in shard_writes(array, (start, 0), values[start : start + rows]):
            run_in_zarr(write())


def make_store(
    path: Path,
    num_rows: int,
    widths: Sequence[int],
    concepts: Sequence[str] = ("toxic",),
    *,
    dtype: str = "float32",
    bfloat16: bool = True,
    num_unfinished: int = 0,
) -> Path:
    """A store of normal responses, a tenth of the neurons moved by the first concept; the last tasks can be missing."""
    rng = np.random.default_rng(0)
    tokens = np.sort(rng.integers(4, 64, num_rows)).astype(np.int32)
    samples = Samples(np.arange(num_rows), tokens, make_labels(rng, num_rows, len(concepts)))
    spec = make_spec(widths, concepts, dtype)
    create_store(str(path), spec, samples, {})
    group = open_group(str(path))
    tasks = tasks_of(tokens, TOKENS_PER_BATCH)
    there = tasks[len(tasks) - num_unfinished].start if num_unfinished else num_rows
    for site in spec.sites:
        array = get_array(group, activation_path(site.name, "max"))
        values = np.empty((num_rows, site.width), array.dtype)
        for first in range(0, site.width, array.chunks[1]):
            width = min(array.chunks[1], site.width - first)
            part = rng.standard_normal((num_rows, width), np.float32)
            part += (rng.random(width) < 0.1) * 0.5 * (samples.label[:, :1] == 1)
            values[:, first : first + width] = part.astype(ml_dtypes.bfloat16) if bfloat16 else part
        write_responses(array, values[:there])
    for task in tasks[: len(tasks) - num_unfinished]:
        commit(group, task.index, {})
    return path
