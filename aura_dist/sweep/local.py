"""Jobs as processes of this machine, a few at a time."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from aura_dist.errors import ClusterError
from aura_dist.sweep.jobs import INTERRUPTED, JobCommand
from aura_dist.sweep.slurm import scancel_words, still_queued

STOP_SECONDS = 60.0


class LocalLauncher:
    """Starts jobs as processes, each on its share of the GPUs; a `Launcher`.

    `num_slots` jobs run at the same time. The processes inherit the descriptor `keep_open`, so that a lock on its file
    lasts until they end.
    """

    poll_seconds = 0.1
    chains = False

    def __init__(self, num_slots: int, keep_open: int | None = None) -> None:
        self._slots: list[tuple[JobCommand, subprocess.Popen[str]] | None] = [None] * num_slots
        self._keep_open = () if keep_open is None else (keep_open,)
        self._gpus = visible_gpus()

    @property
    def room(self) -> int:
        """Free slots."""
        return self._slots.count(None)

    def adopt(self, commands: Sequence[JobCommand]) -> list[str]:
        """None: the processes of an earlier run ended with it.

        ClusterError if an earlier run left jobs in Slurm's queue, or Slurm does not answer: they would run twice.
        """
        queued = still_queued(commands)
        if queued:
            raise ClusterError(
                f"--launcher local: expected no job of this sweep in Slurm's queue, got {len(queued)}, which would run "
                f"twice; use --launcher slurm, or end them first: {scancel_words(queued.values())}"
            )
        return []

    def start(self, commands: Sequence[JobCommand]) -> list[str]:
        """Start jobs, no more than there is room for; their ids."""
        for command in commands:
            slot = self._slots.index(None)
            command.begin()
            with command.open_log() as log:
                process = command.start(log, gpus=self._share(slot, command.ranks), keep_open=self._keep_open)
            self._slots[slot] = command, process
        return [command.job for command in commands]

    def withdraw(self, commands: Sequence[JobCommand]) -> None:
        """Do nothing: no job is started here before those that it needs are done."""

    def ended(self) -> list[str]:
        """Ids of the jobs that have ended since the last call; writes their states."""
        found = []
        for slot, running in enumerate(self._slots):
            if running is not None and (code := running[1].poll()) is not None:
                # `stop` did not send this signal: a watchdog or a person has ended this one job
                running[0].end(128 - code if code in INTERRUPTED else code)
                self._slots[slot] = None
                found.append(running[0].job)
        return found

    def stop(self) -> str:
        """End all processes, in an orderly way where they can; nothing to add to the message."""
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
            command.end(0 if code == 0 else 128 + signal.SIGTERM, asked=True)
        self._slots = [None] * len(self._slots)
        return ""

    def _share(self, slot: int, ranks: int) -> list[str]:
        """GPUs of a slot: its own if there are enough, else one a rank, in turn; no names if one slot has all."""
        num_gpus, num_slots = len(self._gpus), len(self._slots)
        if num_slots == 1 or not num_gpus:
            return []
        if num_gpus < num_slots * ranks:
            return [self._gpus[(slot * ranks + rank) % num_gpus] for rank in range(min(ranks, num_gpus))]
        size = num_gpus // num_slots
        return self._gpus[slot * size : (slot + 1) * size]


def visible_gpus() -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, else all of this machine."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return sorted((p.name.removeprefix("nvidia") for p in Path("/dev").glob("nvidia[0-9]*")), key=int)
