"""What `aura-dist VERB --help` shows: every setting with its type or values and its default, in groups; an example."""

import textwrap
from dataclasses import MISSING, Field, fields
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from msgspec import Meta

from aura_dist.config.settings import default_of, flag, hints, place_of, table_of
from aura_dist.config.verbs import GROUPS, VERBS

# of every verb: what is written, what it does
GENERAL = {
    "--config FILE": "YAML file of settings; flags override it (default: none)",
    "--check": "check the settings, and run nothing (default: False)",
    "--debug": "show debug messages, and tracebacks of errors (default: False)",
    "-h, --help": "show this",
}
_COLUMN = 26
_TYPES = {int: "INT", float: "FLOAT", str: "TEXT"}


def verb_help(name: str, width: int) -> str:
    """The page of one verb, at most `width` columns wide where words allow it."""
    verb = VERBS[name]
    types = hints(verb.config)
    specs = fields(verb.config)
    required = [spec for spec in specs if default_of(spec) is MISSING and not spec.metadata["file_only"]]
    usage = " ".join(
        [f"usage: aura-dist {name}", *(_written(spec, types[spec.name]) for spec in required), "[settings]"]
    )
    blocks = [_wrapped(usage, width, rest=" " * 11), _wrapped(verb.summary, width)]
    for group in GROUPS:
        lines = [line for spec in specs if spec.metadata["group"] == group for line in _setting(spec, types, width)]
        if lines:
            blocks.append("\n".join([f"{group}:", *lines]))
    lines = [line for written, text in GENERAL.items() for line in _entry(written, text, width)]
    blocks += ["\n".join(["every verb:", *lines]), f"example:\n  aura-dist {name} {verb.example}"]
    return "\n\n".join(blocks) + "\n"


def _setting(spec: "Field[Any]", types: dict[str, Any], width: int) -> list[str]:
    hint, default = types[spec.name], default_of(spec)
    says = "required" if default is MISSING else f"default: {_default(spec, default)}"
    lines = _entry(_written(spec, hint), f"{spec.metadata['help']} ({says})", width)
    table = table_of(hint)
    if table is not None and ("{" not in lines[0] or any(table.rows().values())):
        rows = table.rows() | ({table.also: ""} if "{" not in lines[0] and table.also else {})
        lines += [line for value, text in rows.items() for line in _entry(value, text, width, indent=6)]
    elif get_origin(hint) is dict and get_origin(get_args(hint)[0]) is Literal:
        lines += _wrapped(
            "KEY: " + ", ".join(get_args(get_args(hint)[0])), width, " " * _COLUMN, " " * _COLUMN
        ).splitlines()
    return lines


def _default(spec: "Field[Any]", default: Any) -> str:
    if default in (None, "", [], {}):
        return str(spec.metadata["unset"])
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


def _written(spec: "Field[Any]", hint: Any) -> str:
    """A setting as one writes it: `--dtype {float32,bfloat16}`, `--concepts COLUMN …`, `--json / --no-json`."""
    several = " …" if get_origin(hint) in (list, dict) else ""
    if place_of(spec):
        return f"{place_of(spec)}{several}"
    if spec.metadata["file_only"]:
        return f"{spec.name}: (in the file)"
    if hint is bool:
        return f"{flag(spec.name)} / {flag('no_' + spec.name)}"
    return f"{flag(spec.name)} {_value(hint)}{several}"


def _value(hint: Any) -> str:
    """What stands for a value: its type, or the values that are allowed."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "{" + ",".join(arguments) + "}"
    if origin is dict:
        return "KEY=VALUE"
    for meta in arguments:
        if isinstance(meta, Meta) and meta.title:
            return meta.title
    table = table_of(hint) if origin is Annotated else None
    if table is not None:
        choices = list(table.rows())
        return "|".join(["{" + ",".join(choices) + "}", *filter(None, [table.also])])
    if arguments:
        return _value(next(a for a in arguments if a is not NoneType))
    return _TYPES[hint]


def _entry(written: str, text: str, width: int, indent: int = 2) -> list[str]:
    """`written` on the left, `text` on the right, or below where there is no room."""
    first = " " * indent + written
    below = _wrapped(text, width, " " * _COLUMN, " " * _COLUMN).splitlines()
    if not below or len(first) > _COLUMN - 2:
        return [first, *below]
    return [first.ljust(_COLUMN) + below[0].lstrip(), *below[1:]]


def _wrapped(text: str, width: int, first: str = "", rest: str = "") -> str:
    lines = textwrap.wrap(
        text, max(width, 2 * _COLUMN), initial_indent=first, subsequent_indent=rest, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(lines)
