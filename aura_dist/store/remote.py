"""Stores at URLs, through obstore: a Zarr store whose errors name the URL, the key and what to change.

obstore repeats requests that may succeed the next time. A request reads or writes the whole value of a key, so
repeating it changes nothing.
"""

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote
from weakref import WeakKeyDictionary

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest
from zarr.storage import ObjectStore

from aura_dist.errors import MissingPackageError, StoreError, brief
from aura_dist.ranks.process import aws_variables
from aura_dist.store.zarr_adapter import run_in_zarr

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

# Requests in flight of one store and event loop: enough to fill a connection, few enough that none waits for long.
NUM_CONCURRENT = 32
# The waits of 24 repetitions take 50 s in the median. A server that never answers has four minutes, because the
# timeouts leave a slow connection time for a whole shard.
RETRIES: "RetryConfig" = {
    "max_retries": 24,
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=8), "base": 2},
    "retry_timeout": timedelta(minutes=3),
}
CLIENT: "ClientConfig" = {
    "allow_http": True,  # for endpoints of one's own; without one, the address is https
    "timeout": timedelta(minutes=10),
    "read_timeout": timedelta(minutes=2),
}
# Part of an error's text → what the user may change.
_ADVICE = {
    "404 Not Found": "make the bucket first, or choose another",
    "401 Unauthorized": "expected credentials that the server knows",
    "403 Forbidden": "expected credentials that may list, read, write and delete there",
    **dict.fromkeys(
        ("416 Range Not Satisfiable", "non-partial response"),
        "expected a file with content, and a server that knows ranges; collect again with --overwrite if it is empty",
    ),
    "error sending request": "check the network and the server's address (for s3://: AWS_ENDPOINT_URL)",
}


class RemoteStore(ObjectStore[Any]):
    """A store at a URL; at http:// and https:// it is only read.

    The requests that arrays and groups make raise a StoreError that names the URL and the key where they fail for good.
    A missing key is no error, as in any Zarr store.
    """

    def __init__(self, store: Any, url: str, *, read_only: bool = False) -> None:
        super().__init__(store, read_only=read_only)
        self.url = url
        self._limits: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    def with_read_only(self, read_only: bool = False) -> Self:
        return type(self)(self.store, self.url, read_only=read_only)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(open_remote, read_only=self.read_only), (self.url,)

    def __str__(self) -> str:
        return self.url

    @asynccontextmanager
    async def _request(self, key: str) -> AsyncGenerator[None, None]:
        """Context of a request; it waits while too many are in flight."""
        if _first_process() != os.getpid():  # obstore's threads are not here, so requests would never end
            raise StoreError(
                f"--store {self.url!r}: expected a process of its own, got the fork of one that asked a URL; start "
                "processes with multiprocessing's methods spawn or forkserver"
            )
        async with self._limits.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(NUM_CONCURRENT)):
            try:
                yield
            except Exception as error:
                raise StoreError(f"--store {self.url!r}: {key or 'the store'}: failed: {_explain(error)}") from error

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        async with self._request(key):
            return await super().get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        async with self._request(key):
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        async with self._request(key):
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        async with self._request(key):
            await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        async with self._request(key):
            await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        import obstore

        async with self._request(prefix):
            self._check_writable()
            while found := await obstore.list(self.store, prefix.rstrip("/")).collect_async():
                with suppress(FileNotFoundError):  # another process deleted one of them
                    await obstore.delete_async(self.store, [item["path"] for item in found])

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        async with self._request(prefix):
            names = [name async for name in super().list_dir(prefix)]
        for name in names:
            yield name

    def is_vacant(self, but: str) -> bool:
        """Whether nothing is there but names that begin with `but`; asked from a thread without a running loop.

        StoreError where the store can only be read.
        """
        if self.read_only:
            raise StoreError(f"--store {self.url!r}: expected a place that can be written; a store is only read there")

        async def ask() -> bool:
            return all([name.startswith(but) async for name in self.list_dir("")])

        return run_in_zarr(ask())

    def existing(self, keys: Sequence[str]) -> Sequence[bool]:
        """Whether each key has a value, all asked at once; call it from a thread without a running loop."""

        async def ask() -> Sequence[bool]:
            return await asyncio.gather(*map(self.exists, keys))

        return run_in_zarr(ask())


