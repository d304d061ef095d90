"""Code that comes with a model, a tokenizer, a scorer or a task: it runs only if the user says so, and nobody is asked.

transformers asks on standard input unless it gets a yes or a no, so it always gets one here.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from aura_dist.errors import ConfigError

LoadedT = TypeVar("LoadedT")


class OwnCodeError(ConfigError):
    """Something comes with code of its own, which the user has not allowed to run."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} comes with code of its own, which would run on this machine: expected what the installed packages "
            "know; choose another, or read that code and add --trust-remote-code"
        )


def load_with(load: Callable[[bool], LoadedT], what: str, *, trusted: bool) -> LoadedT:
    """What `load(False)` loads without other code than the packages', else `load(True)`; OwnCodeError unless `trusted`.

    `load` passes its argument to transformers as `trust_remote_code`.
    """
    try:
        return load(False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        if not trusted:
            raise OwnCodeError(what) from error
    return load(True)


def file_with_code(directory: Path) -> Path | None:
    """The first of a directory's YAML tasks that names a Python function, itself or in a file that it includes."""
    return next((file for file in sorted(directory.rglob("*.yaml")) if _names_code(file, set())), None)


def _names_code(file: Path, seen: set[Path]) -> bool:
    seen.add(file)
    text = file.read_text(encoding="utf-8", errors="replace")
    names = re.findall(r"^\s*(?:include:|-)\s*['\"]?([^'\"\s]+)['\"]?\s*$", text, re.MULTILINE)
    included = {file.parent / name for name in names} - seen
    return "!function" in text or any(_names_code(other, seen) for other in included if other.is_file())
