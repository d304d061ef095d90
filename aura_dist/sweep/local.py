"""Jobs as processes of this machine, some at a time."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from aura_dist.errors import ClusterError
from aura_dist.sweep.job_command import JobCommand
from aura_dist.sweep.job_state import INTERRUPTED
from aura_dist.sweep.slurm import scancel_words, still_queued

STOP_SECONDS = 60.0
_INTERRUPTED = 128 + signal.SIGTERM


class LocalLauncher:
    """Starts jobs as processes; each of `num_slots` runs one job at a time, on its share of the GPUs.

    Parameters
    ----------
    num_slots
        Jobs that run at the same time.
    keep_open
        File that the processes inherit, so that a lock on it lasts as long as they do.
    """

    poll_seconds = 0.1
    # a job is started once those it needs are done
    chains = False

    def __init__(self, num_slots: int, keep_open: int | None = None) -> None:
        self._slots: list[tuple[JobCommand, subprocess.Popen[str]] | None] = [None] * num_slots
        self._keep_open = () if keep_open is None else (keep_open,)
        self._gpus = visible_gpus()

    @property
    def room(self) -> int:
        """Jobs that can be started now."""
        return self._slots.count(None)

    def adopt(self, commands: Sequence[JobCommand]) -> list[str]:
        """Jobs that go on from an earlier run of the sweep: none, as its processes end with it.

        ClusterError if that run left some in Slurm's queue, or Slurm does not say: they would run twice.
        """
        queued = still_queued(commands)
        if queued:
            raise ClusterError(
                f"--launcher local: expected no job of this sweep in Slurm's queue, got {len(queued)}, which would run "
                f"twice; go on with --launcher slurm, or end them first: {scancel_words(queued.values())}"
            )
        return []

    def start(self, commands: Sequence[JobCommand]) -> list[str]:
        """Start as many jobs as there is room for; their names."""
        for command in commands:
            slot = self._slots.index(None)
            command.begin()
            with command.open_log() as log:
                process = command.start(log, gpus=self._share(slot, command.ranks), keep_open=self._keep_open)
            self._slots[slot] = command, process
        return [command.job for command in commands]

    def withdraw(self, commands: Sequence[JobCommand]) -> None:
        """Nothing: no job is started here before those that it needs are done."""

    def ended(self) -> list[str]:
        """Names of the jobs that have ended since the last call; their states are written."""
        found = []
        for slot, running in enumerate(self._slots):
            if running is not None and (code := running[1].poll()) is not None:
                # a signal that `stop` did not send comes from a watchdog, or a hand that ends this one job
                running[0].end(128 - code if code in INTERRUPTED else code)
                self._slots[slot] = None
                found.append(running[0].job)
        return found

    def stop(self) -> str:
        """End all processes, in an orderly way where they can; what to tell the user."""
        running = [entry for entry in self._slots if entry is not None]
        for _, process in running:
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + STOP_SECONDS
        for command, process in running:
            try:
                code = process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
            command.end(0 if code == 0 else _INTERRUPTED, asked=True)
        self._slots = [None] * len(self._slots)
        return ""

    def _share(self, slot: int, ranks: int) -> list[str]:
        """GPUs of a slot: its own where there are enough, else one a rank, in turn; none named if one slot has all."""
        num_gpus, num_slots = len(self._gpus), len(self._slots)
        if num_slots == 1 or not num_gpus:
            return []
        if num_gpus < num_slots * ranks:
            return [self._gpus[(slot * ranks + rank) % num_gpus] for rank in range(min(ranks, num_gpus))]
        size = num_gpus // num_slots
        return self._gpus[slot * size : (slot + 1) * size]


def visible_gpus() -> list[str]:
    """Those that CUDA_VISIBLE_DEVICES names, else all of this machine."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return sorted((p.name.removeprefix("nvidia") for p in Path("/dev").glob("nvidia[0-9]*")), key=int)
