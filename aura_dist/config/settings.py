"""One setting: how it is declared, what messages call it, and its value from a flag's words or a file's.

Settings are fields of frozen dataclasses, made by `option`; values are checked by msgspec.
"""

import re
from dataclasses import MISSING, Field, field, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from aura_dist.errors import ConfigError

ConfigT = TypeVar("ConfigT")


def option(
    help_text: str, default: Any = MISSING, *, distinct: bool = False, place: str | None = None, file_only: bool = False
) -> Any:
    """Declare one setting: its help text and, unless it is required, its default; `distinct` refuses repeats.

    One with a `place` stands on the command line without a flag, and is shown there under that name. What is
    `file_only` has no flag: it is too large for a command line.
    """
    metadata = {
        "help": help_text,
        "distinct": distinct,
        "may_be_empty": default == [],
        "place": place,
        "file_only": file_only,
    }
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The command-line flag of a setting: `num_positive` → `--num-positive`."""
    return "--" + name.replace("_", "-")


def hints(config: type) -> dict[str, Any]:
    """Types of a config's fields, with their constraints."""
    return get_type_hints(config, include_extras=True)


def resolve(config: type[ConfigT], settings: dict[str, Any]) -> ConfigT:
    """Check and convert `settings` (strings are read as the field's type) into a config.

    Raises
    ------
    ConfigError
        A required setting is missing, or a value is not of its type or out of its range.
    """
    types = hints(config)
    values = {}
    for spec in fields(config):  # type: ignore[arg-type]
        if spec.name in settings:
            values[spec.name] = _convert(spec, settings[spec.name], types[spec.name])
        elif _required(spec) and spec.metadata["file_only"]:
            raise ConfigError(f"{spec.name!r} is required in the config file: {spec.metadata['help']}")
        elif _required(spec):
            give = "give it" if place_of(spec) else "give the flag"
            raise ConfigError(f"{shown_name(spec)} is required: {give}, or {spec.name!r} in the config file")
    return config(**values)


def place_of(spec: "Field[Any]") -> str | None:
    """The name under which a setting without a flag stands on the command line; None for one with a flag."""
    place: str | None = spec.metadata["place"]
    return place


def shown_name(spec: "Field[Any]") -> str:
    """How messages name a setting: by its flag or its place."""
    return place_of(spec) or flag(spec.name)


def _required(spec: "Field[Any]") -> bool:
    return spec.default is MISSING and spec.default_factory is MISSING


def _convert(spec: "Field[Any]", value: Any, hint: Any) -> Any:
    name, distinct = spec.name, spec.metadata["distinct"]
    shown = shown_name(spec)
    if get_origin(hint) is list and isinstance(value, (str, int, float)):
        value = [value]
    if _holds_nul(value):
        raise ConfigError(f"{shown}: expected {describe(hint)} without a NUL character, got {value!r}")
    if get_origin(hint) is dict and isinstance(value, list):
        value = _pairs(name, value)
    number = _number(value, _leaves(hint)) if isinstance(value, str) else value
    try:
        converted = msgspec.convert(number, hint, strict=False)
    except msgspec.ValidationError:
        raise ConfigError(f"{shown}: expected {describe(hint)}, got {value!r}") from None
    if get_origin(hint) is list:
        if not converted and not spec.metadata["may_be_empty"]:
            raise ConfigError(f"{shown}: expected at least one value, got none")
        if distinct and len(set(converted)) < len(converted):
            raise ConfigError(f"{shown}: expected each value once, got {' '.join(map(str, converted))}")
    if isinstance(converted, float) and not abs(converted) < float("inf"):
        raise ConfigError(f"{shown}: expected a finite number, got {value!r}")
    return converted


def _pairs(name: str, words: list[str]) -> dict[str, Any]:
    """`["queue=main", "cores=2"]`, as flags give them, as keys and values; whole numbers and truth values as such."""
    pairs: dict[str, Any] = {}
    for word in words:
        key, equals, value = str(word).partition("=")
        if not equals or key in pairs:
            raise ConfigError(f"{flag(name)}: expected KEY=VALUE, each key once, got {word!r}")
        pairs[key] = {"true": True, "false": False}.get(value, int(value) if value.isdecimal() else value)
    return pairs


def _number(text: str, types: set[Any]) -> Any:
    """The number that `text` spells, as `.5`, `1.` and `1e3` do, where a setting takes one; else the text."""
    for kind, pattern in ((int, _INTEGER), (float, _DECIMAL)):
        if kind in types and pattern.fullmatch(text.strip()):
            return kind(text)
    return text


def _leaves(hint: Any) -> set[Any]:
    """The plain types of a hint: `PositiveInt | None` → {int, NoneType}."""
    if get_origin(hint) is Annotated:
        return _leaves(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return set().union(*map(_leaves, get_args(hint)))
    return {hint}


def _holds_nul(value: Any) -> bool:
    """Whether a text holds the character that no path can."""
    return any(isinstance(v, str) and "\0" in v for v in (value if isinstance(value, list) else [value]))


_INTEGER = re.compile(r"[+-]?[0-9]{1,999}")  # Python reads no more than 4,300 digits
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", Any: "a value"}
_BOUNDS = {"ge": "of at least {}", "gt": "above {}", "le": "of at most {}", "lt": "below {}"}


def describe(hint: Any) -> str:
    """A type in a user's words: `PositiveInt | None` → "an integer of at least 1"."""
    origin = get_origin(hint)
    if origin is Annotated:
        base, *metas = get_args(hint)
        bounds = [
            text.format(getattr(m, b)) for m in metas for b, text in _BOUNDS.items() if getattr(m, b, None) is not None
        ]
        return " ".join([describe(base), " and ".join(bounds)]).strip()
    if origin in (Union, UnionType):
        return " or ".join(describe(a) for a in get_args(hint) if a is not NoneType)
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if origin is list:
        return f"a list, each {describe(get_args(hint)[0])}"
    if origin is dict:
        return f"keys and values, the key {describe(get_args(hint)[0])}"
    return _WORDS.get(hint, str(hint))
