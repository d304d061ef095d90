"""Stores at a URL: an fsspec file system as a Zarr store that repeats requests which may succeed the next time.

Every request runs in fsspec's own event loop, because the connections of s3fs, gcsfs and adlfs belong to the loop that
opened them, while Zarr's calls come from Zarr's loop and from the writer's. A request reads or writes the whole value
of a key, so repeating it changes nothing.
"""

import asyncio
import logging
import random
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from fsspec.asyn import get_loop
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, Store
from zarr.errors import ZarrUserWarning
from zarr.storage import FsspecStore, WrapperStore

from aura_dist.errors import StoreError, brief

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Requests in flight of one store: enough to fill a connection, few enough that none waits for long.
NUM_CONCURRENT = 32
# Errors that the same request would raise again.
_PERMANENT = (
    FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError,
    TypeError, ValueError, LookupError, NotImplementedError, ImportError, AssertionError,
)  # fmt: skip
# Parts of the names of errors in the drivers' own hierarchies, which need not be installed here.
_NO_CREDENTIALS = (
    "NoCredentials", "PartialCredentials", "CredentialRetrieval", "DefaultCredentials", "ProfileNotFound",
)  # fmt: skip
_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


@dataclass(frozen=True)
class Retries:
    """How often a request is made, and the waits between: each twice the one before, half of it at random."""

    num_attempts: int = 8  # including the first; 8 wait for a minute at most
    first_seconds: float = 0.5
    longest_seconds: float = 30.0

    def wait_seconds(self, failures: int) -> float:
        """Seconds to wait after so many failures (1, 2, …)."""
        longest: float = min(self.first_seconds * 2 ** (failures - 1), self.longest_seconds)
        return longest * random.uniform(0.5, 1.0)


RETRIES = Retries()


