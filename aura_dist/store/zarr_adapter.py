"""The one module that uses names of zarr that zarr does not document. Each was seen with zarr 3.1.6 and zarrs 0.2.3.

- `zarr.core.sync.sync`: runs a coroutine in zarr's event loop
- `Array.async_array`, `AsyncArray.config`, `AsyncArray(metadata, …)`: another handle on the same chunks
- `Array.metadata.update_shape`, `encode_chunk_key`, `to_buffer_dict`; `zarr.core.group.GroupMetadata`,
  `ConsolidatedMetadata`: the contents of `zarr.json`, and the keys of chunks
- settings `codec_pipeline.*` and `array.write_empty_chunks`: an array keeps those that it was opened with
"""

import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import zarr
from zarr.abc.buffer import Buffer
from zarr.buffer import default_buffer_prototype
from zarr.core.group import GroupMetadata
from zarr.core.metadata import ArrayV3Metadata
from zarr.core.sync import sync

T = TypeVar("T")

_OPENED_WITH = {
    "codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
    "codec_pipeline.chunk_concurrent_maximum": 1,
    "array.write_empty_chunks": True,  # a chunk that is not there is one that was not written
}
_OPENING = threading.RLock()  # such settings are of the whole process


@contextmanager
def fast_codecs() -> Iterator[None]:
    """Context in which arrays are opened: they keep the Rust codec pipeline, many times faster than Python's.

    A call uses one thread, because the chunks of a call share a directory, where making files in parallel only waits;
    parallelism comes from writing many arrays and from Dask. The settings are global, so opening takes a lock: no
    thread sees another's half-set context. Arrays at a URL get Python's pipeline whatever the setting, because zarrs
    reads and writes local files alone.
    """
    import zarrs  # noqa: F401  (registers the pipeline)

    with _OPENING, zarr.config.set(_OPENED_WITH):
        yield


def same_chunks(array: "zarr.Array[Any]", shape: tuple[int, ...]) -> "zarr.Array[Any]":
    """Another handle on the chunks of an array, in another shape."""
    assert isinstance(array.metadata, ArrayV3Metadata)
    with fast_codecs():
        return zarr.Array(
            zarr.AsyncArray(array.metadata.update_shape(shape), array.store_path, array.async_array.config)
        )


def run_in_zarr(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, run in zarr's event loop from a thread without a loop of its own."""
    return sync(work)


def chunk_key(array: "zarr.Array[Any]", chunk: tuple[int, ...]) -> str:
    """The key in the store of a chunk, by its index in the chunk grid."""
    return f"{array.path}/{array.metadata.encode_chunk_key(chunk)}"


def description(array: "zarr.Array[Any] | None") -> dict[str, Buffer]:
    """The files, by name, that describe an array, or a group where it is None."""
    metadata = GroupMetadata() if array is None else array.metadata
    return metadata.to_buffer_dict(default_buffer_prototype())
