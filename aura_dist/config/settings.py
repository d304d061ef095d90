"""One setting: how it is declared, what messages call it, and how a flag's words or a file's value become its value.

Settings are fields of frozen dataclasses, made by `option`; msgspec checks their values.
"""

import re
from dataclasses import MISSING, Field, dataclass, field, fields
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from aura_dist.errors import ConfigError


@dataclass(frozen=True)
class OneOf:
    """Annotation of a text whose allowed values are the keys of a table in another room.

    The table is imported only when a value is checked or help is shown, so that `aura-dist --help` stays fast.
    """

    # Dotted name of a mapping, or of a function that returns one. A row is a summary, or has the attribute `summary`
    # and maybe `spellings`, which help shows in place of the key.
    table: str
    # what is allowed beside the table's values, such as `GLOB`; then no value is refused here
    also: str = ""

    def rows(self) -> dict[str, str]:
        """Allowed value → its summary."""
        table = resolve_name(self.table)
        rows = (table() if callable(table) else table).items()
        return {", ".join(getattr(row, "spellings", [key])): getattr(row, "summary", row) for key, row in rows}


def option(
    group: str,
    help_text: str,
    default: Any = MISSING,
    *,
    unset: str = "none",
    needs: str = "",
    distinct: bool = False,
    place: str | None = None,
    file_only: bool = False,
    again_in: tuple[str, ...] = (),
    empty_text: bool = False,
) -> Any:
    """Declare one setting: its heading in `--help`, its help text and, unless it is required, its default.

    - `unset` is what `--help` says of a default that is None or empty
    - `needs` is the name of another setting: without that one, this setting is refused
    - `distinct` refuses a list with a value twice
    - `place` is the name of a positional argument; the setting has no flag
    - `file_only` settings have no flag, because they are too large for a command line
    - `again_in` are keys of a file that use what the verb writes: above them, the setting would act twice
    - `empty_text` says that a text may be empty; elsewhere it would silently mean that nothing was given
    """
    metadata = {
        "group": group, "help": help_text, "unset": unset, "needs": needs, "distinct": distinct, "place": place,
        "file_only": file_only, "again_in": again_in, "may_be_empty": default == [],
        "empty_text": empty_text or default == "",
    }  # fmt: skip
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of every verb's settings."""

    def __post_init__(self) -> None:
        """Refuse a setting that nothing would look at."""
        for spec in fields(self):
            needed = spec.metadata["needs"]
            if needed and self.is_set(spec) and not getattr(self, needed):
                raise ConfigError(f"{shown_name(spec)}: expected it with {flag(needed)}, got it without; leave it out")

    def is_set(self, spec: "Field[Any]") -> bool:
        """Whether a setting differs from its default."""
        return bool(getattr(self, spec.name) != default_of(spec))


ConfigT = TypeVar("ConfigT", bound=Settings)


def flag(name: str) -> str:
    """The command-line flag of a setting: `num_positive` → `--num-positive`."""
    return "--" + name.replace("_", "-")


def hints(config: type) -> dict[str, Any]:
    """Types of a config's fields, with their constraints."""
    return get_type_hints(config, include_extras=True)


def default_of(spec: "Field[Any]") -> Any:
    """The value that a setting has where none is given; MISSING if it is required."""
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


def resolve(config: type[ConfigT], settings: dict[str, Any]) -> ConfigT:
    """Check and convert `settings` (strings are read as the field's type) into a config.

    ConfigError if a required setting is missing, or a value is not of its type or out of its range.
    """
    types = hints(config)
    values = {}
    for spec in fields(config):
        if spec.name in settings:
            values[spec.name] = _convert(spec, settings[spec.name], types[spec.name])
        elif default_of(spec) is MISSING and spec.metadata["file_only"]:
            raise ConfigError(f"{spec.name!r} is required in the config file: {spec.metadata['help']}")
        elif default_of(spec) is MISSING:
            give = "give it" if spec.metadata["place"] else "give the flag"
            raise ConfigError(f"{shown_name(spec)} is required: {give}, or {spec.name!r} in the config file")
    return config(**values)


def shown_name(spec: "Field[Any]") -> str:
    """What messages call a setting: its flag, or the name of its positional argument."""
    return spec.metadata["place"] or flag(spec.name)


def _convert(spec: "Field[Any]", value: Any, hint: Any) -> Any:
    shown, table = shown_name(spec), table_of(hint)
    if get_origin(hint) is list and isinstance(value, (str, int, float)):
        value = [value]
    if any(isinstance(v, str) and "\0" in v for v in (value if isinstance(value, list) else [value])):  # as no path can
        raise ConfigError(f"{shown}: expected {describe(hint)} without a NUL character, got {value!r}")
    if get_origin(hint) is dict and isinstance(value, list):
        value = _pairs(shown, value)
    number = _number(value, _leaves(hint)) if isinstance(value, str) else value
    try:
        converted = msgspec.convert(number, hint, strict=False)
    except msgspec.ValidationError:
        raise ConfigError(f"{shown}: expected {describe(hint)}, got {value!r}") from None
    listed = converted if isinstance(converted, list) else [] if converted is None else [converted]
    if table is not None and not table.also and not set(listed) <= table.rows().keys():
        raise ConfigError(f"{shown}: expected {describe(hint)}, got {value!r}")
    if "" in listed and not spec.metadata["empty_text"]:
        raise ConfigError(f"{shown}: expected {describe(hint)} that is not empty, got {value!r}")
    if get_origin(hint) is list:
        if not converted and not spec.metadata["may_be_empty"]:
            raise ConfigError(f"{shown}: expected at least one value, got none")
        if spec.metadata["distinct"] and len(set(converted)) < len(converted):
            raise ConfigError(f"{shown}: expected each value once, got {' '.join(map(str, converted))}")
    if isinstance(converted, float) and not abs(converted) < float("inf"):
        raise ConfigError(f"{shown}: expected a finite number, got {value!r}")
    return converted


def table_of(hint: Any) -> OneOf | None:
    """The table that a hint, or a part of it, names."""
    return hint if isinstance(hint, OneOf) else next(filter(None, map(table_of, get_args(hint))), None)


def _pairs(shown: str, words: list[str]) -> dict[str, Any]:
    """`["queue=main", "cores=2"]` → keys and values; numbers, truth values and null are read as such."""
    pairs: dict[str, Any] = {}
    for word in words:
        key, equals, value = str(word).partition("=")
        if not equals or key in pairs:
            raise ConfigError(f"{shown}: expected KEY=VALUE, each key once, got {word!r}")
        pairs[key] = _SCALARS[value.lower()] if value.lower() in _SCALARS else _number(value, {int, float})
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


_SCALARS = {"true": True, "false": False, "null": None}
_INTEGER = re.compile(r"[+-]?[0-9]{1,999}")  # Python reads no more than 4,300 digits
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", Any: "a value"}
_BOUNDS = {"ge": "of at least {}", "gt": "above {}", "le": "of at most {}", "lt": "below {}"}


def describe(hint: Any) -> str:
    """A type in a user's words: `PositiveInt | None` → "an integer of at least 1"."""
    origin = get_origin(hint)
    if origin is Annotated:
        base, *metas = get_args(hint)
        if (table := table_of(hint)) and not table.also:
            return "one of " + ", ".join(table.rows())
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
