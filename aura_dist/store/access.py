"""Opening a store, at a path or a URL, and its arrays: with the fast codecs, and only if it is a store of ours."""

import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.array import AsyncArray
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import LocalStore

from aura_dist.errors import StoreError, brief
from aura_dist.store.remote import RemoteStore, open_remote

# written with the group itself: what has it, even half-made, is ours to replace; nothing else is
FORMAT = "aura_dist"
SCHEMA_VERSION = 3
# what lies directly under a store's root
MEMBERS = ("activations", "progress", "samples", "scores")
OPENED_WITH = {
    "codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
    "codec_pipeline.chunk_concurrent_maximum": 1,
    "array.write_empty_chunks": True,  # a chunk that is not there is one that was not written
}
_OPENING = threading.RLock()  # zarr takes such settings from a place that all threads share
# s3://…, and drivers chained as in simplecache::s3://…
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")


@contextmanager
def fast_codecs() -> Iterator[None]:
    """Context in which arrays are opened: they keep the Rust codec pipeline, many times faster than Python's.

    One thread a call: the chunks of a call lie in one directory, where making files in parallel only waits;
    parallelism comes from writing many arrays and from Dask. The setting is zarr's own and global, so opening
    takes a lock: no thread sees another's half-set context. Arrays at a URL get Python's pipeline whatever the
    setting: zarrs reads and writes local files alone.
    """
    import zarrs  # noqa: F401  (registers the pipeline)

    with _OPENING, zarr.config.set(OPENED_WITH):
        yield


@contextmanager
def plain_codecs() -> Iterator[None]:
    """The same with Python's codec pipeline, which writes chunks of fill values too."""
    pipeline = {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
    with _OPENING, zarr.config.set({**OPENED_WITH, **pipeline}):
        yield


def clear(path: str) -> None:
    """Remove the store at `path`, which must be one of ours or nothing; what marks it as ours goes last.

    A removal that is cut off leaves a store that counts as never finished, to be replaced by the same command.
    """
    place = store_at(path)
    if _is_empty(place) or not _has_root(place):
        return
    group = open_group(path, must_be_created=False)
    assert group.attrs.get("format") == FORMAT, path
    group.attrs["created"] = False
    for name in MEMBERS:
        del group[name]


def get_array(group: zarr.Group, name: str) -> "zarr.Array[Any]":
    """An array of the store by its path; StoreError if it is missing or its description is damaged."""
    try:
        with fast_codecs():
            array = group[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(group, name, error) from error
    if not isinstance(array, zarr.Array):
        raise damaged(group, name, "a group stands there")
    return array


def is_there(group: zarr.Group, name: str) -> bool:
    """Whether the store has an array or a group of this path; StoreError if its description is damaged."""
    try:
        return name in group
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(group, name, error) from error


def in_whole_chunks(array: "zarr.Array[Any]") -> "zarr.Array[Any]":
    """A handle on the same chunks, in which the last ones of each dim count in full.

    The Rust pipeline decodes a part of a chunk without its checksum; reading whole chunks alone is checked.
    """
    shape = tuple(ceil(n / chunk) * chunk for n, chunk in zip(array.shape, array.chunks, strict=True))
    assert isinstance(array.metadata, ArrayV3Metadata)
    with fast_codecs():
        return zarr.Array(AsyncArray(array.metadata.update_shape(shape), array.store_path, array.async_array.config))


def read_array(group: zarr.Group, name: str, *, complete: bool = False) -> NDArray[Any]:
    """All of an array of the store; StoreError if it is missing or damaged, or lacks a chunk and is to be complete."""
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
    """StoreError if one of `chunks` (default: all) is missing: it would read as fill values without a word."""
    for chunk in missing_chunks(array, np.ndindex(*array.cdata_shape) if chunks is None else chunks):
        raise damaged(group, array.path, f"the chunk {chunk_name(array, chunk)!r} is not there")


def damaged(group: zarr.Group, name: str, why: BaseException | str) -> StoreError:
    """The error of a part of the store that cannot be used; scores alone are made again by `score` alone."""
    verb = "score" if name.partition("/")[0] == "scores" else "collect"
    return StoreError(
        f"--store {str(group.store_path)!r}: expected an array {name!r}, found it missing or damaged: {brief(why)}; "
        f"{verb} again with --overwrite"
    )


def local_path(store: str) -> Path | None:
    """The directory that `--store` names, as a path or a file:// URL; None for any other URL."""
    if not _URL.match(store):
        return Path(store)
    parts = urlsplit(store)
    return Path(unquote(parts.path)) if parts.scheme in ("file", "local") and not parts.netloc else None


def store_at(store: str) -> str | RemoteStore:
    """What Zarr opens for `--store`: a directory as it is, a URL through its driver, with retries.

    Raises
    ------
    StoreError
        The URL has no driver here.
    """
    place = local_path(store)
    if place is None:
        return open_remote(store)
    return str(place.resolve() if place.is_symlink() else place)


def store_around(place: Path) -> Path | None:
    """The store of ours that a local path is, or lies within; None if there is none."""
    place = place.resolve()
    for directory in (place, *place.parents):
        file = directory / "zarr.json"
        if file.is_file() and f'"format": "{FORMAT}"' in file.read_text(encoding="utf-8", errors="replace"):
            return directory
    return None


def exists(path: str) -> bool:
    """Whether a store stands at `path` (one whose making was cut off does not count, and may be replaced).

    Raises
    ------
    StoreError
        Something else stands there: it is never replaced.
    """
    place = store_at(path)
    _check_not_nested(path)
    try:
        if _is_empty(place):
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
    if isinstance(place, RemoteStore):
        return place.is_vacant()
    directory = Path(place)
    return not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))


