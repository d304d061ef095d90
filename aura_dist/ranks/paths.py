"""Where the package may keep files of its own on this machine."""

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache directory of aura_dist (`$XDG_CACHE_HOME/aura_dist`, by default `~/.cache/aura_dist`)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "aura_dist"


def extensions_dir() -> Path:
    """Where DeepSpeed's compiled parts lie: `$TORCH_EXTENSIONS_DIR`, by default within this Python environment.

    Sets the variable, which torch reads, so that all ranks build and find them in one place; and puts this
    environment's programs on the path, among them the builder that torch asks for.
    """
    programs, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if programs not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (programs, path)))
    directory = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions")))
    directory.mkdir(parents=True, exist_ok=True)
    return directory
