"""Requests to a server of a model: many in flight, repeated while their errors may pass, one line where they do not.

Threads of this process wait for the answers; a thread keeps its connection from one request to the next.
"""

import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx2

from aura_dist.errors import ConfigError, ServerError, brief
from aura_dist.ranks.signals import interruption

# seconds until a connection, an answer about the server, and a completion count as lost
CONNECT_SECONDS, ANSWER_SECONDS, COMPLETION_SECONDS = 5.0, 10.0, 900.0
# how long a request is repeated before the server's first answer, then while it cannot be reached or fails, and while
# it has too much to do
FIRST_SECONDS, PATIENCE_SECONDS, BUSY_SECONDS = 10.0, 15.0, 600.0
# what requests in flight may still take once a signal asks for the end
_LAST_SECONDS = 20.0
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, _LOOK_SECONDS = 0.25, 5.0, 0.2
_LAST_CONNECT_SECONDS = 1.0  # that the last try has for its connection
_TOO_MANY_REQUESTS = 429
_PASSING = frozenset({_TOO_MANY_REQUESTS, 500, 502, 503, 504})

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class RefusedError(ServerError):
    """The server's answer to a request is an error; `status` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """A context of connections to the server at `url`, which ends in `/v1` and may lack just that.

    `key` is sent as the bearer's token, if there is one. Requests raise `RefusedError` for what the server refuses,
    and ServerError if it cannot be reached or does not answer in time. `url` has no user and password, which are sent.
    """

    def __init__(self, url: str, in_flight: int, key: str | None = None) -> None:
        self._asked = _address(url)
        self.url = without_user(self._asked)
        self._in_flight = in_flight
        self._ended, self._has_answered = threading.Event(), False
        is_here = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        key = _token(key)
        try:
            self._http = httpx2.Client(
                headers={} if key is None else {"Authorization": f"Bearer {key}"},
                trust_env=not is_here,  # a site's proxy does not reach this machine's own servers
                limits=httpx2.Limits(max_connections=in_flight, max_keepalive_connections=in_flight),
            )
        except (httpx2.InvalidURL, ImportError, ValueError, OSError) as error:
            raise _unusable(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._http.close()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that answers a request below the server's `/v1`."""
        return _object(self._ask("POST", f"{self._asked}/{path}", COMPLETION_SECONDS, body), path)

    def get(self, path: str) -> dict[str, Any]:
        """A JSON object that the server has below `/v1`."""
        return _object(self._ask("GET", f"{self._asked}/{path}", ANSWER_SECONDS), path)

    def find(self, path: str) -> str | None:
        """A text that some servers have beside `/v1`; None where this one says that it has not."""
        try:
            return str(self._ask("GET", f"{self._asked.removesuffix('/v1')}/{path}", ANSWER_SECONDS).text)
        except RefusedError as error:
            if error.status in _PASSING:
                raise
            return None

    def each(
        self, ask: Callable[[Item], Answer], items: Sequence[Item], received: Callable[[], int | None]
    ) -> Iterator[list[tuple[Item, Answer]]]:
        """Call `ask` for all items, some at a time, and yield the answers as they come, in any order.

        What `ask` raises is raised once the answers that are there are yielded. Where `received` returns a signal, no
        further item is asked for; RunInterruptedError once those in flight have come.
        """
        todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[Item, Answer] | Exception] = queue.SimpleQueue()
        ended = threading.Event()
        for item in items:
            todo.put(item)

        def work() -> None:
            while not ended.is_set():
                try:
                    item = todo.get_nowait()
                    done.put((item, ask(item)))
                except queue.Empty:
                    return
                except Exception as error:
                    ended.set()
                    done.put(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self._in_flight, len(items)))]
        for thread in threads:
            thread.start()
        try:
            yield from self._come(done, threads, len(items), ended, received)
        finally:
            ended.set()

    def _come(
        self,
        done: "queue.SimpleQueue[tuple[Item, Answer] | Exception]",
        threads: Sequence[threading.Thread],
        number: int,
        ended: threading.Event,
        received: Callable[[], int | None],
    ) -> Iterator[list[tuple[Item, Answer]]]:
        deadline: float | None = None
        while number:
            found = _drained(done)
            good = [one for one in found if not isinstance(one, Exception)]
            if good:
                yield good
            number -= len(good)
            for one in found:
                if isinstance(one, Exception):
                    raise one
            if (signal := received()) is not None:
                ended.set()
                deadline = deadline or time.monotonic() + _LAST_SECONDS
                if time.monotonic() > deadline or not (found or any(thread.is_alive() for thread in threads)):
                    raise interruption(signal)

    def _ask(self, method: str, url: str, seconds: float, body: dict[str, Any] | None = None) -> httpx2.Response:
        waited, pause, last, deadline = 0.0, _PAUSE_SECONDS, FIRST_SECONDS, time.monotonic() + FIRST_SECONDS
        while True:
            connect = min(CONNECT_SECONDS, max(deadline - time.monotonic(), _LAST_CONNECT_SECONDS))
            timeout = httpx2.Timeout(seconds, connect=connect, pool=None)
            try:
                answer = self._http.request(method, url, json=body, timeout=timeout)
            except httpx2.ReadTimeout as error:
                raise ServerError(
                    f"--server {self.url}: expected an answer within {seconds:.0f} s, got none; look at the server's "
                    "log, or give fewer --requests-in-flight"
                ) from error
            except (httpx2.InvalidURL, UnicodeError) as error:
                raise _unusable(error) from error
            except (httpx2.HTTPError, OSError) as error:
                failure: ServerError = ServerError(
                    f"--server {self.url}: expected a server that answers, got {brief(error)}; start it, or correct "
                    "the address"
                )
                patience = PATIENCE_SECONDS if self._has_answered else FIRST_SECONDS
            else:
                self._has_answered = True
                if answer.status_code < 400:
                    return answer
                failure = RefusedError(
                    f"--server {self.url}: {without_user(url).removeprefix(self.url)} was refused "
                    f"({answer.status_code}): {_reason(answer)}",
                    answer.status_code,
                )
                if answer.status_code not in _PASSING:
                    raise failure
                patience = BUSY_SECONDS if answer.status_code == _TOO_MANY_REQUESTS else PATIENCE_SECONDS
            now = time.monotonic()
            if patience != last:  # a server that was busy and then fails has just begun to fail
                last, deadline = patience, now + patience
            too_long = waited > BUSY_SECONDS + PATIENCE_SECONDS  # for one that does both in turn
            if now >= deadline or too_long or self._ended.is_set():
                raise failure
            waited += pause
            self._ended.wait(min(pause * (0.5 + random.random()), deadline - now))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _address(url: str) -> str:
    """The address with `/v1` at its end; ConfigError unless it is one of HTTP."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        httpx2.URL(url).raw_host.decode().encode("idna")  # as a connection does
    except (ValueError, httpx2.InvalidURL):
        good = False
    if not good:
        raise ConfigError(f"--server: expected an address such as http://localhost:8000/v1, got {without_user(url)!r}")
    bare = url.rstrip("/")
    return bare if bare.endswith("/v1") else f"{bare}/v1"


def without_user(url: str) -> str:
    """An address without user and password; of what is none, nothing before its last @ but the scheme."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    except ValueError:
        pass
    return re.sub(r"^(\w+://)?\S*@", lambda found: found[1] or "", url)


