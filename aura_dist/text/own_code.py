"""Code that comes with a model, a tokenizer, a scorer or a task: it runs only if the user says so, and nobody is asked.

transformers asks on standard input unless it gets a yes or a no, so it always gets one here.
"""

from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import TypeVar

import yaml

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


def code_of_tasks(directory: Path, metrics: Container[str]) -> str:
    """The first YAML task in a directory that has code run, and by what; empty where there is none.

    That is a Python function, or a metric that is none of `metrics`, which lm-eval would download or read from a file;
    in a task itself or in a file that it includes, however it is spelled. Nothing is run here.
    """
    files = (file for file in sorted(directory.rglob("*.yaml")) if file.is_file())
    return next((f"{str(file)!r} ({found})" for file in files if (found := _code_of(file, metrics, set()))), "")


def _code_of(file: Path, metrics: Container[str], seen: set[Path]) -> str:
    seen.add(file)
    try:
        document = yaml.compose(file.read_bytes(), Loader=yaml.SafeLoader)
    except (OSError, yaml.YAMLError):  # lm-eval cannot read it either
        return ""
    included: list[Path] = []
    for node in _nodes(document):
        if node.tag == "!function":
            return node.tag
        for key, value in _items(node):
            names = [part.value for part in (value.value if isinstance(value, yaml.SequenceNode) else [value])]
            if key == "include":
                included += [file.parent / name for name in names if isinstance(name, str)]
            elif key == "metric" and names[0] not in metrics:
                return f"metric {names[0]!r}"
            elif key == "hf_evaluate" and names != ["false"]:
                return key
    others = (other.resolve() for other in included if other.is_file())
    return next((found for other in others if other not in seen and (found := _code_of(other, metrics, seen))), "")


def _nodes(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """A YAML node and all within it; an alias of one that it is within ends there."""
    waiting, seen = [] if node is None else [node], set()
    while waiting:
        here = waiting.pop()
        if id(here) not in seen:
            seen.add(id(here))
            yield here
            waiting += [
                part
                for item in here.value
                for part in (item if isinstance(item, tuple) else [item])
                if isinstance(part, yaml.Node)
            ]


def _items(node: yaml.Node) -> list[tuple[str, yaml.Node]]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return [(key.value, value) for key, value in pairs if isinstance(key, yaml.ScalarNode)]
