"""What `aura-dist VERB --help` shows: every setting with its type or values and its default, in groups; an example."""

import textwrap
from dataclasses import MISSING, Field, fields
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from msgspec import Meta

from aura_dist.config.options import GROUPS
from aura_dist.config.settings import default_of, flag, hints, table_of
from aura_dist.config.verbs import VERBS

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
    verb, types = VERBS[name], hints(VERBS[name].config)
    specs = [(spec, types[spec.name]) for spec in fields(verb.config)]
    required = [_written(*s) for s in specs if default_of(s[0]) is MISSING and not s[0].metadata["file_only"]]
    usage = " ".join([f"usage: aura-dist {name}", *required, "[settings]"])
    blocks = [_wrapped(usage, width, rest=" " * 11), _wrapped(verb.summary, width)]
    blocks += _groups(specs, width)
    example = [f"  aura-dist {name} {verb.example}"]
    if verb.other is not None:
        switch, other = verb.other
        types, shared = hints(other.config), {spec.name for spec, _ in specs}
        only = [(spec, types[spec.name]) for spec in fields(other.config) if spec.name not in shared]
        blocks += [_wrapped(f"settings with {flag(switch)} alone:", width), *_groups(only, width)]
        example.append(f"  aura-dist {name} {other.example}")
    blocks.append("\n".join(["every verb:", *(_entry(written, text, width) for written, text in GENERAL.items())]))
    return "\n\n".join([*blocks, "\n".join(["example:", *example, ""])])


def _groups(specs: list[tuple["Field[Any]", Any]], width: int) -> list[str]:
    """A block for each heading that some of the settings have."""
    blocks = []
    for group in GROUPS:
        entries = [_setting(spec, hint, width) for spec, hint in specs if spec.metadata["group"] == group]
        blocks += ["\n".join([f"{group}:", *entries])] if entries else []
    return blocks


def _setting(spec: "Field[Any]", hint: Any, width: int) -> str:
    """A setting, and below it each value that its table has, or the keys that it may hold."""
    default = default_of(spec)
    if default in (None, "", [], {}):
        default = spec.metadata["unset"]
    shown = " ".join(default) if isinstance(default, list) else default
    says = "required" if default is MISSING else f"default: {shown}"
    lines = [_entry(_written(spec, hint), f"{spec.metadata['help']} ({says})", width)]
    if table := table_of(hint):
        lines += [_entry(value, text.removesuffix("."), width, indent=6) for value, text in table.rows().items()]
    elif get_origin(hint) is dict and (keys := get_args(get_args(hint)[0])):
        lines.append(_entry("", f"KEY: {', '.join(keys)}", width))
    return "\n".join(lines)


def _written(spec: "Field[Any]", hint: Any) -> str:
    """A setting as one writes it: `--dtype {float32,bfloat16}`, `--concepts COLUMN …`, `--json / --no-json`."""
    several = " …" if get_origin(hint) in (list, dict) else ""
    if spec.metadata["place"]:
        return f"{spec.metadata['place']}{several}"
    if spec.metadata["file_only"]:
        return f"{spec.name}: (in the file)"
    if hint is bool:
        return f"{flag(spec.name)} / {flag('no_' + spec.name)}"
    return f"{flag(spec.name)} {_value(hint)}{several}"


def _value(hint: Any) -> str:
    """What help shows for a value: its type, or the values that are allowed."""
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return f"{{{','.join(arguments)}}}"
    if get_origin(hint) is dict:
        return "KEY=VALUE"
    if titles := [meta.title for meta in arguments if isinstance(meta, Meta) and meta.title]:
        return titles[0]
    if get_origin(hint) is Annotated and (table := table_of(hint)):
        return f"{{{','.join(table.rows())}}}" + (f"|{table.also}" if table.also else "")
    return _value(next(a for a in arguments if a is not NoneType)) if arguments else _TYPES[hint]


def _entry(written: str, text: str, width: int, indent: int = 2) -> str:
    """`written` on the left, `text` on the right, or below where there is no room."""
    left, below = " " * indent + written, " " * _COLUMN
    if len(left) > _COLUMN - 2:
        return f"{left}\n{_wrapped(text, width, below, below)}".rstrip()
    return _wrapped(text, width, left.ljust(_COLUMN), below) or left


def _wrapped(text: str, width: int, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text, max(width, 2 * _COLUMN), initial_indent=first, subsequent_indent=rest, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
