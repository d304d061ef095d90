"""A store at a path or a URL, and its arrays: opening what is ours, reading whole chunks, writing whole chunks."""

import os
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.storage import LocalStore

from aura_dist.errors import AuraError, StoreError, brief
from aura_dist.store.launches import MARK, others_at_work
from aura_dist.store.remote import RemoteStore, open_remote
from aura_dist.store.zarr_adapter import chunk_key, fast_codecs, run_in_zarr, same_chunks, set_values

# Written with the group itself: a group that has it, even half-made, may be replaced; nothing else may.
FORMAT = "aura_dist"
SCHEMA_VERSION = 3
# The groups directly under a store's root.
MEMBERS = ("activations", "progress", "samples", "scores")
# s3://…, and chained drivers such as simplecache::s3://…
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")

FIX = "fix the cause and run the same command again"

Write = Callable[[], Coroutine[Any, Any, None]]


def clear(path: str) -> None:
    """Remove the store at `path`, which must be one of ours or nothing; its own attributes go last.

    Marks of launches stay.

    If this is interrupted, the store that is left counts as never finished: the same command replaces it.
    """
    place = store_at(path)
    if _is_empty(place) or not _has_root(place):
        return
    group = open_group(path, must_be_created=False)
    assert group.attrs.get("format") == FORMAT, path
    group.attrs["created"] = False
    for name in MEMBERS:
        del group[name]
    run_in_zarr(group.store.delete("zarr.json"))


def get_array(group: zarr.Group, name: str) -> "zarr.Array[Any]":
    """An array of the store by its path; StoreError if it is missing or its description is damaged."""
    try:
        with fast_codecs():
            array = group[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(group, name, error) from error
    if not isinstance(array, zarr.Array):
        raise damaged(group, name, "it is a group")
    return array


def is_there(group: zarr.Group, name: str) -> bool:
    """Whether the store has an array or a group of this path; StoreError if its description is damaged."""
    try:
        return name in group
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(group, name, error) from error


def in_whole_chunks(array: "zarr.Array[Any]") -> "zarr.Array[Any]":
    """A handle on the same chunks whose shape is a multiple of theirs: reading from it reads whole chunks.

    The Rust pipeline checks the checksum of a chunk only where it decodes all of the chunk.
    """
    shape = tuple(ceil(n / chunk) * chunk for n, chunk in zip(array.shape, array.chunks, strict=True))
    return same_chunks(array, shape)


def read_array(group: zarr.Group, name: str, *, complete: bool = False) -> NDArray[Any]:
    """All of an array of the store; StoreError if it is missing or damaged, or lacks a chunk although `complete`."""
    array = get_array(group, name)
    try:
        if complete:
            check_complete(group, array)
        return np.asarray(in_whole_chunks(array)[...])[tuple(slice(n) for n in array.shape)]
    except StoreError:  # the store could not be reached
        raise
    except Exception as error:  # the codec pipeline raises its own kinds
        raise damaged(group, name, error) from error


def check_complete(
    group: zarr.Group, array: "zarr.Array[Any]", chunks: Iterable[tuple[int, ...]] | None = None
) -> None:
    """StoreError if one of `chunks` (default: all) is missing, because it would read as fill values."""
    for chunk in missing_chunks(array, np.ndindex(*array.cdata_shape) if chunks is None else chunks):
        raise damaged(group, array.path, f"the chunk {chunk_name(array, chunk)!r} is not there")


def damaged(group: zarr.Group, name: str, why: BaseException | str) -> StoreError:
    """The error of a part of the store that cannot be used; it names the verb that makes this part."""
    verb = "score" if name.partition("/")[0] == "scores" else "collect"
    return StoreError(
        f"--store {str(group.store_path)!r}: expected an array {name!r}, found it missing or damaged: {brief(why)}; "
        f"{others_at_work(group.store, verb) or f'{verb} again with --overwrite'}"
    )


def local_path(store: str) -> Path | None:
    """The directory that `--store` names, as a path or a file:// URL; None for any other URL."""
    if not _URL.match(store):
        return Path(store)
    parts = urlsplit(store)
    return Path(unquote(parts.path)) if parts.scheme in ("file", "local") and not parts.netloc else None


def store_at(store: str) -> str | RemoteStore:
    """The argument that opens `--store` in Zarr: a directory's path, or for a URL its driver, with retries.

    StoreError if the URL has no driver here.
    """
    place = local_path(store)
    if place is None:
        return open_remote(store)
    return str(place.resolve() if place.is_symlink() else place)


def zarr_store(store: str) -> Store:
    """The Zarr store at a path or a URL; nothing is made or read yet."""
    place = store_at(store)
    return place if isinstance(place, RemoteStore) else LocalStore(place)


def store_around(place: Path) -> Path | None:
    """The store that a local path is or is within; None if there is none."""
    place = place.resolve()
    for directory in (place, *place.parents):
        file = directory / "zarr.json"
        if file.is_file() and f'"format": "{FORMAT}"' in file.read_text(encoding="utf-8", errors="replace"):
            return directory
    return None


def exists(path: str) -> bool:
    """Whether there is a store at `path`; one that was never finished being made does not count, and may be replaced.

    StoreError if something else is there, which is never replaced.
    """
    place = store_at(path)
    _check_not_nested(path)
    try:
        if _is_empty(place):  # first, because the root is what another launch makes first
            return False
        has_root = _has_root(place)
    except OSError as error:
        raise StoreError(f"--store {path!r} cannot be used: {error}") from error
    attributes = open_group(path, must_be_created=False).attrs if has_root else {}
    if attributes.get("format") != FORMAT:
        raise StoreError(f"--store {path!r}: expected a store or nothing, found something else; choose another path")
    return attributes.get("created") is True


def _check_not_nested(path: str) -> None:
    """StoreError for a place within another store: replacing that one would delete this."""
    place = local_path(path)
    other = None if place is None else store_around(place.resolve().parent)
    if other is not None:
        raise StoreError(f"--store {path!r}: expected a place outside any store, got one within {str(other)!r}")


def _is_empty(place: str | RemoteStore) -> bool:
    """Whether nothing is there but marks of launches."""
    if isinstance(place, RemoteStore):
        return place.is_vacant(MARK)
    directory = Path(place)
    return not directory.exists() or (
        directory.is_dir() and all(entry.name.startswith(MARK) for entry in directory.iterdir())
    )


def _has_root(place: str | RemoteStore) -> bool:
    if isinstance(place, RemoteStore):
        return place.existing(["zarr.json"])[0]
    return (Path(place) / "zarr.json").is_file()


def open_group(path: str, *, must_be_created: bool = True) -> zarr.Group:
    """The store's root group; StoreError if it is missing, half-made, of another schema or no store."""
    place = store_at(path)
    try:
        with fast_codecs():
            # a URL does not tell beforehand whether it can be written
            writable = isinstance(place, RemoteStore) or os.access(place, os.W_OK)
            group = zarr.open_group(place, mode="r+" if writable else "r", zarr_format=3)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # zarr.json may hold any JSON
        raise StoreError(f"--store {path!r}: expected a store that `collect` wrote, found none: {error}") from error
    if not must_be_created:
        return group
    if group.attrs.get("format") != FORMAT:
        raise StoreError(f"--store {path!r}: expected a store that `collect` wrote, found another Zarr group")
    if group.attrs.get("created") is not True:
        what_to_do = others_at_work(group.store, "collect") or "run `collect` again"
        raise StoreError(f"--store {path!r} was never finished being made; {what_to_do}")
    version = group.attrs.get("schema_version")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"--store {path!r}: expected schema version {SCHEMA_VERSION}, got {version}; "
            "read it with the version of aura_dist that wrote it"
        )
    return group


