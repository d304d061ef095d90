"""What ran on what, and when: the table in the README's status, from the results that are filed.

python -m tests.benchmarks.status    writes it
"""

import re
from collections import defaultdict
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
RESULTS = Path(__file__).parent / "results"
BEGIN = "<!-- the table of what ran: python -m tests.benchmarks.status -->\n"
HEAD = "| where | what ran | when | result |\n|---|---|---|---|"
NO_GPU = (
    "| a GPU | **nothing yet**: `bash tests/gpu/run.sh` is written and runs on CPUs; every GPU figure is a prediction "
    "| – | – |"
)
_CORES = re.compile(r"\d+ cores(?: of an? [A-Z][\w ]*\w(?: \([^)]*\))?)?")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


def table(results: Path = RESULTS) -> str:
    """The whole table; files that name no machine and no date are not in it."""
    reports = sorted(results.glob("gpu-*.md"))
    on_gpu = [_gpu_row(path) for path in reports] or [NO_GPU]
    return "\n".join([HEAD, *on_gpu, *_cpu_rows([p for p in sorted(results.iterdir()) if p not in reports])])


def _gpu_row(path: Path) -> str:
    """A report of `tests/gpu`; ValueError if it lacks a line that `tests/gpu/report.py` writes."""
    found = dict(re.findall(r"^- (\w+): (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    absent = {"hardware", "date", "versions", "result"} - found.keys()
    if absent:
        raise ValueError(f"{path}: expected a report of tests/gpu, which has a line `- {min(absent)}: …`")
    versions = ", ".join(v for v in found["versions"].split(", ") if v.split()[0] in ("torch", "transformers"))
    link = f"[{path.name}]({path.relative_to(README.parent)})" if path.is_relative_to(README.parent) else path.name
    return f"| {found['hardware']} | `tests/gpu` ({versions}) | {found['date']} | {found['result']}: {link} |"


def _cpu_rows(paths: list[Path]) -> list[str]:
    """A row a machine: the benchmarks, and their first and last day."""
    ran: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
    for path in paths:
        if path.suffix not in (".txt", ".md"):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            machine, day = _CORES.search(line), _DATE.search(" ".join(lines[number : number + 2]))
            if machine and day:
                ran[re.sub(r"; [^)]*\)", ")", machine[0])].add((path.stem, day[0]))
    return [_cpu_row(machine, found) for machine, found in sorted(ran.items(), key=lambda item: -len(item[1]))]


def _cpu_row(machine: str, found: set[tuple[str, str]]) -> str:
    names, days = sorted({name for name, _ in found}), sorted({day for _, day in found})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    folder = RESULTS.relative_to(README.parent)
    return f"| {machine}, no GPU | {', '.join(names)} | {when} | [files]({folder}/) |"


def with_table(text: str, made: str) -> str:
    """The README's `text` with the table `made` in place of the one that is there."""
    before, line, after = text.partition(BEGIN)
    if not line:
        raise ValueError(f"{README}: expected the line {BEGIN!r} before the table")
    return before + line + re.sub(r"\A(?:\|.*\n)*", lambda _: made + "\n", after, count=1)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8"), table()), encoding="utf-8")
