"""A store as xarray sees it: labelled dimensions, lazy values, nothing loaded until it is asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
import zarr
from numpy.typing import NDArray

from aura_dist.errors import InputError, StoreError
from aura_dist.store.access import get_array, open_group, read_array
from aura_dist.store.schema import StoreSpec, activation_path
from aura_dist.store.scores import STATISTICS, score_path


def open_store(path: str | Path) -> xr.DataTree:
    """Open a store as an xarray `DataTree` of the store's own shape.

    - `tree["samples"]`: `row`, `num_tokens` [sample] and `label` [sample, concept]
    - `tree["activations"][site]`: one variable a pooling, [sample, neuron], with the coordinates `row`,
      `num_tokens` and `neuron`; lazy (dask)
    - `tree["scores"][site][pooling]`: one variable a statistic, [concept, neuron], with the coordinates
      `concept` and `neuron`; only once the store has been scored

    The attributes hold the model, the data, the settings and the versions. Responses that are not
    collected yet read as NaN.

    Raises
    ------
    StoreError
        There is no store at `path`.
    """
    group = open_group(str(path))
    spec = StoreSpec.from_attributes(group.attrs)
    samples = _samples(group, spec)
    rows = {name: ("sample", samples[name].values) for name in ("row", "num_tokens")}
    nodes: dict[str, xr.Dataset] = {"/": xr.Dataset(attrs=dict(group.attrs)), "/samples": samples}
    for site in spec.sites:
        responses = dict.fromkeys(spec.poolings, ("sample", "neuron"))
        nodes[f"/activations/{site.name}"] = xr.Dataset(
            {p: (dims, _lazy(group, activation_path(site.name, p))) for p, dims in responses.items()},
            coords={**rows, "neuron": np.arange(site.width)},
            attrs={"kind": site.kind, "layer": site.layer},
        )
        for pooling in spec.poolings:
            if score_path(site.name, pooling, "scored") in group:
                nodes[f"/scores/{site.name}/{pooling}"] = xr.Dataset(
                    {s: (("concept", "neuron"), _lazy(group, score_path(site.name, pooling, s))) for s in STATISTICS},
                    coords={"concept": list(spec.concepts), "neuron": np.arange(site.width)},
                )
    return xr.DataTree.from_dict(nodes)


def _samples(group: zarr.Group, spec: StoreSpec) -> xr.Dataset:
    values = {name: read_array(group, f"samples/{name}") for name in ("row", "num_tokens", "label")}
    return xr.Dataset(
        {
            "row": ("sample", values["row"]),
            "num_tokens": ("sample", values["num_tokens"]),
            "label": (("sample", "concept"), values["label"]),
        },
        coords={"concept": list(spec.concepts)},
    )


def _lazy(group: zarr.Group, name: str) -> Any:
    import dask.array as da

    return da.from_zarr(get_array(group, name))


def read_scores(
    group: zarr.Group, spec: StoreSpec, concept: str, pooling: str, statistic: str = "auroc"
) -> dict[str, NDArray[Any]]:
    """Site → [D] one statistic of one concept, in model order.

    Raises
    ------
    InputError
        The store has no such concept or pooling.
    StoreError
        The store has not been scored, or not wholly, or not for this statistic.
    """
    if concept not in spec.concepts:
        raise InputError(f"--concept: expected one of {', '.join(spec.concepts)}, got {concept!r}")
    if pooling not in spec.poolings:
        raise InputError(
            f"--pooling: expected one of {', '.join(spec.poolings)}, got {pooling!r}; "
            f"collect with `--pooling {' '.join([*spec.poolings, pooling])}` for it"
        )
    which = spec.concepts.index(concept)
    scores: dict[str, NDArray[Any]] = {}
    for site in spec.sites:
        marker, name = (score_path(site.name, pooling, n) for n in ("scored", statistic))
        if marker not in group or not read_array(group, marker).all() or name not in group:
            raise StoreError(
                f"--store {group.store_path}: {site.name} has not been scored ({statistic}); "
                "run `aura-dist score` first"
            )
        scores[site.name] = np.asarray(get_array(group, name)[which])
    return scores


def score_table(group: zarr.Group, spec: StoreSpec, concept: str, pooling: str) -> pd.DataFrame:
    """Every neuron's score: columns `site`, `kind`, `layer`, `unit`, `auroc`, in model order."""
    scores = read_scores(group, spec, concept, pooling)
    kinds: Mapping[str, tuple[str, int]] = {s.name: (s.kind, s.layer) for s in spec.sites}
    return pd.concat(
        [
            pd.DataFrame({"site": n, "kind": kinds[n][0], "layer": kinds[n][1], "unit": np.arange(len(v)), "auroc": v})
            for n, v in scores.items()
        ],
        ignore_index=True,
    )


def top_neurons(store: str | Path, concept: str, k: int, pooling: str | None = None) -> pd.DataFrame:
    """The `k` neurons of highest AUROC: columns `site`, `kind`, `layer`, `unit`, `auroc`, best first.

    Parameters
    ----------
    store
        Path of a scored store.
    concept
        One of the store's concepts.
    k
        Number of neurons.
    pooling
        By default the store's first.
    """
    group = open_group(str(store))
    spec = StoreSpec.from_attributes(group.attrs)
    table = score_table(group, spec, concept, pooling or spec.poolings[0])
    return table.sort_values("auroc", ascending=False, kind="stable", ignore_index=True).head(k)
