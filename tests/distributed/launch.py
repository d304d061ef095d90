"""Start several ranks, with a time limit: forked from one process that has torch imported, or under torchrun."""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.distributed.preload"])


def run_command(arguments: Sequence[str]) -> int:
    """`aura-dist ARGUMENTS`, as a rank runs it."""
    from aura_dist.cli import main

    return main(arguments)


def _rank(env: dict[str, str], output: str, call: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> None:
    import torch

    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.exit(call(arguments))


class Launch:
    """Some ranks of one launch, each a process of this machine."""

    def __init__(
        self, num_ranks: int, arguments: Sequence[str], call: Callable[[Sequence[str]], int] = run_command
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.output = Path(tempfile.mkstemp(prefix="ranks-")[1])
        self._processes = []
        for rank in map(str, range(num_ranks)):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(num_ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = _SERVER.Process(target=_rank, args=(env, str(self.output), call, list(arguments)))
            process.start()
            self._processes.append(process)

    def ranks(self) -> list[psutil.Process]:
        return [psutil.Process(p.pid) for p in self._processes]

    def is_running(self) -> bool:
        return all(p.is_alive() for p in self._processes)

    def wait(self, seconds: float) -> list[int]:
        """Exit codes, in rank order; AssertionError if a rank is still running."""
        end = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.1, end - time.monotonic()))
            assert not process.is_alive(), f"still running after {seconds} s:\n{self.text()}"
        return [p.exitcode for p in self._processes]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def text(self) -> str:
        return self.output.read_text()


class Torchrun(Launch):
    """The same under torchrun, as a user starts it."""

    def __init__(self, num_ranks: int, arguments: Sequence[str]) -> None:
        self.output = Path(tempfile.mkstemp(prefix="ranks-")[1])
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with self.output.open("w") as output:
            self.agent = subprocess.Popen(
                [*run, "-m", "aura_dist", *arguments], env=env, stdout=output, stderr=subprocess.STDOUT
            )

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.agent.pid).children()

    def is_running(self) -> bool:
        return self.agent.poll() is None

    def wait(self, seconds: float) -> list[int]:
        return [self.agent.wait(seconds)]

    def kill(self) -> None:
        if self.is_running():
            for member in [*psutil.Process(self.agent.pid).children(recursive=True), psutil.Process(self.agent.pid)]:
                member.kill()


@contextmanager
def launched(launch: Launch) -> Iterator[Launch]:
    """Within, the ranks run; none is left at the end."""
    try:
        yield launch
    finally:
        launch.kill()
        launch.wait(20)
        launch.output.unlink()


def run_ranks(
    num_ranks: int,
    arguments: Sequence[str],
    call: Callable[[Sequence[str]], int] = run_command,
    timeout_seconds: float = 200,
) -> str:
    """Run to the end and return what was printed; AssertionError with it if a rank fails or takes too long."""
    with launched(Launch(num_ranks, arguments, call)) as launch:
        codes = launch.wait(timeout_seconds)
        assert codes == [0] * num_ranks, launch.text()
        return launch.text()
