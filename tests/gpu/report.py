"""The table of a run, and the report that is filed; `tests/benchmarks/status.py` reads its first lines."""

import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.gpu.place import FAILED, MISSED, NOT_HERE, OK, RAN, Row

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "numpy", "zarr", "zarrs")
VERDICTS = (OK, MISSED, FAILED, RAN, NOT_HERE)


def counts(rows: Mapping[str, Sequence[Row]]) -> str:
    """`12 ok, 1 missed, …`"""
    found = Counter(row.verdict for part in rows.values() for row in part)
    return ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS if found[verdict])


def table(rows: Mapping[str, Sequence[Row]], seconds: Mapping[str, float]) -> str:
    lines = ["| part | what | measured | aim | verdict |", "|---|---|---|---|---|"]
    for name, found in rows.items():
        for index, row in enumerate(found):
            part = f"`{name}` ({seconds.get(name, 0):.0f} s)" if index == 0 else ""
            lines.append(f"| {part} | {row.what} | {row.measured} | {row.aim} | {row.verdict} |")
    return "\n".join(lines)


def versions() -> str:
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return ", ".join(f"{name} {number}" for name, number in found.items())


def markdown(
    hardware: str,
    command: str,
    rows: Mapping[str, Sequence[Row]],
    seconds: Mapping[str, float],
    logs: Mapping[str, str],
    left: int = 0,
) -> str:
    """The report: what ran where, the table, and the end of what each part printed that failed.

    `left` parts have not run.
    """
    head = {
        "hardware": hardware,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": versions(),
        "commit": _commit(),
        "command": f"`{command}`",
        "result": counts(rows) + (f"; {left} parts had not run" if left else ""),
    }
    lines = [f"# {hardware}", "", *(f"- {name}: {value}" for name, value in head.items()), "", table(rows, seconds)]
    for name, log in logs.items():
        lines += ["", f"## What `{name}` printed", "", "```", log, "```"]
    return "\n".join(lines) + "\n"


def _commit() -> str:
    root = Path(__file__).parents[2]
    words = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:
        return "unknown"
