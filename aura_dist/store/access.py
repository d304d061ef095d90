"""Opening a store and its arrays: with the fast codecs, and only if it is a store of ours."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.errors import StoreError

# written with the group itself: what has it, even half-made, is ours to replace; nothing else is
FORMAT = "aura_dist"
SCHEMA_VERSION = 2
CODEC_SETTINGS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.chunk_concurrent_maximum": 1}
_OPENING = threading.RLock()


@contextmanager
def fast_codecs() -> Iterator[None]:
    """Context in which arrays are opened: they keep the Rust codec pipeline, many times faster than Python's.

    One thread a call: the chunks of a call lie in one directory, where making files in parallel only waits;
    parallelism comes from writing many arrays and from Dask. The setting is zarr's own and global, so opening
    takes a lock: no thread sees another's half-set context.
    """
    import zarrs  # noqa: F401  (registers the pipeline)

    with _OPENING, zarr.config.set(CODEC_SETTINGS):
        yield


def get_array(group: zarr.Group, name: str) -> "zarr.Array[Any]":
    """An array of the store by its path."""
    with fast_codecs():
        array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def read_array(group: zarr.Group, name: str) -> NDArray[Any]:
    """All of an array of the store."""
    return np.asarray(get_array(group, name)[...])


def exists(path: str) -> bool:
    """Whether a store stands at `path` (one whose making was cut off does not count, and may be replaced).

    Raises
    ------
    StoreError
        Something else stands there: it is never replaced.
    """
    place = Path(path)
    try:
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            return False
    except OSError as error:
        raise StoreError(f"--store {path!r} cannot be used: {error}") from error
    attributes = open_group(path, must_be_created=False).attrs if (place / "zarr.json").is_file() else {}
    if attributes.get("format") != FORMAT:
        raise StoreError(f"--store {path!r}: expected a store or nothing, found something else; choose another path")
    return attributes.get("created") is True


def open_group(path: str, *, must_be_created: bool = True) -> zarr.Group:
    """The store's root group; StoreError if it is missing, half-made, of another schema or no store."""
    try:
        with fast_codecs():
            group = zarr.open_group(path, mode="r+" if os.access(path, os.W_OK) else "r")
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
