"""A proxy before a server that spoils the answers a test chooses, as a bad network or a busy server would."""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

# (method, unquoted path with its query, how often this was asked before) → "busy" (an error 503), "close" (no answer),
# "hang" (no answer for a second), "cut" (half of the body), "deny" (an error 403), or None
Fault = Callable[[str, str, int], str | None]
STATUS = {"busy": 503, "deny": 403}


class Proxy(ThreadingHTTPServer):
    """`fault` may be replaced at any time; `faults` counts what it did."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target).netloc
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.fault: Fault = lambda method, path, before: None
        self.headers: dict[str, str] = {}  # added to every request
        self.faults, self.asked = Counter[str](), Counter[tuple[str, str]]()
        self._lock = threading.Lock()

    def next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            before = self.asked[method, path]
            self.asked[method, path] += 1
        fault = self.fault(method, path, before)
        if fault:
            with self._lock:
                self.faults[fault] += 1
        return fault


@contextmanager
def proxy_before(target: str) -> Iterator[Proxy]:
    """A proxy before the server at the address `target`."""
    with Proxy(target) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.next_fault(self.command, unquote(self.path))
        if fault in ("close", "hang"):
            time.sleep(fault == "hang")
            self.close_connection = True
        elif fault in STATUS:
            self.answer(STATUS[fault], {}, b"<Error><Code>Fault</Code></Error>")
        else:
            to_server = http.client.HTTPConnection(self.server.target, timeout=60)
            to_server.request(self.command, self.path, body, dict(self.headers) | self.server.headers)
            answer = to_server.getresponse()
            headers = {name: value for name, value in answer.headers.items() if name.lower() not in _OURS}
            size = answer.headers["Content-Length"] if self.command == "HEAD" else None
            self.answer(answer.status, headers, answer.read(), size, cut=fault == "cut")
            to_server.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

    def answer(
        self, status: int, headers: dict[str, str], body: bytes, size: str | None = None, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", size or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def log_message(self, *args: object) -> None:
        pass


_OURS = ("content-length", "transfer-encoding", "connection", "server", "date")