class RemoteStore(WrapperStore[Store]):
    """A store at a URL; requests are made by `store`, and repeated while their errors are transient.

    Every method raises a StoreError that names the URL and the last error, where that is permanent or the attempts
    are used up. A missing key is no error, as in any Zarr store.
    """

    def __init__(self, store: Store, url: str, retries: Retries = RETRIES) -> None:
        super().__init__(store)
        self.url = url
        self.retries = retries
        self._limit = asyncio.Semaphore(NUM_CONCURRENT)

    def _with_store(self, store: Store) -> Self:
        return type(self)(store, self.url, self.retries)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._store, self.url, self.retries)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemoteStore({self.url!r})"

    async def _request(self, key: str, request: Callable[[], Awaitable[T]]) -> T:
        """The answer of `request`, made on fsspec's loop."""
        loop = get_loop()
        if asyncio.get_running_loop() is loop:
            return await self._repeat(key, request)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._repeat(key, request), loop))

    async def _repeat(self, key: str, request: Callable[[], Awaitable[T]]) -> T:
        failures = 0
        while True:
            try:
                async with self._limit:
                    return await request()
            except Exception as error:
                failures += 1
                if not is_transient(error) or failures >= self.retries.num_attempts:
                    raise self._failure(key, error, failures) from error
                seconds = self.retries.wait_seconds(failures)
                logger.warning(
                    "%s/%s: attempt %d of %d failed (%s); next in %.1f s",
                    self.url, key, failures, self.retries.num_attempts, _kind_and_text(error), seconds,
                )  # fmt: skip
            await asyncio.sleep(seconds)

    def _failure(self, key: str, error: Exception, attempts: int) -> StoreError:
        times = f" after {attempts} attempts" if attempts > 1 else ""
        return StoreError(
            f"--store {self.url!r}: {key or 'the store'}: failed{times}: {_kind_and_text(error)}{_advice(error)}"
        )

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        return await self._request(key, lambda: self._store.get(key, prototype, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        wanted = list(key_ranges)
        return await self._request("", lambda: self._store.get_partial_values(prototype, wanted))

    async def exists(self, key: str) -> bool:
        return await self._request(key, lambda: self._store.exists(key))

    async def set(self, key: str, value: Buffer) -> None:
        await self._request(key, lambda: self._store.set(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await self._request(key, lambda: self._store.set_if_not_exists(key, value))

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        await asyncio.gather(*(self.set(key, value) for key, value in values))

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        wanted = list(requests)
        for request, value in zip(wanted, await asyncio.gather(*(self.get(*r) for r in wanted)), strict=True):
            yield request[0], value

    async def delete(self, key: str) -> None:
        await self._request(key, lambda: self._store.delete(key))

    async def delete_dir(self, prefix: str) -> None:
        await self._request(prefix, lambda: self._store.delete_dir(prefix))

    async def clear(self) -> None:
        await self._request("", self._store.clear)

    async def is_empty(self, prefix: str) -> bool:
        return await self._request(prefix, lambda: self._store.is_empty(prefix))

    async def getsize(self, key: str) -> int:
        return await self._request(key, lambda: self._store.getsize(key))

    async def list(self) -> AsyncIterator[str]:
        for key in await self._request("", lambda: _all(self._store.list())):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in await self._request(prefix, lambda: _all(self._store.list_prefix(prefix))):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for key in await self._request(prefix, lambda: _all(self._store.list_dir(prefix))):
            yield key

    def is_vacant(self, but: str) -> bool:
        """Whether nothing is there but names that begin with `but`; asked from a thread without a running loop."""

        async def ask() -> bool:
            return all([name.startswith(but) async for name in self.list_dir("")])

        return asyncio.run_coroutine_threadsafe(ask(), get_loop()).result()

    def existing(self, keys: Sequence[str]) -> Sequence[bool]:
        """Whether each key has a value, all asked at once; call it from a thread without a running loop."""

        async def ask() -> Sequence[bool]:
            return await asyncio.gather(*map(self.exists, keys))

        return asyncio.run_coroutine_threadsafe(ask(), get_loop()).result()


async def _all(items: AsyncIterator[str]) -> list[str]:
    return [item async for item in items]


def open_remote(url: str) -> RemoteStore:
    """The store at `url`, through the fsspec driver of its scheme; credentials and endpoints are the driver's.

    StoreError if the scheme is unknown, or its driver is not installed or refuses the URL.
    """
    scheme = url.split(":", 1)[0]
    try:
        store = _driver_store(url.rstrip("/"))
    except ImportError as error:
        raise StoreError(f"--store {url!r}: expected {_driver(scheme)} to be installed: {brief(error)}") from error
    except Exception as error:
        if "Protocol not known" in str(error):
            known = "a path, s3://, gs://, az://, file:// or another scheme of fsspec"
            raise StoreError(f"--store {url!r}: expected {known}, got {scheme}://") from error
        raise StoreError(f"--store {url!r} cannot be opened: {_kind_and_text(error)}{_advice(error)}") from error
    return RemoteStore(store, url.rstrip("/"), RETRIES)


def _driver_store(url: str) -> FsspecStore:
    """The store of the URL's driver, without a cache of listings, because other processes write to the same store."""
    with warnings.catch_warnings():
        # made like this, the driver belongs to fsspec's loop, where its requests run and its connections are closed
        warnings.filterwarnings("ignore", "fs .* was not created with `asynchronous=True`", ZarrUserWarning)
        return FsspecStore.from_url(url, storage_options={"asynchronous": False, "use_listings_cache": False})


def _driver(scheme: str) -> str:
    """The package that serves a scheme of URLs, and how to install it."""
    if scheme not in _DRIVERS:
        return f"the fsspec driver of {scheme}://"
    extra = "'aura-dist[s3]'" if _DRIVERS[scheme] == "s3fs" else _DRIVERS[scheme]
    return f"{_DRIVERS[scheme]} (pip install {extra})"


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: errors of connections, servers and their libraries may pass."""
    if isinstance(error, (StoreError, *_PERMANENT)) or _lacks_credentials(error):
        return False
    if isinstance(error, (OSError, EOFError)):
        return True
    return type(error).__module__.split(".")[0] not in ("builtins", "zarr", "aura_dist")


def _lacks_credentials(error: BaseException) -> bool:
    return any(name in type(error).__name__ for name in _NO_CREDENTIALS)


def _kind_and_text(error: BaseException) -> str:
    """The kind and the text of an error, in one line."""
    return f"{type(error).__name__}: {brief(error)}" if str(error) else type(error).__name__


def _advice(error: BaseException) -> str:
    """What the user may change, or nothing."""
    if _lacks_credentials(error):
        return (
            "; give credentials where the driver looks for them (for s3://: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    if isinstance(error, PermissionError):
        return "; expected credentials that may list, read, write and delete there"
    if isinstance(error, FileNotFoundError):
        return "; make the bucket first, or choose another"
    return ""
