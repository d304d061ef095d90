"""A server of a model that this process starts, waits for and stops: `--server 'vllm serve {model} --port {port}'`."""

import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

from aura_dist.errors import ConfigError, ServerError, brief
from aura_dist.serving.vllm_plugin import VARIABLE

logger = logging.getLogger(__name__)

MODEL, PORT = "{model}", "{port}"
START_SECONDS = 1800.0  # until a server has loaded the largest models from a slow file system
# less than what a sweep's launcher and Slurm leave to a job that they end
_STOP_SECONDS = 25.0
_LOOK_SECONDS = 0.2
_OWN_ERROR = re.compile(r"(?:^error|\baura_dist\.errors\.\w+): (.+)", re.MULTILINE)
# Slurm's warning reaches every process of a job, and would kill the server while requests are in flight. The server
# ends at the end of its standard input, so that it also ends where this process is killed.
_GUARDED = """trap '' USR1; exec 3<&0
"$@" </dev/null 3<&- & server=$!
{ read _ <&3; kill "$server"; } 2>/dev/null & exec 3<&-
wait "$server" """


def started_by(server: str) -> str | None:
    """The value of `--server` if it is a command that starts a server; None for an address."""
    return server if PORT in server else None


@contextmanager
def running(server: str, model: str, intervention: str | None, strength: float, log: Path) -> Iterator[str]:
    """The address of a server: `server` itself, or, where it is a command, of what it starts, until the context ends.

    In the command, `{model}` becomes the model's name and `{port}` a free port. The plugin of this package, where the
    server has it, lays `intervention` over the model. What the server says goes into `log`.

    ConfigError if the command cannot be started; ServerError if the server does not come up.
    """
    if started_by(server) is None:
        yield server
        return
    port = _free_port()
    try:
        words = [word.replace(MODEL, model).replace(PORT, str(port)) for word in shlex.split(server)]
    except ValueError as error:
        raise ConfigError(f"--server: expected a command as a shell reads it, got {server!r}: {error}") from error
    env = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if intervention is not None:
        env[VARIABLE] = f"{Path(intervention).absolute()}@{strength!r}"
    logger.info("starting %s; its log is %s", shlex.join(words), log)
    with log.open("wb") as said:
        process = subprocess.Popen(
            ["sh", "-c", _GUARDED, "sh", *words], env=env, stdin=subprocess.PIPE, stdout=said, stderr=said,
            start_new_session=True,  # Ctrl-C in a terminal reaches this process alone, which ends the server
        )  # fmt: skip
    try:
        _wait(process, port, server, log)
        yield f"http://127.0.0.1:{port}/v1"
        if _has_ended(process):
            logger.warning("the server has ended by itself; see %s", log)
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(process: "subprocess.Popen[bytes]", port: int, command: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while not _has_ended(process) and time.monotonic() < end:
        if _is_healthy(port):
            return
        time.sleep(_LOOK_SECONDS)
    ended = "one that ended" if _has_ended(process) else "no answer"
    raise ServerError(
        f"--server {brief(command, 100)!r}: expected a server that answers /health at port {port} within "
        f"{START_SECONDS:.0f} s, got {ended}: {_last_words(log)}; see {str(log)!r}"
    )


def _is_healthy(port: int) -> bool:
    """Whether the server has loaded its model: vLLM, SGLang, TGI and llama.cpp say so at one page."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    page = f"http://127.0.0.1:{port}/health"
    with suppress(OSError, ValueError, HTTPException), direct.open(page, timeout=10) as answer:
        return bool(answer.status == 200)
    return False


def _last_words(log: Path) -> str:
    """The last error of ours in a log, which may be in a traceback of vLLM, else its last line."""
    text = log.read_text(errors="replace")
    return brief((_OWN_ERROR.findall(text) or text.strip().splitlines() or ["no output"])[-1])


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Whether a process has ended; it stays a zombie, so that its group's number is not given to another one."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server, and whatever it leaves behind."""
    assert process.stdin is not None
    process.stdin.close()
    end = time.monotonic() + _STOP_SECONDS
    try:
        while not _has_ended(process) and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
