"""The command line: parses, sets up logging, calls one stage. Stages are imported only when they run."""

import argparse
import gc
import io
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field
from importlib import import_module
from typing import Any, NoReturn, get_origin

from aura_dist import __version__
from aura_dist.config.file import chosen, merge, read_config_file
from aura_dist.config.settings import flag, hints, resolve
from aura_dist.config.verbs import VERBS
from aura_dist.errors import AuraError, ConfigError, PeerError, RunInterruptedError

logger = logging.getLogger(__name__)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class _Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors, our own help of a verb, and `-1e-3` as a number."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"-([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$|-inf$")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")

    def format_help(self) -> str:
        verb = self.prog.partition(" ")[2]
        if verb not in VERBS:
            return super().format_help()
        from aura_dist.config.help import verb_help

        return verb_help(verb, shutil.get_terminal_size().columns - 2)


class _Once(argparse.Action):
    """Stores one value; a second one would silently replace the first."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if hasattr(namespace, self.dest):
            raise argparse.ArgumentError(self, "expected once, got it twice")
        setattr(namespace, self.dest, values)


def build_parser(words: Sequence[str] = tuple(VERBS)) -> argparse.ArgumentParser:
    """The parser; it knows the settings of the verbs among `words` only, because making those of all takes time."""
    parser = _Parser(
        prog="aura-dist",
        description="Find the neurons that tell two classes of text apart, and whisper them down.",
        epilog="`aura-dist VERB --help` shows a verb's settings and an example.",
    )
    parser.add_argument("--version", action="version", version=f"aura-dist {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.summary)
        if name in words:
            sub.add_argument("--config", action=_Once, default=argparse.SUPPRESS)
            sub.add_argument("--debug", action="store_true")
            sub.add_argument("--check", action="store_true")
            types = {} if verb.other is None else hints(verb.other[1].config)
            types |= hints(verb.config)
            for spec in verb.settings.values():
                if not spec.metadata["file_only"]:
                    _add_option(sub, spec, types[spec.name])
    return parser


def _add_option(parser: argparse.ArgumentParser, spec: "Field[Any]", hint: Any) -> None:
    several = get_origin(hint) in (list, dict)
    if place := spec.metadata["place"]:  # optional for the parser, because a file may have it
        parser.add_argument(spec.name, nargs="*" if several else "?", metavar=place, default=argparse.SUPPRESS)
    elif hint is bool:
        parser.add_argument(flag(spec.name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
    elif several:
        parser.add_argument(flag(spec.name), nargs="+", action="extend", default=argparse.SUPPRESS)
    else:
        parser.add_argument(flag(spec.name), action=_Once, default=argparse.SUPPRESS)


def run(argv: Sequence[str] | None = None) -> None:
    """Parse `argv` and run its verb's stage; AuraError if what the user asked for cannot be done."""
    words = sys.argv[1:] if argv is None else argv
    flags = vars(build_parser(words).parse_args(words))
    name, config_path, debug, only_check = (flags.pop(key, None) for key in ("verb", "config", "debug", "check"))
    document = read_config_file(config_path) if config_path else {}
    settings, verb = merge(name, document, flags), chosen(name, document, flags)
    config: Any = resolve(verb.config, settings)
    if only_check:
        return

    from aura_dist.ranks.process import configure_logging, keep_freed_memory

    configure_logging(debug=debug)
    sections = [s for s in (document, *document.values()) if isinstance(s, dict) and verb.takes_file]
    trusts = getattr(config, "trust_remote_code", any(s.get("trust_remote_code") for s in sections))
    if trusts and "trust_remote_code" not in flags:
        logger.warning("%s sets trust_remote_code: code that comes with the model may run on this machine", config_path)
    keep_freed_memory()
    gc.disable()  # what imports make stays, and to look for garbage in between takes an eighth of the time
    try:
        stage = import_module(f"aura_dist.{verb.stage}")
    finally:
        gc.enable()
    stage.run(config, *([document] if verb.takes_file else []))


@contextmanager
def _without_questions() -> Iterator[None]:
    """Within the context standard input is empty, so that no library can ask something there and wait."""
    given = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = given


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `aura-dist`; returns the exit code.

    0, 2 for a user's error, and 128 + the signal's number where a signal ended the work in an orderly way.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # results are shown in any encoding, once they are there
    try:
        with _without_questions():
            run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, as `head` does; nor shall the interpreter's last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except RunInterruptedError as error:
        from aura_dist.ranks.signals import ignore_another

        ignore_another()
        print("stopped:", error, file=sys.stderr)
        return 128 + error.signal_number
    except PeerError as error:
        logging.getLogger("aura_dist").info("ended, because another rank failed: %s", error)
        return EXIT_USER_ERROR
    except AuraError as error:
        if "--debug" in arguments:
            import traceback

            traceback.print_exc()
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("error: interrupted; a store keeps its finished tasks: run the same command to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
