"""The layers of the design: imports point down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "aura_dist"
LEVELS = {
    "errors": 0, "core": 1, "data": 2, "runtime": 2, "store": 2, "model": 3, "evaluation": 4, "config": 5, "stages": 6,
    "cli": 7, "demo": 7, "__main__": 8, "__init__": 9,
}  # fmt: skip
HEAVY = ("torch", "transformers", "dask", "zarr", "distributed")
MODULES = sorted(PACKAGE.rglob("*.py"))


def place(module: str) -> str:
    """`aura_dist.store.schema` → `store`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    for module in imports(path):
        if not module.startswith("aura_dist"):
            continue
        other = place(module)
        if module == "aura_dist":
            continue  # the version
        if other == "config":
            assert own in ("stages", "cli", "demo"), f"{relative} reads the configuration"
        elif other != own:
            assert LEVELS[other] < LEVELS[own], f"{relative} imports {module}"
        else:
            assert own != "stages", f"{relative} imports another stage: {module}"


def test_core_is_pure():
    for path in (PACKAGE / "core").glob("*.py"):
        assert not imports(path) & {"torch", "zarr", "dask", "os", "pathlib", "io", "transformers"}, path


def test_environment_is_read_in_runtime_alone():
    for path in MODULES:
        if path.parent.name != "runtime":
            assert "os.environ" not in path.read_text(), path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("aura_dist", HEAVY),
        ("aura_dist.cli", HEAVY),
        ("aura_dist.stages.score", ("torch", "transformers")),
        ("aura_dist.stages.fit", ("torch", "transformers")),
    ],
)
def test_importing_is_light(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout.strip() == "[]"
