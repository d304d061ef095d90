"""Scores in words and bars, for the terminal."""

import numpy as np
import pandas as pd

_BARS = " ▁▂▃▄▅▆▇█"
HISTOGRAM_BINS = np.linspace(0.0, 1.0, 21)
CONFOUNDED_MEDIAN = 0.05


def by_layer(table: pd.DataFrame) -> str:
    """One line a layer: median and best AUROC, share above ½ and above 0.7, and a histogram from 0 to 1.

    `table` is that of `scoring.view.score_table`.
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