def _token(key: str | None) -> str | None:
    """The key without blanks around it; ConfigError, which does not show it, if a header cannot hold it."""
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("OPENAI_API_KEY: expected printable ASCII characters, got others; correct the variable")
    return key or None


def _unusable(error: Exception) -> ConfigError:
    """The error for what the environment says of connections; an address there may hold a password."""
    got = "an address that cannot be parsed" if isinstance(error, httpx2.InvalidURL) else brief(error)
    return ConfigError(
        "--server: expected proxies (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY) and certificates (SSL_CERT_FILE, "
        f"SSL_CERT_DIR) that can be used, got {got}; correct or unset these variables"
    )


def _object(answer: httpx2.Response, path: str) -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ServerError(
            f"{path}: expected a JSON object as OpenAI-compatible servers answer, got {brief(answer.text, 80)!r}; "
            "correct --server"
        )
    return found


def _reason(answer: httpx2.Response) -> str:
    """What the server says is wrong."""
    try:
        found = answer.json()
        error = found.get("error", found)
        return brief(str(error.get("message", error) if isinstance(error, dict) else error))
    except (ValueError, AttributeError):
        return brief(answer.text or answer.reason_phrase)


def _drained(done: "queue.SimpleQueue[Any]") -> list[Any]:
    """What has come, after a wait for the first."""
    found = []
    try:
        found.append(done.get(timeout=_LOOK_SECONDS))
        while True:
            found.append(done.get_nowait())
    except queue.Empty:
        return found
