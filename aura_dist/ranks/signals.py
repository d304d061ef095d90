"""Signals that ask for an orderly end."""

import atexit
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from aura_dist.errors import RunInterruptedError

# SIGUSR1 is what Slurm jobs ask for as the warning before their time is up (`--signal=USR1@120`)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# what Slurm may send to a rank that a signal has ended already
_REPEATED = (signal.SIGTERM, signal.SIGUSR1)

FINISHED_ARE_KEPT = "finished tasks are kept: run the same command to go on"


class StopFlag:
    """Context in which SIGTERM, SIGINT and SIGUSR1 raise RunInterruptedError, or, under `deferred`, set a flag.

    A second SIGINT raises KeyboardInterrupt at once. In another thread than the main one, nothing is handled. The
    message says `outcome`, what became of the interrupted work.
    """

    def __init__(self, outcome: str = FINISHED_ARE_KEPT) -> None:
        self._outcome = outcome
        self.received: int | None = None  # number of the signal
        self._deferred = False
        self._before: dict[int, Any] = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal only sets `received`: the work looks at it between two batches."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.received = self.received is None, number
        if not self._deferred and (first or number == signal.SIGINT):  # what cleans up after one is let do so
            raise interruption(number, outcome=self._outcome)

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():  # Python allows no other to handle signals
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def ignore_another() -> None:
    """Let no further SIGTERM or SIGUSR1 change the exit code of a command that a signal has ended.

    Slurm ends a step at its first rank that exits with a code, and only the code of the first signal requeues a job.
    """
    if threading.current_thread() is threading.main_thread():
        for number in _REPEATED:
            signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs that are started later would inherit
        # as the interpreter ends, it gives signals back to the system, but for those that are ignored
        atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in _REPEATED])


def interruption(number: int, note: str = "", *, outcome: str = FINISHED_ARE_KEPT) -> RunInterruptedError:
    """The error of a run that signal `number` ended; its message says `outcome`, then `note`."""
    return RunInterruptedError(f"{signal.Signals(number).name} received; {outcome}{note}", number)
