"""A store at a path or a URL, and its arrays: opening what is ours, reading whole chunks, writing whole chunks."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
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
from aura_dist.store.shards import Region, chunk_name, in_our_format, read_chunks
from aura_dist.store.zarr_adapter import chunk_key, fast_codecs, run_in_zarr, same_chunks

# Written with the group itself: a group that has it, even half-made, may be replaced; nothing else may.
FORMAT = "aura_dist"
SCHEMA_VERSION = 4
# Stores of these versions are read; `check_writable` refuses to write into those of an earlier one.
READ_VERSIONS = (3, SCHEMA_VERSION)
# The groups directly under a store's root.
MEMBERS = ("activations", "progress", "samples", "scores", "tokens")
# s3://…; also fsspec's simplecache::s3://…, which is refused instead of taken for a directory
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")

FIX = "fix the cause and run the same command again"


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


def get_sharded(group: zarr.Group, name: str) -> "zarr.Array[Any]":
    """An array of the store whose chunks are in shards, by its path; StoreError if it is missing or no such array."""
    array = get_array(group, name)
    if not in_our_format(array):
        raise damaged(group, name, "its chunks are not in shards, or in others than `collect` and `score` write")
    return array


def is_there(group: zarr.Group, name: str) -> bool:
    """Whether the store has an array or a group of this path; StoreError if its description is damaged."""
    try:
        return name in group
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(group, name, error) from error


def in_whole_chunks(array: "zarr.Array[Any]") -> "zarr.Array[Any]":
    """A handle on the same chunks, not in shards, whose shape is a multiple of theirs: it reads whole chunks.

    The Rust pipeline checks the checksum of a chunk only where it decodes all of the chunk.
    """
    shape = tuple(ceil(n / chunk) * chunk for n, chunk in zip(array.shape, array.chunks, strict=True))
    return same_chunks(array, shape)


def read_array(group: zarr.Group, name: str, *, complete: bool = False) -> NDArray[Any]:
    """All of an array of the store; StoreError if it is missing or damaged, or lacks a chunk although `complete`."""
    array = get_array(group, name)
    return read_region(group, array, tuple(slice(0, n) for n in array.shape), complete=complete)


def read_region(group: zarr.Group, array: "zarr.Array[Any]", region: Region, *, complete: bool = False) -> NDArray[Any]:
    """Values of a region that begins with a chunk; whole chunks are read, because only then are they checked.

    StoreError if a chunk is damaged, or is missing although `complete`; else what is missing reads as fill values.
    """
    stops = [ceil(s.stop / chunk) * chunk for s, chunk in zip(region, array.chunks, strict=True)]
    whole = tuple(slice(s.start, stop) for s, stop in zip(region, stops, strict=True))
    try:
        if array.shards is not None:
            values = read_chunks(array, whole, complete=complete)
        else:
            if complete:
                _check_complete(array, whole)
            values = np.asarray(in_whole_chunks(array)[whole])
    except StoreError:  # the store could not be reached
        raise
    except Exception as error:  # the codec pipeline raises its own kinds
        raise damaged(group, array.path, error) from error
    return values[tuple(slice(s.stop - s.start) for s in region)]


def _check_complete(array: "zarr.Array[Any]", whole: Region) -> None:
    """ValueError if a chunk of a region is missing."""
    grid = [range(s.start // chunk, s.stop // chunk) for s, chunk in zip(whole, array.chunks, strict=True)]
    for chunk in missing_chunks(array, product(*grid)):
        raise ValueError(f"the chunk {chunk_name(array, chunk)!r} is missing")


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
    """The argument that opens `--store` in Zarr: a directory's path, or the store at a URL.

    StoreError if there is no store for such a URL.
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


def is_vacant(path: str) -> bool:
    """Whether nothing is at a path or a URL; StoreError if it can only be read, or cannot be reached."""
    return _is_empty(store_at(path))


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


def open_group(path: str, *, must_be_created: bool = True, to_write: bool = False) -> zarr.Group:
    """The store's root group; StoreError if it is missing, half-made, of another schema or no store.

    At a URL, what only reads takes the consolidated metadata, which are one request.
    """
    place = store_at(path)
    consolidated = None if isinstance(place, RemoteStore) and must_be_created and not to_write else False
    try:
        with fast_codecs():
            # most URLs do not tell beforehand whether they can be written
            writable = not place.read_only if isinstance(place, RemoteStore) else os.access(place, os.W_OK)
            group = zarr.open_group(place, mode="r+" if writable else "r", zarr_format=3, use_consolidated=consolidated)
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
    if version not in READ_VERSIONS:
        raise StoreError(
            f"--store {path!r}: expected schema version {SCHEMA_VERSION}, got {version}; "
            "read it with the version of aura_dist that wrote it"
        )
    return group


def is_current(group: zarr.Group) -> bool:
    """Whether the store is of this schema; stores of earlier ones are only read."""
    return group.attrs.get("schema_version") == SCHEMA_VERSION


def check_writable(path: str, group: zarr.Group) -> None:
    """StoreError for a store of an earlier schema."""
    version = group.attrs["schema_version"]
    if not is_current(group):
        raise StoreError(
            f"--store {path!r}: expected schema version {SCHEMA_VERSION} to write into, got {version}, which is only "
            f"read; renew it with `aura-dist convert --store {path} --to store --out NEW`"
        )


def missing_chunks(array: "zarr.Array[Any]", chunks: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Which of `chunks` (indices in the chunk grid) were never written, and so would read as fill values."""
    wanted = list(chunks)
    if isinstance(array.store, LocalStore):
        return [c for c in wanted if not (array.store.root / chunk_key(array, c)).is_file()]
    assert isinstance(array.store, RemoteStore)
    there = array.store.existing([chunk_key(array, c) for c in wanted])
    return [c for c, exists in zip(wanted, there, strict=True) if not exists]


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
