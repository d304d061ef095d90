"""Shards: files that each hold many chunks of an array. A shard is written whole; a chunk is read alone and checked.

The format is Zarr's codec `sharding_indexed` (zarr-specs, codecs/sharding-indexed): the chunks one after the other,
then the index, (offset, length) of every chunk in C order as little-endian uint64, then the index's CRC32C. Both are
2**64 − 1 for a chunk that is left out. A chunk here is Blosc (lz4, byte shuffle) and the CRC32C of that.

zarrs 0.2.3 does not check a chunk that it reads out of a shard, and it writes files in place. So shards are encoded and
decoded here, with the libraries that zarr itself uses.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore

from aura_dist.store.zarr_adapter import chunk_key, run_in_zarr

Shape = tuple[int, ...]
Region = tuple[slice, ...]
Write = Callable[[], Coroutine[Any, Any, None]]

_LEVEL = 5
_CHECKSUM_BYTES, _ENTRY_BYTES = 4, 16
_LEFT_OUT = 2**64 - 1
_DECODED_BYTES = slice(4, 8)  # where Blosc's header says how many bytes it holds
# what a killed process may leave beside a shard; the shard's next writer replaces it
PARTIAL = ".partial"


class ShardError(ValueError):
    """A shard is missing or damaged; the text names its file."""


def in_our_format(array: "zarr.Array[Any]") -> bool:
    """Whether the chunks of an array are in shards, and encoded as here."""
    codecs: Any = array.metadata.to_dict()["codecs"]
    if [codec["name"] for codec in codecs] != ["sharding_indexed"]:
        return False
    how = codecs[0]["configuration"]
    names = [[codec["name"] for codec in how[part]] for part in ("codecs", "index_codecs")]
    return names == [["bytes", "blosc", "crc32c"], ["bytes", "crc32c"]] and how["index_location"] == "end"


def encode_shard(values: NDArray[Any], shard: Shape, chunks: Shape, fill_value: Any) -> bytes:
    """A shard of this shape whose first cells are `values`; chunks that hold none of them are left out."""
    if any(n % chunk for n, chunk in zip(values.shape, chunks, strict=True)):
        whole = tuple(-(-n // chunk) * chunk for n, chunk in zip(values.shape, chunks, strict=True))
        padded = np.full(whole, fill_value, values.dtype)
        padded[tuple(slice(n) for n in values.shape)] = values
        values = padded
    index = np.full((*_grid(shard, chunks), 2), _LEFT_OUT, "<u8")
    parts, end = [], 0
    for place in np.ndindex(*_grid(values.shape, chunks)):
        part = values[tuple(slice(i * chunk, (i + 1) * chunk) for i, chunk in zip(place, chunks, strict=True))]
        content = blosc.compress(np.ascontiguousarray(part), b"lz4", _LEVEL, blosc.SHUFFLE, 0)
        parts += [content, _checksum(content)]
        index[place] = end, len(content) + _CHECKSUM_BYTES
        end += len(content) + _CHECKSUM_BYTES
    described = index.tobytes()
    return b"".join([*parts, described, _checksum(described)])


def decode_index(tail: bytes, num_chunks: int) -> NDArray[np.uint64]:
    """[chunk, 2] offset and length of each chunk, from a shard's last bytes; ValueError if they are damaged."""
    if len(tail) != index_bytes(num_chunks):
        raise ValueError("it is cut short")
    _check(tail, "the checksum of its index is wrong")
    return np.frombuffer(tail, "<u8", 2 * num_chunks).reshape(num_chunks, 2)


def decode_chunk(content: bytes, target: NDArray[Any]) -> None:
    """Decode a chunk into an array of its shape and dtype; ValueError if it is damaged."""
    _check(content, "the checksum of a chunk in it is wrong")
    content = content[:-_CHECKSUM_BYTES]
    if int.from_bytes(content[_DECODED_BYTES], "little") != target.nbytes:
        raise ValueError("a chunk in it has another size")
    if target.flags.c_contiguous:
        blosc.decompress(content, target)
    else:
        target[...] = np.frombuffer(blosc.decompress(content), target.dtype).reshape(target.shape)


