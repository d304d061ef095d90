"""Where the package may keep files of its own on this machine."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache directory of aura_dist (`$XDG_CACHE_HOME/aura_dist`, by default `~/.cache/aura_dist`)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "aura_dist"
