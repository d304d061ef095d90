"""A store as xarray sees it: labelled dimensions, lazy values, nothing loaded until it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.errors import InputError, StoreError
from aura_dist.scoring.scores import score_attributes, score_path, scored_statistics
from aura_dist.store.access import check_complete, damaged, get_array, in_whole_chunks, open_group, read_array
from aura_dist.store.schema import StoreSpec, activation_path

if TYPE_CHECKING:
    import xarray as xr


def open_store(path: str | Path) -> xr.DataTree:
    """Open a store as an xarray `DataTree` of the store's own shape.

    - `tree["samples"]`: `row`, `num_tokens` [sample] and `label` [sample, concept]
    - `tree["activations"][site]`: one variable a pooling, [sample, neuron], with the coordinates `site`, `row`,
      `tokens` (also as `num_tokens`), `unit` (also as `neuron`); lazy (dask)
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
    if attributes := score_attributes(group):
        nodes["/scores"] = xr.Dataset(attrs=attributes)
    for site in spec.sites:
        units = np.arange(site.width)
        of_site = {"site": site.name, "neuron": units, "unit": ("neuron", units)}
        nodes[f"/activations/{site.name}"] = xr.Dataset(
            {p: (("sample", "neuron"), _lazy(group, activation_path(site.name, p))) for p in spec.poolings},
            coords={**by_sample, **of_site},
            attrs={"kind": site.kind, "layer": site.layer},
        )
        for pooling in spec.poolings:
            names = scored_statistics(group, site.name, pooling)
            if names:
                lazy = {s: _lazy(group, score_path(site.name, pooling, s), complete=True) for s in names}
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


def _lazy(group: zarr.Group, name: str, *, complete: bool = False) -> Any:
    import dask.array as da

    array = get_array(group, name)
    # no digest for a name: it would take longer than all else here
    meta = np.empty((0,) * array.ndim, array.dtype)
    return da.from_array(array, chunks=array.chunks, name=False, getitem=_Blocks(group, complete), meta=meta)


@dataclass
class _Blocks:
    """Dask's getter of one array's chunks: it decodes each chunk in full, because only then is it checked.

    Dask asks a getter that is not its own for whole chunks. The handle for whole chunks is made when the first is
    read, because making it takes a fifth of the time of reading a chunk and most arrays are never read.
    """

    group: zarr.Group
    complete: bool
    whole: zarr.Array[Any] | None = None

    def __call__(self, array: zarr.Array[Any], index: tuple[slice, ...]) -> NDArray[Any]:
        """One chunk; StoreError if it is damaged, or is missing although `complete`."""
        whole = self.whole = in_whole_chunks(array) if self.whole is None else self.whole
        chunk = tuple(slice(i.start, i.start + width) for i, width in zip(index, array.chunks, strict=True))
        if self.complete:
            place = tuple(i.start // width for i, width in zip(index, array.chunks, strict=True))
            check_complete(self.group, array, [place])
        try:
            values = np.asarray(whole[chunk])
        except StoreError:  # the store could not be reached
            raise
        except Exception as error:  # the codec pipeline raises its own kinds
            raise damaged(self.group, array.path, error) from error
        return values[tuple(slice(i.stop - i.start) for i in index)]
