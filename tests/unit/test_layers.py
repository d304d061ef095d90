"""The layers of the design: imports point down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "aura_dist"
LEVELS = {
    "errors": 0, "settings": 1, "core": 1, "data": 2, "runtime": 2, "store": 2, "model": 3, "evaluation": 4,
    "config": 5, "config_file": 6, "stages": 7, "cli": 8, "demo": 8, "plan_jobs": 8, "__main__": 9, "__init__": 10,
}  # fmt: skip
HEAVY = ("torch", "transformers", "dask", "zarr", "distributed", "numba", "pandas", "xarray", "datasets")
MODULES = sorted(PACKAGE.rglob("*.py"))


def place(module: str) -> str:
    """`aura_dist.store.schema` → `store`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, also within functions; what `from` takes counts as a module too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found - {"aura_dist.__version__"}


def names(path: Path) -> set[str]:
    """Every name and attribute that a file uses."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    for module in imports(path):
        if module.split(".")[0] != "aura_dist":
            continue
        other = place(module)
        if other == "config":
            assert own in ("config_file", "stages", "cli", "demo", "plan_jobs"), f"{relative} reads the configuration"
        elif other != own:
            assert LEVELS[other] < LEVELS[own], f"{relative} imports {module}"
        else:
            assert own != "stages", f"{relative} imports another stage: {module}"


def test_core_is_pure():
    files = {"io", "os", "pathlib", "shutil", "tempfile"}
    for path in (PACKAGE / "core").glob("*.py"):
        assert not {module.split(".")[0] for module in imports(path)} & {*HEAVY, *files} - {"numba"}, path
        assert "open" not in names(path), path


def test_environment_is_touched_in_runtime_alone():
    for path in MODULES:
        if path.parent.name != "runtime":
            assert not names(path) & {"environ", "environb", "getenv", "putenv"}, path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("aura_dist", HEAVY),
        ("aura_dist.cli", HEAVY),
        ("aura_dist.stages.score", ("torch", "transformers")),
        ("aura_dist.stages.fit", ("torch", "transformers", "dask", "numba", "pandas", "xarray")),
        ("aura_dist.stages.report", ("torch", "transformers", "matplotlib", "jinja2")),
        ("aura_dist.stages.status", ("torch", "transformers", "dask", "numba", "matplotlib", "jinja2")),
        ("aura_dist.stages.sweep", ("torch", "transformers", "dask", "zarr", "numba")),
    ],
)
def test_importing_is_light(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout.strip() == "[]"
