"""Scores as tables: every neuron's scores, the best neurons, and both in words and bars for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import zarr

from aura_dist.errors import InputError
from aura_dist.scoring.scores import read_scores, read_statistic, score_attributes, scored_statistics
from aura_dist.scoring.view import place_of
from aura_dist.store.access import open_group
from aura_dist.store.schema import StoreSpec

if TYPE_CHECKING:  # loaded where a table is made
    import pandas as pd
    import xarray as xr

# The statistics that a neuron's row shows, where they have been computed.
SHOWN = ("auroc", "auroc_se", "q_value", "mean_positive", "mean_negative")
HISTOGRAM_BINS = np.linspace(0.0, 1.0, 21)
CONFOUNDED_MEDIAN = 0.05
_BARS = " ▁▂▃▄▅▆▇█"


def score_table(group: zarr.Group, spec: StoreSpec, concept: str, pooling: str) -> pd.DataFrame:
    """Every neuron's scores, in model order: columns `site` (categorical), `kind`, `layer`, `unit` and `SHOWN`.

    A statistic of `SHOWN` that has not been computed is NaN. `attrs` hold `num_rows`, `total_rows` and `partial`.
    """
    import pandas as pd

    auroc = read_scores(group, spec, concept, pooling)
    widths = [site.width for site in spec.sites]
    codes = np.repeat(np.arange(len(widths)), widths)
    table = pd.DataFrame(
        {
            "site": pd.Categorical.from_codes(codes, pd.Index([site.name for site in spec.sites])),
            "kind": np.array([site.kind for site in spec.sites])[codes],
            "layer": np.array([site.layer for site in spec.sites])[codes],
            "unit": np.concatenate([np.arange(width) for width in widths]),
            "auroc": np.concatenate(list(auroc.values())),
        }
    )
    which = spec.concepts.index(concept)
    there_by_site = [scored_statistics(group, site.name, pooling) for site in spec.sites]
    for name in SHOWN[1:]:
        there = all(name in names for names in there_by_site)
        parts = [read_statistic(group, s.name, pooling, name)[which] for s in spec.sites] if there else []
        table[name] = np.concatenate(parts) if parts else np.nan
    table.attrs = {key: score_attributes(group)[key] for key in ("num_rows", "total_rows", "partial")}
    return table


def best_neurons(table: pd.DataFrame, k: int) -> pd.DataFrame:
    """The `k` neurons of highest AUROC of a `score_table`, best first; ties in model order."""
    best = table.sort_values("auroc", ascending=False, kind="stable", ignore_index=True).head(k)
    return best.assign(site=best["site"].astype(str))


def check_count(name: str, count: object) -> None:
    """InputError that names the parameter unless it is a number of neurons that can be shown."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise InputError(f"{name}: expected an integer of at least 1, got {count!r}")


def top_neurons(store: str | Path | xr.DataTree, concept: str, k: int, pooling: str | None = None) -> pd.DataFrame:
    """The `k` neurons of highest AUROC of a scored store (its path, or what `open_store` returned), best first.

    `pooling` is by default the store's first. Columns: `site`, `kind`, `layer`, `unit`, `auroc`, `auroc_se`, `q_value`,
    `mean_positive`, `mean_negative`; a statistic that has not been computed is NaN. `attrs` hold `num_rows`,
    `total_rows` and `partial`. InputError if k < 1, or the store has no such concept or pooling.
    """
    check_count("k", k)
    group = open_group(place_of(store))
    spec = StoreSpec.of(group)
    return best_neurons(score_table(group, spec, concept, pooling or spec.poolings[0]), k)


def by_layer(table: pd.DataFrame) -> str:
    """One line a layer: median and best AUROC, share above ½ and above 0.7, and a histogram from 0 to 1.

    `table` is a `score_table`.
    """
    lines = [f"{'layer':>5}  {'neurons':>8}  median    best   > 0.5   > 0.7  AUROC from 0 to 1"]
    for layer, values in table.groupby("layer")["auroc"]:
        auroc = values.dropna().to_numpy()
        if not len(auroc):
            lines.append(f"{layer:>5}  {len(values):>8,}  no scores")
            continue
        lines.append(
            f"{layer:>5}  {len(values):>8,}  {np.median(auroc):6.3f}  {auroc.max():6.3f}  "
            f"{(auroc > 0.5).mean():6.1%}  {(auroc > 0.7).mean():6.1%}  {_histogram(auroc)}"
        )
    return "\n".join(lines)


def _histogram(values: np.ndarray) -> str:
    counts, _ = np.histogram(values, HISTOGRAM_BINS)
    heights = np.ceil(counts / max(counts.max(), 1) * (len(_BARS) - 1)).astype(int)
    return "|" + "".join(_BARS[h] for h in heights) + "|"


def top_table(top: pd.DataFrame) -> str:
    """The table of `top_neurons`, one neuron a line."""
    width = max(len("module"), int(top["site"].str.len().max())) if len(top) else len("module")
    lines = [f"{'module':<{width}}  {'layer':>5}  {'unit':>6}   AUROC   error         q  mean with  without"]
    lines += [
        f"{row.site:<{width}}  {row.layer:>5}  {row.unit:>6}  {row.auroc:6.4f}  {row.auroc_se:6.4f}  "
        f"{row.q_value:8.1e}  {row.mean_positive:9.3g}  {row.mean_negative:7.3g}"
        for row in top.itertuples()
    ]
    return "\n".join(lines)


def confounding_warning(table: pd.DataFrame) -> str | None:
    """A sentence if the median AUROC is far from ½: most neurons tell the classes apart by something else."""
    median = float(table["auroc"].median())
    if abs(median - 0.5) <= CONFOUNDED_MEDIAN:
        return None
    return (
        f"the median AUROC is {median:.3f}, far from 0.5: the classes differ in something general, such as text "
        "length; consider `collect --match-length`"
    )
