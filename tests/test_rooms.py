"""The order of the rooms: imports point down only, pure modules stay pure, heavy libraries come when they are used."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "aura_dist"
# a room imports from rooms of a lower number alone
ROOMS = {
    "errors": -1, "files": 0, "units": 0,
    "text": 1, "ranks": 1, "config": 1,
    "sites": 2,
    "store": 3,
    "models": 4,
    "collecting": 5, "scoring": 5, "interventions": 5,
    "evaluation": 6, "serving": 6,
    "planning": 7, "report": 7,
    "sweep": 8,
    "stages": 9,
    "cli": 10, "demo": 10, "api": 10,
    "__main__": 11, "__init__": 12,
}  # fmt: skip
READ_CONFIG = ("config", "stages", "sweep", "cli", "demo", "api")
TOUCH_ENVIRONMENT = ("ranks", "sweep", "serving")
# functions of numbers, arrays and mappings: no torch, no Zarr, no files
PURE = (
    "config/help.py", "config/options.py", "config/settings.py", "config/verbs.py",
    "evaluation/figures.py",
    "interventions/gates.py", "interventions/methods.py", "interventions/separation.py",
    "planning/budget.py", "planning/seconds.py", "planning/text.py", "planning/work.py",
    "ranks/layout.py",
    "scoring/column_sums.py", "scoring/columns.py", "scoring/kernels.py", "scoring/statistics.py",
    "sites/kinds.py", "sites/ownership.py", "sites/site.py",
    "store/grid.py",
    "sweep/graph.py", "sweep/grid.py", "sweep/table.py",
    "units.py",
)  # fmt: skip
# a library's private names → the one module that uses them
PRIVATE = {"zarr.core": "store/zarr_adapter.py", "dask_jobqueue": "scoring/slurm_workers.py"}
HEAVY = ("torch", "transformers", "dask", "zarr", "distributed", "numba", "pandas", "xarray", "datasets")
MODULES = sorted(PACKAGE.rglob("*.py"))
# the process that loads our plugin has these
HOSTS = ("vllm", "prometheus_client")
# modules that a requirement installs, where they have another name, or come with it
INSTALLED_BY = {
    "yaml": "pyyaml", "distributed": "dask", "huggingface_hub": "transformers", "markupsafe": "jinja2",
    "tokenizers": "transformers", "profanity_check": "alt-profanity-check", "sklearn": "scikit-learn",
}  # fmt: skip


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def place(module: str) -> str:
    """`aura_dist.store.schema` → `store`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, also within functions; what `from` takes counts as a module too."""
    found = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found - {"aura_dist.__version__"}


def names(path: Path) -> set[str]:
    """Every name and attribute that a file uses."""
    nodes = list(ast.walk(syntax(path)))
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
            assert own in READ_CONFIG, f"{relative} reads the configuration"
        elif other != own:
            assert ROOMS[other] < ROOMS[own], f"{relative} imports {module}"
        else:
            assert own != "stages", f"{relative} imports another stage: {module}"


def test_pure_modules_are_pure():
    impure = {*HEAVY, "io", "os", "pathlib", "shutil", "tempfile"} - {"numba"}
    for path in (PACKAGE / name for name in PURE):
        assert not {module.split(".")[0] for module in imports(path)} & impure, path
        assert "open" not in names(path), path


@pytest.mark.parametrize(("private", "adapter"), PRIVATE.items())
def test_private_names_of_a_library_are_used_by_one_module(private, adapter):
    using = [path for path in MODULES if any(f"{m}.".startswith(f"{private}.") for m in imports(path))]
    assert using == [PACKAGE / adapter]


def test_environment_is_touched_by_ranks_and_launchers_alone():
    for path in MODULES:
        if path.relative_to(PACKAGE).parts[0] not in TOUCH_ENVIRONMENT:
            assert not names(path) & {"environ", "environb", "getenv", "putenv"}, path


def test_extras_are_imported_where_they_are_used_and_every_package_is_declared():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", r)[0] for r in project["dependencies"]}
    extras = {re.match(r"[\w-]+", r)[0] for rs in project["optional-dependencies"].values() for r in rs}
    for path in MODULES:
        tree = syntax(path)
        at_top = {
            ast.unparse(node).split()[1].split(".")[0]
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        for module in {m.split(".")[0] for m in imports(path)} - {"aura_dist", *HOSTS} - sys.stdlib_module_names:
            package = INSTALLED_BY.get(module, module.replace("_", "-"))
            assert package in needed | extras, f"{path} imports {module}, which pyproject.toml does not name"
            assert package in needed or module not in at_top, f"{path} needs the extra of {module} to be imported"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("aura_dist", HEAVY),
        ("aura_dist.api", HEAVY),
        ("aura_dist.cli", (*HEAVY, "numpy", "yaml")),
        ("aura_dist.config.help", (*HEAVY, "numpy", "yaml")),
        ("aura_dist.interventions.methods", HEAVY),
        ("aura_dist.scoring.statistics", HEAVY),
        ("aura_dist.sites.kinds", HEAVY),
        ("aura_dist.sites.pooling", HEAVY),
        ("aura_dist.models.quantization", HEAVY),
        ("aura_dist.models.strategies.table", HEAVY),
        ("aura_dist.planning.budget", HEAVY),
        ("aura_dist.serving.vllm_plugin", (*HEAVY, "numpy", "vllm", "msgspec")),
        ("aura_dist.serving.laying", ("transformers", "zarr", "dask", "vllm", "msgspec")),
        ("aura_dist.stages.score", ("torch", "transformers", "dask", "numba", "pandas", "xarray")),
        ("aura_dist.scoring.tables", ("torch", "dask", "numba", "pandas", "xarray")),
        ("aura_dist.stages.fit", ("torch", "transformers", "dask", "numba", "pandas", "xarray")),
        ("aura_dist.stages.report", ("torch", "transformers", "matplotlib", "jinja2")),
        ("aura_dist.stages.status", ("torch", "transformers", "dask", "numba", "matplotlib", "jinja2")),
        ("aura_dist.stages.sweep", ("torch", "transformers", "dask", "zarr", "numba")),
        ("aura_dist.sweep.launchers", (*HEAVY, "numpy")),
    ],
)
def test_importing_is_light(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout.strip() == "[]"