def missing_chunks(array: "zarr.Array[Any]", chunks: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Which of `chunks` (indices in the chunk grid) were never written, and so would read as fill values."""
    wanted = list(chunks)
    if isinstance(array.store, LocalStore):
        return [c for c in wanted if not (array.store.root / chunk_key(array, c)).is_file()]
    assert isinstance(array.store, RemoteStore)
    there = array.store.existing([chunk_key(array, c) for c in wanted])
    return [c for c, exists in zip(wanted, there, strict=True) if not exists]


def chunk_name(array: "zarr.Array[Any]", chunk: tuple[int, ...]) -> str:
    """The path of a chunk's file, or its URL; for messages."""
    place = array.store.root if isinstance(array.store, LocalStore) else array.store
    return f"{place}/{chunk_key(array, chunk)}"


def prepare_write(array: "zarr.Array[Any]", start: tuple[int, ...], values: NDArray[Any]) -> Write:
    """A function that writes `values` from `start` on: whole chunks, or up to the end of the array.

    The Rust pipeline leaves out chunks that hold only fill values (zarrs 0.2.3, whatever `write_empty_chunks` says).
    Python's pipeline writes these, because a missing chunk counts as lost. Call this outside of zarr's event loop: it
    may open an array, for which it takes a lock that another thread may hold while it waits for the loop.
    """
    assert all(first % chunk == 0 for first, chunk in zip(start, array.chunks, strict=True)), (start, array.chunks)
    left_out = list(_chunks_of_fill_values(array, values)) if isinstance(array.store, LocalStore) else []
    plain = same_chunks(array, by_python=True) if left_out else array

    def region(part: Sequence[slice]) -> tuple[slice, ...]:
        return tuple(slice(first + s.start, first + s.stop) for first, s in zip(start, part, strict=True))

    async def write() -> None:
        await set_values(array, region([slice(0, n) for n in values.shape]), values)
        for part in left_out:
            await set_values(plain, region(part), values[part])

    return write


def _chunks_of_fill_values(array: "zarr.Array[Any]", values: NDArray[Any]) -> Iterator[tuple[slice, ...]]:
    """The chunks of `values` that hold only the array's fill value; their first values are looked at first."""
    is_fill = np.isnan if np.isnan(array.fill_value) else array.fill_value.__eq__
    for index in np.argwhere(is_fill(values[tuple(slice(None, None, chunk) for chunk in array.chunks)])).tolist():
        bounds = zip(index, array.chunks, values.shape, strict=True)
        part = tuple(slice(i * chunk, min((i + 1) * chunk, n)) for i, chunk, n in bounds)
        if is_fill(values[part]).all():
            yield part


@contextmanager
def errors_of_writing(store: str, what: str = "") -> Iterator[None]:
    """Context that raises a StoreError where the store, or `what` of it, cannot be written."""
    try:
        yield
    except AuraError:
        raise
    # RuntimeError: from the Rust pipeline, where the disk is full; ValueError: the store was opened for reading only
    except (OSError, RuntimeError, ValueError) as error:
        name = f"--store {store!r}" + (f": {what}" if what else "")
        raise StoreError(f"{name} cannot be written: {brief(error)}; {FIX}") from error
