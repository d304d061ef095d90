"""What the cells of a sweep came to: their results files, and the table of all."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aura_dist.errors import InputError
from aura_dist.evaluation.compare import against_plain
from aura_dist.evaluation.results import read_results
from aura_dist.sweep.graph import Graph, Job
from aura_dist.sweep.grid import Cell
from aura_dist.sweep.table import cell_row, figures


class SweepResults:
    """The results files of a sweep's cells, below its directory."""

    def __init__(self, out: Path, cells: Sequence[Cell], graph: Graph) -> None:
        self._out, self._cells, self._graph = out, cells, graph
        self._compared: dict[str, dict[str, float]] = {}

    def is_there(self, job: Job) -> bool:
        """Whether what a job makes is there; of an evaluation, whole."""
        return (self._out / job.product).exists() if job.stage != "evaluate" else self._read(job.id) is not None

    def set_aside(self, job: Job) -> None:
        """Give the name of damaged results free, which `evaluate` would not replace."""
        place = self._out / job.product
        if job.stage == "evaluate" and place.exists() and self._read(job.id) is None:
            place.replace(place.with_name(f"{place.name}.damaged"))

    def rows(self, states: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The table: a row a cell; `states` holds the content of every job's state file."""
        rows = []
        for cell, last in zip(self._cells, self._graph.last, strict=True):
            row = cell_row(cell, self._graph.ancestry(last), states)
            found: dict[str, Any] = {}
            if row["state"] == "done" and self._graph.jobs[last].stage == "evaluate":
                found = {**figures(self._read(last) or {}), **self._against_plain(last, states)}
            rows.append({**row, **{name: value for name, value in found.items() if name not in row}})
        return rows

    def _read(self, job_id: str) -> dict[str, Any] | None:
        """The results of an evaluation; None where there are none, or damaged ones."""
        try:
            return read_results(str(self._out / self._graph.jobs[job_id].product))
        except InputError:
            return None

    def _against_plain(self, job_id: str, states: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """Columns of a finished evaluation beside the plain model's; none as long as that is not done."""
        plain = self._graph.plain(job_id)
        if plain is None or states[plain]["state"] != "done":
            return {}
        if job_id not in self._compared:  # thousands of draws, and the table is written after every cell
            theirs, ours = self._read(plain), self._read(job_id)
            if theirs is None or ours is None:
                return {}
            found = against_plain(theirs, ours)
            self._compared[job_id] = {f"against_plain.{name}": value for name, value in found.items()}
        return self._compared[job_id]

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace table.parquet and table.csv."""
        import pandas as pd
        from pandas.api.types import is_object_dtype

        table = pd.DataFrame(rows).convert_dtypes()
        for name in filter(lambda n: is_object_dtype(table[n]), table):  # of several types; Parquet takes one
            table[name] = table[name].map(str, na_action="ignore").astype("string")
        aside = self._out / ".table.parquet"
        table.to_parquet(aside, index=False)
        aside.replace(self._out / "table.parquet")
        replace_text(self._out / "table.csv", table.to_csv(index=False, quoting=csv.QUOTE_MINIMAL))


def replace_text(path: Path, text: str) -> None:
    """Write aside, then rename."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
