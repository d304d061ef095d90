"""A file of settings: read strictly, and merged with the flags for one verb."""

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from aura_dist.config.settings import flag
from aura_dist.config.verbs import VERBS, Verb
from aura_dist.errors import ConfigError, brief

MAX_DEPTH = 50


def read_config_file(path: str) -> dict[str, Any]:
    """The YAML document at `path`; ConfigError if it is missing, malformed or not a mapping."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"config file {path!r} cannot be read: {error}") from error
    try:
        _check_depth(path, text)
        document = yaml.safe_load(text)
        tree: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    except ConfigError:
        raise
    except Exception as error:  # a value that is not what its form or tag says fails as Python's own types do
        raise ConfigError(f"config file {path!r} is not valid YAML: {brief(error)}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"config file {path!r}: expected keys and values, got a {type(document).__name__}")
    _check_distinct(path, tree)
    for key, section in tree.value:
        if key.value in VERBS and section.id == "mapping":
            _check_distinct(path, section)
    return document


def _check_depth(path: str, text: str) -> None:
    """ConfigError for deeper nesting than any setting has, on which YAML's own reader would fill the stack."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"config file {path!r}: expected verbs and their settings, got deeper nesting")


def _check_distinct(path: str, tree: Any) -> None:
    """ConfigError for a key that one mapping has twice, because YAML would silently take the last."""
    seen: set[str] = set()
    for key, _ in tree.value:
        if key.value in seen:
            raise ConfigError(
                f"config file {path!r}, line {key.start_mark.line + 1}: expected each key once, got {key.value!r} again"
            )
        seen.add(key.value)


def merge(verb: str, document: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Settings of `verb`; the last one counts of: top of the file, section it inherits, its own section, flags.

    ConfigError if no verb knows a key, a section's verb does not, or a setting on top would act twice.
    """
    known = {name: set(v.settings) for name, v in VERBS.items()}
    shared = set().union(*known.values())
    for key, value in document.items():
        if key in VERBS:
            if not isinstance(value, dict | None):
                raise ConfigError(f"config section {key!r}: expected keys and values, got {value!r}")
            for name in value or {}:
                _check_key(str(name), known[key], f"config section {key!r}")
        else:
            _check_key(str(key), shared | set(VERBS), "config file")
    record, own = chosen(verb, document, flags), {**(document.get(verb) or {}), **flags}
    taken = {f.name for f in fields(record.config)}
    check_taken(verb, record, own)
    top = {k: v for k, v in document.items() if k not in VERBS and k in taken - record.unshared}
    for name in top:
        _check_once(verb, document, flags, name)
    inherited = document.get(record.inherits or "") or {}
    return {**top, **{k: v for k, v in inherited.items() if k not in record.not_inherited}, **own}


def chosen(verb: str, document: dict[str, Any], flags: dict[str, Any]) -> Verb:
    """The verb that file and flags ask for: that of this name, or the other one that a setting turns it into."""
    return VERBS[verb].chosen({**document, **(document.get(verb) or {}), **flags})


def check_taken(verb: str, record: Verb, given: dict[str, Any]) -> None:
    """ConfigError if a setting is given that belongs to another form of the verb than `record`."""
    taken, other = {f.name for f in fields(record.config)}, VERBS[verb].other
    for name in given:
        if name not in taken and other is not None:
            switch, got = flag(other[0]), ("without" if record is VERBS[verb] else "with")
            expected = "with" if got == "without" else "without"
            raise ConfigError(f"{flag(name)}: expected it {expected} {switch}, got it {got}; leave it out")


def _check_once(verb: str, document: dict[str, Any], flags: dict[str, Any], name: str) -> None:
    """ConfigError if a setting on top of a file acts in what a verb writes, and again where that is used."""
    for writer, record in VERBS.items():
        again_in = next((f.metadata["again_in"] for f in fields(record.config) if f.name == name), ())
        writes = verb == writer or writer in document
        elsewhere = name in (document.get(writer) or {}) or (verb == writer and name in flags)
        if writes and not elsewhere and not document.keys().isdisjoint(again_in):
            sections = ", ".join(key for key in again_in if key in VERBS)
            raise ConfigError(
                f"config file: expected {name!r} in one section, got it on top, where {writer} would write it into its "
                f"result, and each use of the result apply it again; move it to a section of {sections} or {writer}"
            )


def _check_key(name: str, known: set[str], where: str) -> None:
    if name in known:
        return
    close = get_close_matches(name, known, n=1) or get_close_matches(name.replace("-", "_"), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(known))}"
    raise ConfigError(f"{where}: unknown key {name!r}{hint}")
