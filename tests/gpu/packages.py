"""What is installed here: which packages the product lacks, and how they come from a directory of wheels."""

import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# only one part asks for it, and it takes long to build
OPTIONAL = ("deepspeed",)
TESTED = {"python": ("3.11", "3.13"), "torch": ("2.9", "2.13"), "transformers": ("5.17", "5.23")}


def requirements() -> dict[str, str]:
    """Name of each package that pyproject.toml asks for → what it says of it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return {re.split(r"[\[<>=;~! ]", text)[0]: text for text in project["dependencies"]}


def needed() -> list[str]:
    """Names of the packages that pyproject.toml asks for."""
    return list(requirements())


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def lacking() -> list[str]:
    """Packages that are needed and not here."""
    return [name for name in needed() if installed(name) is None]


def from_wheels(names: list[str], wheels: Path, target: Path) -> list[str]:
    """Install what `wheels` has of `names`, with what they need and is not here, into `target`; returns what it lacks.

    pip's own search for what they need would install again what is here, torch among it.
    """
    queue, seen, left = list(names), set[str](), []
    while queue:
        name = queue.pop(0)
        if name in seen or installed(name) is not None:
            continue
        seen.add(name)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        where = ["--find-links", str(wheels), "--target", str(target)]
        done = subprocess.run([*install, *where, name], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"note: pip: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            left.append(name)
        else:
            queue += _needed_by(name, target)
    return left


def _needed_by(name: str, target: Path) -> list[str]:
    """Packages that a package in `target` needs here."""
    from packaging.requirements import Requirement

    for found in distributions(name=name, path=[str(target)]):
        needs = map(Requirement, found.requires or [])
        return [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return []


def announce(target: Path) -> None:
    """Let Python know the version of the product, which runs from the checkout, where it is not installed."""
    if installed("aura-dist") is None:
        text = (REPOSITORY / "aura_dist" / "__init__.py").read_text()
        number = re.search(r'__version__ = "(.+?)"', text)
        about = target / f"aura_dist-{number[1] if number else '0'}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: aura-dist\nVersion: {number[1]}\n")  # type: ignore[index]


def outside_of_range() -> list[str]:
    """What has another version than the script was made for."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(n) for n in re.findall(r"\d+", text)[:2])

    here = {"python": ".".join(map(str, sys.version_info[:2]))}
    here |= {name: installed(name) or "" for name in ("torch", "transformers")}
    return [
        f"{name} {here[name]}, not {low} to {high}"
        for name, (low, high) in TESTED.items()
        if here[name] and not numbers(low) <= numbers(here[name]) <= numbers(high)
    ] + [f"{name} {installed(name)}, not {text}" for name, text in requirements().items() if not _agrees(name, text)]


def _agrees(name: str, requirement: str) -> bool:
    """Whether the package is not here, has a range above, or the version that pyproject.toml asks for."""
    found = installed(name)
    if found is None or name in TESTED:
        return True
    try:
        from packaging.requirements import Requirement
    except ImportError:  # it comes with transformers
        return True
    return Requirement(requirement).specifier.contains(found, prereleases=True)


def scratch_target() -> Path:
    """A directory for what is not installed, at the front of the path, for this process and those it starts."""
    target = Path(tempfile.mkdtemp(prefix="aura-gpu-packages-"))
    sys.path.insert(0, str(target))
    return target
