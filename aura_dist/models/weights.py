"""A checkpoint's weight files: names, shapes and offsets of the tensors; bytes are read when they are asked for."""

import json
import os
import struct
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from aura_dist.errors import ModelError, brief

# dtypes that a scale can be folded into; the others are integers or quantised values
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# what both formats can hold, by its name in safetensors
STORED_DTYPES = FLOATS | {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor: its name, dtype as safetensors names it, shape, and place [start, stop) in its source, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Source(ABC):
    """An open weight file; leaving its context closes it."""

    tensors: Sequence[Stored]  # in the order of their places
    metadata: Mapping[str, str]  # from the file's header
    descriptor: int | None = None  # the file's, if `start` and `stop` of the tensors are offsets in it

    @abstractmethod
    def read(self, start: int, buffer: Tensor) -> None:
        """Fill `buffer` (uint8) with the bytes from `start` on; ModelError if the file ends before."""

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


def open_weights(path: Path) -> Source:
    """Open a safetensors file, or one in torch's own format (read as plain weights only).

    ModelError if the file is damaged, or holds something other than tensors.
    """
    try:
        return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)
    except ModelError:
        raise
    except Exception as error:  # a damaged file raises any error of its format
        raise ModelError(
            f"weight file {str(path)!r} is damaged: {brief(error)}; download the checkpoint again, or save it as "
            "safetensors"
        ) from error


class _Safetensors(Source):
    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            size = os.fstat(stream.fileno()).st_size
            if header_bytes > size - 8:
                raise ValueError("the header is cut off")
            header: dict[str, Any] = json.loads(stream.read(header_bytes))
            self.metadata = header.pop("__metadata__", {})
            tensors = _from_header(header, 8 + header_bytes, size)
            self.tensors = sorted(tensors, key=lambda t: (t.start, t.stop))
            self.descriptor = os.dup(stream.fileno())

    def read(self, start: int, buffer: Tensor) -> None:
        assert self.descriptor is not None
        view, at = as_bytes(buffer), 0
        while at < len(view):
            count = _read_into(view[at:], self.descriptor, start + at)
            if not count:
                raise ModelError(f"weight file {str(self._path)!r} ends early; download the checkpoint again")
            at += count


def _read_into(view: memoryview, descriptor: int, start: int) -> int:
    """Read at `start`, whatever other threads read; returns how many bytes there were, at most as many as asked for."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], start)
    part = os.pread(descriptor, len(view), start)  # macOS has this alone; it copies once more
    view[: len(part)] = part
    return len(part)


def _from_header(header: Mapping[str, Any], data: int, size: int) -> Iterable[Stored]:
    """The tensors of a file of `size` bytes, whose offsets count from the byte `data` on."""
    for name, entry in header.items():
        start, stop = (data + offset for offset in entry["data_offsets"])
        if not data <= start <= stop <= size:
            raise ValueError(f"expected {name!r} within {size} bytes, got bytes {start} to {stop}")
        yield Stored(name, entry["dtype"], tuple(entry["shape"]), start, stop)


class _Pickled(Source):
    """torch's own format; offsets count as if its tensors followed one another.

    Files are memory-mapped, except in the format's first version, which is no archive.
    """

    def __init__(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", mmap=is_zipfile(path), weights_only=True)
        self._values: list[Tensor] = []
        self.metadata = {"format": "pt"}
        found: list[Stored] = []
        at = 0
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.dtype not in _NAMES:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ModelError(
                    f"weight file {str(path)!r}: expected tensors, got {kind} at {name!r}; save it as safetensors"
                )
            self._values.append(tensor.detach())
            stop = at + tensor.numel() * tensor.element_size()
            found.append(Stored(name, _NAMES[tensor.dtype], tuple(tensor.shape), at, stop))
            at = stop
        self.tensors = found
        self._starts = [t.start for t in found]

    def read(self, start: int, buffer: Tensor) -> None:
        which = bisect_right(self._starts, start) - 1
        stored = self.tensors[which]
        assert start + buffer.numel() <= stored.stop, "a read stays within a tensor"
        at = start - stored.start
        if not self._values[which].is_contiguous():
            self._values[which] = self._values[which].contiguous()  # kept, because a tensor is read in many parts
        flat = self._values[which].reshape(-1).view(torch.uint8)
        buffer.copy_(flat[at : at + buffer.numel()])


def header(tensors: Iterable[Stored], metadata: Mapping[str, str], aligned: int = 8) -> bytes:
    """How a safetensors file begins: the header's length and the header; the data begins at a multiple of `aligned`.

    Offsets of the tensors count from the header's end.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for stored in tensors:
        place = [stored.start, stored.stop]
        entries[stored.name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": place}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % aligned)
    return len(text).to_bytes(8, "little") + text


def write_all(file: int, data: memoryview, at: int) -> None:
    """Write all of `data` to the file at `at`."""
    while data:
        count = os.pwrite(file, data, at)
        data, at = data[count:], at + count


def as_bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = values.view(torch.uint8).numpy()
    return memoryview(array)