def index_bytes(num_chunks: int) -> int:
    """Size of a shard's index with its checksum."""
    return _ENTRY_BYTES * num_chunks + _CHECKSUM_BYTES


def _checksum(content: bytes) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(_CHECKSUM_BYTES, "little")


def _check(content: bytes, otherwise: str) -> None:
    if _checksum(content[:-_CHECKSUM_BYTES]) != content[-_CHECKSUM_BYTES:]:
        raise ValueError(otherwise)


def _grid(shape: Shape, chunks: Shape) -> Shape:
    return tuple(-(-n // chunk) for n, chunk in zip(shape, chunks, strict=True))


def chunk_name(array: "zarr.Array[Any]", chunk: Shape) -> str:
    """The path of the file of a chunk or shard, or its URL; for messages."""
    place = array.store.root if isinstance(array.store, LocalStore) else array.store
    return f"{place}/{chunk_key(array, chunk)}"


def read_chunks(
    array: "zarr.Array[Any]", region: Region, target: NDArray[Any] | None = None, *, complete: bool
) -> NDArray[Any]:
    """Values of a region that is whole chunks, also at the array's end, where it goes beyond the array.

    They are read into `target` if it is given, an array of the region's shape. ShardError if a shard is damaged, or is
    missing although `complete`; else what is missing reads as the array's fill value.
    """
    if target is None:
        target = np.empty([s.stop - s.start for s in region], array.dtype)
    shards = list(_shards(array, region))
    if isinstance(array.store, LocalStore):
        found: Iterator[Sequence[bytes] | ValueError | None] = (_read_file(array, *shard) for shard in shards)
    else:
        found = iter(run_in_zarr(_request_all(array, shards)))
    for (shard, chunks), contents in zip(shards, found, strict=True):
        if contents is None and complete:
            raise ShardError(f"the chunk {chunk_name(array, shard)!r} is missing")
        try:
            if isinstance(contents, ValueError):
                raise contents
            for place, (_, part) in enumerate(chunks):
                content = contents[place] if contents else b""
                if content:
                    decode_chunk(content, target[part])
                else:
                    target[part] = array.fill_value
        except (ValueError, RuntimeError) as error:  # RuntimeError: Blosc's own
            raise ShardError(f"the chunk {chunk_name(array, shard)!r} is damaged: {error}") from error
    return target


# a shard's chunks that are wanted: place in its index, and region in what is read
_Wanted = list[tuple[int, Region]]


def _shards(array: "zarr.Array[Any]", region: Region) -> Iterator[tuple[Shape, _Wanted]]:
    """Every shard that a region is in, and the chunks of it that are in the region."""
    assert array.shards is not None
    per_shard = _grid(array.shards, array.chunks)
    firsts = [s.start // chunk for s, chunk in zip(region, array.chunks, strict=True)]
    ends = [-(-s.stop // chunk) for s, chunk in zip(region, array.chunks, strict=True)]
    grid = [range(a // n, -(-b // n)) for a, b, n in zip(firsts, ends, per_shard, strict=True)]
    for shard in product(*grid):
        bounds = zip(shard, firsts, ends, per_shard, strict=True)
        within = [range(max(a, i * n), min(b, (i + 1) * n)) for i, a, b, n in bounds]
        wanted = []
        for chunk in product(*within):
            place = np.ravel_multi_index([c % n for c, n in zip(chunk, per_shard, strict=True)], per_shard)
            offsets = [(c - a) * n for c, a, n in zip(chunk, firsts, array.chunks, strict=True)]
            wanted.append((int(place), tuple(slice(o, o + n) for o, n in zip(offsets, array.chunks, strict=True))))
        yield shard, wanted


def _num_chunks(array: "zarr.Array[Any]") -> int:
    assert array.shards is not None
    return prod(_grid(array.shards, array.chunks))


def _read_file(array: "zarr.Array[Any]", shard: Shape, wanted: _Wanted) -> list[bytes] | ValueError | None:
    """Contents of chunks of a shard, empty where one is left out; None if there is no shard."""
    assert isinstance(array.store, LocalStore)
    num_chunks = _num_chunks(array)
    try:
        file = os.open(array.store.root / chunk_key(array, shard), os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        size = index_bytes(num_chunks)
        index = decode_index(os.pread(file, size, max(0, os.fstat(file).st_size - size)), num_chunks)
        return [os.pread(file, n, at) if at != _LEFT_OUT else b"" for at, n in (index[i].tolist() for i, _ in wanted)]
    except ValueError as error:
        return error
    except OSError as error:
        return ValueError(str(error))
    finally:
        os.close(file)


async def _request_all(
    array: "zarr.Array[Any]", shards: Sequence[tuple[Shape, _Wanted]]
) -> list[list[bytes] | ValueError | None]:
    return await asyncio.gather(*(_request(array, *shard) for shard in shards))


async def _request(array: "zarr.Array[Any]", shard: Shape, wanted: _Wanted) -> list[bytes] | ValueError | None:
    """As `_read_file`, from any store: the index, then all wanted chunks in one request, because they are close."""
    key, num_chunks, kind = chunk_key(array, shard), _num_chunks(array), default_buffer_prototype()
    tail = await array.store.get(key, kind, SuffixByteRequest(index_bytes(num_chunks)))
    if tail is None:
        return None
    try:
        index = decode_index(tail.to_bytes(), num_chunks)
    except ValueError as error:
        return error
    places = [tuple(index[i].tolist()) for i, _ in wanted]
    there = [(at, at + n) for at, n in places if at != _LEFT_OUT]
    if not there:
        return [b""] * len(wanted)
    start, stop = min(at for at, _ in there), max(end for _, end in there)
    content = await array.store.get(key, kind, RangeByteRequest(start, stop))
    if content is None:
        return None
    held = content.to_bytes()
    return [held[at - start : at - start + n] if at != _LEFT_OUT else b"" for at, n in places]


def shard_writes(
    array: "zarr.Array[Any]", start: Shape, values: NDArray[Any], partial: str = PARTIAL, *, ragged: bool = False
) -> Iterator[Write]:
    """Functions that each write one whole shard of `values`, which begin at `start` and end with a shard or the array.

    `ragged` values may end within a shard: its other chunks are left out. A local file is written beside the shard,
    under its name and `partial`, and then renamed: it is whole or not there.
    """
    assert array.shards is not None
    for place in np.ndindex(*_grid(values.shape, array.shards)):
        part = values[tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, array.shards, strict=True))]
        shard = tuple(first // n + i for first, n, i in zip(start, array.shards, place, strict=True))
        ends = [min((i + 1) * n, size) for i, n, size in zip(shard, array.shards, array.shape, strict=True)]
        begins = [i * n for i, n in zip(shard, array.shards, strict=True)]
        assert ragged or part.shape == tuple(np.subtract(ends, begins)), (array.path, shard, part.shape)
        yield _shard_write(array, shard, part, partial)


def _shard_write(array: "zarr.Array[Any]", shard: Shape, values: NDArray[Any], partial: str) -> Write:
    assert array.shards is not None
    layout, key = (array.shards, array.chunks, array.fill_value), chunk_key(array, shard)

    def to_file(path: Path) -> None:
        replace_file(path, encode_shard(values, *layout), partial)

    async def write() -> None:
        if isinstance(array.store, LocalStore):
            await asyncio.to_thread(to_file, array.store.root / key)
        else:
            content = await asyncio.to_thread(encode_shard, values, *layout)
            await array.store.set(key, cpu.Buffer.from_bytes(content))

    return write


def replace_file(path: Path, content: bytes, partial: str) -> None:
    """Write a file whole: beside it, under its name and `partial`, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + partial)
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
