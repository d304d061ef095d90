"""A store as xarray sees it: labelled dimensions, lazy values, nothing loaded until it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.errors import InputError
from aura_dist.scoring.scores import StoredStatistic, score_attributes, scored_statistics, stored_statistic
from aura_dist.sites.pooling import TOKENS
from aura_dist.store.access import get_array, open_group, read_array, read_region
from aura_dist.store.schema import TOKEN_FIELDS, StoreSpec, activation_path
from aura_dist.store.tokens import StoredTokens, TokenValues

if TYPE_CHECKING:
    import xarray as xr

_TOKENS_AT_ONCE = 256


def open_store(path: str | Path) -> xr.DataTree:
    """Open a store as an xarray `DataTree` of the store's own shape.

    - `tree["samples"]`: `row`, `num_tokens` [sample] and `label` [sample, concept]
    - `tree["activations"][site]`: one variable a pooling, [sample, neuron], with the coordinates `site`, `row`,
      `tokens` (also as `num_tokens`), `unit` (also as `neuron`); lazy (dask)
    - where every token's values are stored, `tree["activations"][site]["tokens"]`: these, [token, neuron], float32 for
      bfloat16 models; the number of tokens is `num_tokens` alone then. `tree["tokens"]`: `input_ids`, `sample` (the
      text's place in the store), `position` and `counted` (whether poolings count it) [token];
      `tree["samples"]["offset"]`: text i has the tokens [offset[i], offset[i + 1])
    - `tree["scores"][site][pooling]`: one variable a statistic that has been computed for every neuron,
      [concept, neuron], with the coordinates `site`, `concept`, `unit` (also as `neuron`); the attributes of
      `tree["scores"]` say of how many rows, and whether that is `partial`

    The attributes hold the model, the data, the settings and the versions. Responses that are not
    collected yet read as NaN.

    StoreError if there is no store at `path`.
    """
    import xarray as xr

    group = open_group(str(path))
    spec = StoreSpec.of(group)
    dims = {"row": ("sample",), "num_tokens": ("sample",), "label": ("sample", "concept")}
    samples = xr.Dataset(
        {name: (of, read_array(group, f"samples/{name}")) for name, of in dims.items()},
        coords={"concept": list(spec.concepts)},
    )
    rows = {"row": samples["row"].values, "tokens": samples["num_tokens"].values}
    by_sample = {name: ("sample", values) for name, values in (*rows.items(), ("num_tokens", rows["tokens"]))}
    nodes: dict[str, xr.Dataset] = {"/": xr.Dataset(attrs=dict(group.attrs)), "/samples": samples}
    tokens = StoredTokens.of(group) if spec.tokens else None
    if tokens is not None:
        samples["offset"] = ("boundary", tokens.offset)
        nodes["/tokens"] = xr.Dataset({name: ("token", tokens.field(name)) for name in TOKEN_FIELDS})
    if attributes := score_attributes(group):
        nodes["/scores"] = xr.Dataset(attrs=attributes)
    for site in spec.sites:
        units = np.arange(site.width)
        of_site = {"site": site.name, "neuron": units, "unit": ("neuron", units)}
        variables = {p: (("sample", "neuron"), _responses(group, activation_path(site.name, p))) for p in spec.poolings}
        of_samples = dict(by_sample)
        if tokens is not None and site.name in spec.tokens:
            del of_samples[TOKENS]
            variables[TOKENS] = (("token", "neuron"), _token_values(tokens.values(site.name)))
        nodes[f"/activations/{site.name}"] = xr.Dataset(
            variables,
            coords={**of_samples, **of_site},
            attrs={"kind": site.kind, "layer": site.layer},
        )
        for pooling in spec.poolings:
            names = scored_statistics(group, site.name, pooling)
            if names:
                lazy = {s: _statistic(stored_statistic(group, site.name, pooling, s)) for s in names}
                nodes[f"/scores/{site.name}/{pooling}"] = xr.Dataset(
                    {s: (("concept", "neuron"), values) for s, values in lazy.items()},
                    coords={"concept": list(spec.concepts), **of_site},
                )
    tree = xr.DataTree.from_dict(nodes)
    tree.encoding["source"] = str(path)  # as xarray does for files
    return tree


def place_of(store: str | Path | xr.DataTree) -> str:
    """The path or URL of a store that is named, or that `open_store` returned; InputError for anything else."""
    source = store if isinstance(store, str | Path) else getattr(store, "encoding", {}).get("source")
    if source is None:
        raise InputError(f"store: expected a path, a URL or what `open_store` returns, got {type(store).__name__}")
    return str(source)


def _responses(group: zarr.Group, name: str) -> Any:
    """Lazy responses: Dask's chunks are the array's, because a chunk is what is read alone."""
    array = get_array(group, name)
    return _lazy(array, array.chunks, _Responses(group))


def _token_values(values: TokenValues) -> Any:
    """Lazy values: Dask's chunks are some tokens of one run, and whole chunk columns."""
    runs = np.diff(values.tokens.runs[:, 0], append=values.shape[0]).tolist()
    lengths = tuple(min(_TOKENS_AT_ONCE, n - at) for n in runs for at in range(0, n, _TOKENS_AT_ONCE))
    step = values.array.chunks[1]
    columns = tuple(min(step, values.shape[1] - at) for at in range(0, values.shape[1], step))
    return _lazy(values, (lengths, columns), _read_tokens)


def _read_tokens(values: TokenValues, index: tuple[slice, slice]) -> NDArray[Any]:
    return values.read(*index, complete=False)


def _statistic(stored: StoredStatistic) -> Any:
    return _lazy(stored, (stored.shape[0], stored.columns), _read_statistic)


def _lazy(source: Any, chunks: tuple[Any, ...], getter: Any) -> Any:
    """Dask asks a getter that is not its own for whole chunks."""
    import dask.array as da

    # no digest for a name: it would take longer than all else here
    meta = np.empty((0,) * len(source.shape), source.dtype)
    return da.from_array(source, chunks=chunks, name=False, getitem=getter, meta=meta)


@dataclass
class _Responses:
    """Dask's getter of responses; StoreError if a chunk is damaged."""

    group: zarr.Group

    def __call__(self, array: zarr.Array[Any], index: tuple[slice, ...]) -> NDArray[Any]:
        return read_region(self.group, array, index)


def _read_statistic(stored: StoredStatistic, index: tuple[slice, slice]) -> NDArray[Any]:
    return stored.read(index[1])
