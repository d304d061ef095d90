"""Continuations on disk as they are made: one JSON line each, kept over interruptions.

Every rank appends to a part of its own beside the results and flushes each batch. Before and after a run rank 0 folds
the parts into one file. Each line names the settings that it was made under. Lines of other settings are dropped, and
so are lines that a killed process left incomplete. A second run that would write the same file is refused.
"""

import fcntl
import hashlib
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from glob import escape
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from aura_dist.errors import ConfigError, StoreError, brief
from aura_dist.evaluation.prompts import Pair, PromptFile, TokenizedPrompts
from aura_dist.evaluation.sampling import Decoding
from aura_dist.files import replacing

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def sampling_settings(how: Decoding) -> dict[str, Any]:
    """Everything of `how` that a single continuation depends on."""
    return {name: value for name, value in asdict(how).items() if name != "num_samples"}


def fixing_settings(
    engine: Mapping[str, Any], preprompt: str | None, prompts: PromptFile, tokenized: TokenizedPrompts, how: Decoding
) -> dict[str, Any]:
    """Everything that a continuation depends on; how many there are of a prompt does not matter.

    `engine` is `Engine.fixing`.
    """
    return {
        **engine,
        "preprompt": preprompt,
        "prompts": prompts.sha256,
        **({} if tokenized.changed is None else {"token_ids": tokenized.changed}),
        **sampling_settings(how),
    }


def settings_key(settings: Mapping[str, Any]) -> str:
    """A short digest of everything that fixes a continuation.

    Of a server, a digest of its `probe` follows after a dash: the same settings with another probe are other weights.
    """
    parts = [{name: value for name, value in settings.items() if name != "probe"}]
    parts += [{"probe": settings["probe"]}] if "probe" in settings else []
    return "-".join(hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16] for part in parts)


def journal_path(results: str) -> Path:
    """`results/aura.continuations.jsonl` for `results/aura.json`."""
    whole = Path(results).resolve()
    return whole.with_name(f"{whole.stem}.continuations.jsonl")


class Journal:
    """The continuations' file of one results file, for the settings of one `settings_key`."""

    def __init__(self, results: str, settings: str) -> None:
        self.path = journal_path(results)
        self.settings = settings
        self._unlock: Callable[[], object] | None = None

    def fold(self) -> tuple[int, int]:
        """Take the parts into the file; return how many continuations are kept, and how many lines were dropped.

        The file is replaced in one step and the parts go after it, so that an interruption loses nothing. ConfigError
        while another run has the file open, because its parts are not whole; this one has it until the journal is gone.
        StoreError if a server made the lines that has other weights by now.
        """
        self._unlock = self._unlock or weakref.finalize(self, _lock(self.path))
        parts = sorted(self.path.parent.glob(f"{escape(self.path.stem)}.part-*.jsonl"))
        files = [p for p in (self.path, *parts) if p.exists()]
        lines = sum(_count_lines(file) for file in files)
        records = self._read(files)
        if files:
            self.replace(records.values())
        for part in parts:
            part.unlink()
        return len(records), lines - len(records)

    def read(self) -> dict[Pair, Record]:
        """The continuations of these settings that are in the file, by (prompt, sample) in order.

        The file does not change while ranks append to their parts, so that all read the same.
        """
        return self._read([self.path] if self.path.exists() else [])

    def _read(self, files: Iterable[Path]) -> dict[Pair, Record]:
        found: dict[Pair, Record] = {}
        for file in files:
            for record in read_records(file):
                if record["settings"] == self.settings:
                    found[record["prompt"], record["sample"]] = record
                elif _without_probe(record["settings"]) == _without_probe(self.settings) is not None:
                    raise StoreError(
                        f"{str(file)!r}: expected the server to continue the probe greedily as it did when the run "
                        "began, got another continuation: its weights are others; give another --out, or, if they are "
                        "the same and two tokens are about as likely, run the command again"
                    )
        return dict(sorted(found.items()))

    def replace(self, records: Iterable[Record]) -> None:
        """Replace the file in one step; StoreError if it cannot be written."""
        try:
            with replacing(self.path) as aside, aside.open("w", encoding="utf-8") as file:
                file.writelines(_line(record) for record in records)
        except OSError as error:
            raise StoreError(f"{str(self.path)!r} cannot be written: {error}") from error

    @contextmanager
    def part(self, rank: int) -> Iterator[Callable[[Iterable[Record]], None]]:
        """Context of the part of one rank; its value appends a batch, and the first batch makes the file.

        The value raises StoreError if the disk is full or gone.
        """
        path = self.path.with_name(f"{self.path.stem}.part-{rank}.jsonl")
        file: TextIOWrapper | None = None

        def append(records: Iterable[Record]) -> None:
            nonlocal file
            try:
                file = file or path.open("a", encoding="utf-8")
                file.writelines(_line({"settings": self.settings, **record}) for record in records)
                file.flush()
            except OSError as error:
                raise StoreError(f"{str(path)!r} cannot be written: {error}") from error

        try:
            yield append
        except BaseException:
            if self._unlock is not None:  # the error holds the journal
                self._unlock()
                self._unlock = None
            raise
        finally:
            if file is not None:
                os.fsync(file.fileno())
                file.close()


def _without_probe(settings: object) -> str | None:
    """What of a `settings_key` is the same for all weights; None if they are part of it."""
    head, dash, _ = str(settings).partition("-")
    return head if dash else None


def _lock(results: Path) -> Callable[[], None]:
    """Keep other runs from a file until the value is called or the process ends; ConfigError if one has it."""
    path = results.with_name(f".{results.stem}.lock")
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # the first line that cannot be written says so
        return lambda: None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(lock).st_nlink:
            raise BlockingIOError("the run that had it is about to end")
    except BlockingIOError as error:
        os.close(lock)
        raise ConfigError(
            f"--out: expected no other run to write {str(results)!r}, got one that does; wait for it, end it, or give "
            "another --out"
        ) from error
    except OSError as error:  # as of Lustre mounted without flock
        logger.warning("%s cannot be locked (%s): take care that no second run writes it", results, brief(error))

    def unlock() -> None:
        with suppress(OSError):
            path.unlink()
        os.close(lock)

    return unlock


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"  # ASCII: no text can tear a line


def read_records(file: Path) -> Iterator[Record]:
    """The whole lines of a file; a line of a killed process is no JSON, or has no line break."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and {"settings", "prompt", "sample", "text"} <= record.keys():
                yield record


def _count_lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)
