"""How large the house is, and how many rooms a call crosses: figures to set side by side, before and after a change.

    python tests/house.py [CHECKOUT …]        (default: this one; an older commit as `git worktree add DIR COMMIT`)

- modules, lines, median and largest module, modules under 40 lines with one importer
- the rooms (folders of `aura_dist/`, or single modules at its top) that the import graph of each verb reaches
- the modules that name poolings, strategies, kinds of site, methods or stages of a sweep as strings: a new one would
  touch each of them
"""

import ast
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

VERBS = ("collect", "score", "fit", "evaluate", "sweep")
NAMES = {
    "pooling": {"max", "mean", "min", "last", "absmax"},
    "strategy": {"replicate", "fsdp", "tensor", "zero3", "dispatch"},
    "kind of site": {"mlp", "attention", "norm", "neurons", "heads", "inputs", "residual"},
    "method": {"aura", "damp", "det0", "mean-act", "linear-act"},
    "stage of a sweep": {"collect", "score", "fit", "evaluate"},
}


def modules_of(checkout: Path) -> dict[str, ast.Module]:
    """Name relative to the package, such as `store.schema` → its tree; empty `__init__` files are left out."""
    found = {}
    for path in sorted((checkout / "aura_dist").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if text.strip():
            name = ".".join(path.relative_to(checkout / "aura_dist").with_suffix("").parts)
            found[name.removesuffix(".__init__")] = ast.parse(text)
    return found


def imports(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Modules of the package that a module imports, also within functions."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        for name in names:
            own = name.removeprefix("aura_dist.")
            if name.startswith("aura_dist.") and own in known:
                yield own


def reached(verb: str, graph: dict[str, set[str]]) -> set[str]:
    """Modules that the stage of a verb reaches."""
    found, todo = set(), [f"stages.{verb}"]
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += graph[module]
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def naming(trees: dict[str, ast.Module], names: set[str]) -> list[str]:
    """Modules that hold one of `names` as a string beside a docstring: compared, listed or looked up."""
    found = []
    for module, tree in trees.items():
        strings = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        if len(strings & names) >= min(2, len(names)):
            found.append(module)
    return found


def report(checkout: Path) -> None:
    trees = modules_of(checkout)
    lines = {name: _lines(checkout, name) for name in trees}
    graph = {name: set(imports(tree, set(trees))) - {name} for name, tree in trees.items()}
    importers: dict[str, set[str]] = defaultdict(set)
    for module, others in graph.items():
        for other in others:
            importers[other].add(module)
    entries = {"__main__", "__init__", "cli"} | {m for m in trees if m.startswith("stages.")}
    tiny = [m for m in trees if lines[m] < 40 and len(importers[m]) == 1 and m not in entries]
    largest = max(lines, key=lambda m: lines[m])
    print(f"== {checkout}")
    print(f"{len(trees)} modules in {len({room(m) for m in trees if '.' in m})} rooms, {sum(lines.values()):,} lines")
    print(f"median {statistics.median(lines.values()):.0f} lines, largest {lines[largest]} ({largest})")
    print(f"under 40 lines with one importer: {len(tiny)} {' '.join(tiny)}")
    for verb in VERBS:
        crossed = reached(verb, graph)
        rooms = sorted({room(m) for m in crossed})
        print(f"{verb:<9} reaches {len(crossed):>3} modules in {len(rooms):>2} rooms: {' '.join(rooms)}")
    for what, names in NAMES.items():
        found = naming(trees, names)
        print(f"a {what} is named in {len(found):>2} modules: {' '.join(found)}")


def _lines(checkout: Path, module: str) -> int:
    path = checkout / "aura_dist" / Path(*module.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    return len(file.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    for place in sys.argv[1:] or [Path(__file__).parents[1]]:
        report(Path(place).resolve())