def open_remote(url: str, *, read_only: bool = False) -> RemoteStore:
    """The store at `url`; credentials, region and endpoint come from the environment, for S3 also from boto3.

    StoreError if the scheme is unknown or the URL or its credentials cannot be used; MissingPackageError without
    obstore.
    """
    url = url.rstrip("/")
    scheme = url.partition(":")[0].lower()
    if scheme not in _SCHEMES:
        expected = "a path, file://, s3://, gs://, az:// or, to read, https:// or http://"
        raise StoreError(f"--store {url!r}: expected {expected}, got {url.partition('/')[0]}//")
    try:
        store = _SCHEMES[scheme](url)
    except StoreError:
        raise
    except ImportError as error:
        package = (error.name or "obstore").partition(".")[0]
        raise MissingPackageError(f"--store {url!r}", package, "s3") from error
    except Exception as error:  # obstore's and boto3's own kinds
        raise StoreError(f"--store {url!r} cannot be opened: {_explain(error)}") from error
    return RemoteStore(store, url, read_only=read_only or scheme in _ONLY_READ)


def _cloud(url: str, **options: Any) -> Any:
    """The bucket of a cloud and a prefix in it, which is taken as it is written."""
    from obstore.store import from_url

    literal = re.sub("^gcs:", "gs:", quote(url, safe=":/@"))  # obstore would drop what follows ? and #
    return from_url(literal, client_options=CLIENT, retry_config=RETRIES, **options)


def _s3(url: str) -> Any:
    """A bucket of S3, with what boto3 finds of what the environment lacks: profiles, SSO, roles of the machine."""
    given = aws_variables()
    if any(names <= given.keys() for names in _WITHOUT_BOTO):
        return _cloud(url)
    import botocore.session
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = botocore.session.Session()
    if session.get_credentials() is None:
        raise StoreError(
            f"--store {url!r}: expected credentials for S3, found none; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or AWS_SKIP_SIGNATURE=true for a public bucket"
        )
    options = {
        "region": given.get("AWS_REGION") or session.get_config_variable("region"),
        "endpoint": given.get("AWS_ENDPOINT_URL") or session.get_scoped_config().get("endpoint_url"),
    }
    found = {name: value for name, value in options.items() if value}
    return _cloud(url, credential_provider=Boto3CredentialProvider(session), **found)


def _web(url: str) -> Any:
    from obstore.store import HTTPStore

    if "?" in url or "#" in url:
        raise StoreError(f"--store {url!r}: expected an address without ? and #, because keys are added to it")
    return HTTPStore.from_url(url, client_options=CLIENT, retry_config=RETRIES)


@cache
def _memory(url: str) -> Any:
    """A store in this process, for tests."""
    from obstore.store import MemoryStore

    return MemoryStore()


# Scheme of a URL → what opens it.
_SCHEMES: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("s3", "s3a"), _s3),
    **dict.fromkeys(("gs", "gcs", "az", "azure", "abfs", "abfss", "adl"), _cloud),
    **dict.fromkeys(("http", "https"), _web),
    "memory": _memory,
}
_ONLY_READ = ("http", "https")
# Variables that say all that obstore needs for S3.
_WITHOUT_BOTO = (
    {"AWS_SKIP_SIGNATURE"},
    {"AWS_ACCESS_KEY_ID", "AWS_REGION"},
    {"AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION"},
)  # fmt: skip


@cache
def _first_process() -> int:
    """The process that asked a URL first, also in those that were forked from it."""
    return os.getpid()


def _explain(error: Exception) -> str:
    """An error in one line, with its cause and what the user may change."""
    text, _, details = str(error).partition("\n\nDebug source:")
    text = re.sub(r" in [\d.]+\w+(?=,| - )|, max_retries: \d+, retry_timeout: \w+ *(?= - )", "", text)
    text = re.sub(r"<\?xml.*?<Message>(.*?)</Message>.*", r"\1", text, flags=re.DOTALL)
    if causes := re.findall(r'(?:message|error|details): "([^"]+)"', details):
        text += f" ({causes[-1]})"
    if not type(error).__module__.startswith("obstore"):
        text = f"{type(error).__name__}: {text}"
    return brief(text) + next((f"; {advice}" for part, advice in _ADVICE.items() if part in text), "")