def _has_root(place: str | RemoteStore) -> bool:
    if isinstance(place, RemoteStore):
        return place.existing(["zarr.json"])[0]
    return (Path(place) / "zarr.json").is_file()


def open_group(path: str, *, must_be_created: bool = True) -> zarr.Group:
    """The store's root group; StoreError if it is missing, half-made, of another schema or no store."""
    place = store_at(path)
    try:
        with fast_codecs():
            # what may be done at a URL shows when it is done
            writable = isinstance(place, RemoteStore) or os.access(place, os.W_OK)
            group = zarr.open_group(place, mode="r+" if writable else "r", zarr_format=3)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"--store {path!r}: expected a store that `collect` wrote, found none: {error}") from error
    if not must_be_created:
        return group
    if group.attrs.get("format") != FORMAT:
        raise StoreError(f"--store {path!r}: expected a store that `collect` wrote, found another Zarr group")
    if group.attrs.get("created") is not True:
        raise StoreError(f"--store {path!r} was never finished being made; run `collect` again")
    version = group.attrs.get("schema_version")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"--store {path!r}: expected schema version {SCHEMA_VERSION}, got {version}; "
            "read it with the version of aura_dist that wrote it"
        )
    return group


def missing_chunks(array: "zarr.Array[Any]", chunks: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of `chunks` (indices in the chunk grid) that were never written: they would read as fill values."""
    wanted = list(chunks)
    if isinstance(array.store, LocalStore):
        return [c for c in wanted if not (array.store.root / _chunk_key(array, c)).is_file()]
    assert isinstance(array.store, RemoteStore)
    there = array.store.existing([_chunk_key(array, c) for c in wanted])
    return [c for c, exists in zip(wanted, there, strict=True) if not exists]


def chunk_name(array: "zarr.Array[Any]", chunk: tuple[int, ...]) -> str:
    """Where a chunk lies, for messages: the path of its file, or its URL."""
    place = array.store.root if isinstance(array.store, LocalStore) else array.store
    return f"{place}/{_chunk_key(array, chunk)}"


def _chunk_key(array: "zarr.Array[Any]", chunk: tuple[int, ...]) -> str:
    return f"{array.path}/{array.metadata.encode_chunk_key(chunk)}"
