"""Copies of decoder layers on a local disk, for a checkpoint on a slow shared file system (`--layer-cache`).

A layer is a safetensors file with the checkpoint's own bytes, so that it loads as the checkpoint does. Weights that are
used in their files begin at the same remainder by `_ALIGNED` there, because products may differ by a rounding with it.
One process of a host copies a layer, and the file gets its name when it is whole; other processes read the checkpoint
meanwhile. Each process compares the checksum of a file that it did not write once. Where the disk is full, layers
without a copy are read from the checkpoint.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aura_dist.errors import ConfigError, ModelError, brief
from aura_dist.models.adapter import MergedWeight
from aura_dist.models.digests import stamp
from aura_dist.models.weights import Source, Stored, as_bytes, header, open_weights, write_all

logger = logging.getLogger(__name__)

_ALIGNED = 64
_PADDING = "aura_dist.padding."  # and a tensor's name: bytes that move this tensor to its remainder
_CHECKSUM = "crc32c"
_PIECE_BYTES = 4 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)

Tensors = Mapping[str, Any]  # a checkpoint's tensors by name; each is read when it is indexed
Places = Mapping[str, tuple[Source, Stored]]  # name of such a tensor → the file that holds its bytes, and where


class LayerCache:
    """The copies of the layers of a checkpoint, in a directory of their own within `folder`.

    Another checkpoint, and one whose files have changed, has another directory. ConfigError if it cannot be made.
    """

    def __init__(self, folder: str, files: Sequence[Path]) -> None:
        self._given = folder
        which = json.dumps([stamp(file) for file in files])
        self._folder = Path(folder) / hashlib.sha256(which.encode()).hexdigest()[:32]
        self._checked: set[int] = set()
        self._writes = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in _FULL:
                raise ConfigError(
                    f"--layer-cache {folder!r}: expected a directory that can be written, got {brief(error)}; name one "
                    "on a disk of this machine"
                ) from error
            self._stop(error)

    def take(self, index: int, tensors: Tensors, opened: ExitStack) -> tuple[Tensors, Places] | None:
        """The layer with these tensors from its copy, which `opened` keeps open; None if there is no good copy."""
        path = self._path(index)
        if not path.is_file():
            return None
        try:
            source = opened.enter_context(open_weights(path))
            places = {t.name: (source, t) for t in source.tensors if not t.name.startswith(_PADDING)}
            if places.keys() != tensors.keys():
                raise ModelError("it has other tensors")
            if index not in self._checked and _checksum(source) != source.metadata.get(_CHECKSUM):
                raise ModelError("its checksum is wrong")
            copy = opened.enter_context(safe_open(path, framework="pt", device="cpu"))
            found = {name: _in_copy(tensors[name], copy.get_slice(name), *place) for name, place in places.items()}
        except (OSError, ModelError, SafetensorError) as error:
            logger.warning("--layer-cache: %s is damaged and is made again: %s", path, brief(error))
            with suppress(OSError):
                path.unlink()
            return None
        self._checked.add(index)
        return found, places

    def keep(self, index: int, tensors: Tensors, places: Places) -> None:
        """Copy a layer, unless that is done, another process does it, or the disk was full before."""
        path = self._path(index)
        if not tensors or not self._writes or path.is_file():
            return
        try:
            with _turn(path) as file:
                if file is not None:
                    _write(file, _blocks(tensors, places))
                    self._checked.add(index)
        except OSError as error:
            self._stop(error)

    def _path(self, index: int) -> Path:
        return self._folder / f"layer-{index:05}.safetensors"

    def _stop(self, error: OSError) -> None:
        self._writes = False
        logger.warning(
            "--layer-cache %s cannot be written (%s): layers without a copy are read from the checkpoint",
            self._given, brief(error),
        )  # fmt: skip


def _in_copy(tensor: Any, in_copy: Any, source: Source, stored: Stored) -> Any:
    """What takes the place of a checkpoint's tensor; an adapter is added to what is read from the copy too."""
    return replace(tensor, file=source, stored=stored) if isinstance(tensor, MergedWeight) else in_copy


@contextmanager
def _turn(path: Path) -> Iterator[int | None]:
    """Descriptor of an empty file that becomes `path` at the end; None if another process has the turn, or had it.

    The lock ends with the process, so a file that a killed process left is written by the next.
    """
    aside = path.with_suffix(".part")
    file = os.open(aside, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _locked(file, aside):
            yield None
            return
        try:
            os.ftruncate(file, 0)
            yield file
            aside.replace(path)
        except BaseException:
            with suppress(OSError):
                aside.unlink()
            raise
    finally:
        os.close(file)


def _locked(file: int, aside: Path) -> bool:
    """Lock a file; False if another process holds the lock, or has renamed the file since it was opened."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(file).st_ino == aside.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _blocks(tensors: Tensors, places: Places) -> Iterator[tuple[Stored, Iterable[bytes]]]:
    """Each tensor with its offsets in the copy, from the header's end, and its bytes; paddings between them."""
    at = 0
    for name, tensor in tensors.items():
        source, stored = places[name]
        begin = tensor.data_ptr() if isinstance(tensor, Tensor) else stored.start
        if gap := (begin - at) % _ALIGNED:
            yield Stored(_PADDING + name, "U8", (gap,), at, at + gap), [bytes(gap)]
            at += gap
        size = stored.stop - stored.start
        yield replace(stored, start=at, stop=at + size), _pieces(source, stored)
        at += size


def _pieces(source: Source, stored: Stored) -> Iterator[bytes]:
    for start in range(stored.start, stored.stop, _PIECE_BYTES):
        piece = torch.empty(min(_PIECE_BYTES, stored.stop - start), dtype=torch.uint8)
        source.read(start, piece)
        yield bytes(as_bytes(piece))


def _write(file: int, blocks: Iterable[tuple[Stored, Iterable[bytes]]]) -> None:
    """Write a layer, and then its checksum into the header."""
    blocks = list(blocks)
    layout = [stored for stored, _ in blocks]
    at, crc = len(header(layout, {_CHECKSUM: _shown(0)}, _ALIGNED)), _of_layout(layout)
    for _, pieces in blocks:
        for piece in pieces:
            write_all(file, memoryview(piece), at)
            at, crc = at + len(piece), google_crc32c.extend(crc, piece)
    write_all(file, memoryview(header(layout, {_CHECKSUM: _shown(crc)}, _ALIGNED)), 0)


def _checksum(source: Source) -> str:
    """The checksum of a copy as it is now."""
    base = source.tensors[0].start
    crc = _of_layout([replace(t, start=t.start - base, stop=t.stop - base) for t in source.tensors])
    for stored in source.tensors:
        for piece in _pieces(source, stored):
            crc = google_crc32c.extend(crc, piece)
    return _shown(crc)


def _of_layout(layout: Sequence[Stored]) -> int:
    described = [[t.name, t.dtype, t.shape, t.start, t.stop] for t in layout]
    return int(google_crc32c.value(json.dumps(described).encode()))


def _shown(crc: int) -> str:
    return f"{crc:08x}"
