"""Jobs as commands: where a job's files are, how its process is started, and how its state is kept."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from aura_dist.sweep.job_state import INTERRUPTED, JobState, read_state, write_state

_LOG_TAIL_BYTES = 20_000
# begins an attempt's part of the log: what an earlier one said is not why this one failed
_ATTEMPT = "== start"


@dataclass(frozen=True)
class JobCommand:
    """A stage's command, and the directory of the sweep that it belongs to.

    Attributes
    ----------
    directory
        Of the sweep.
    job, stage
        Name of the job, and the stage it runs.
    needs
        Jobs that it waits for.
    ranks
        Processes to start on this machine, through torchrun where there are several; 1 under Slurm, which starts
        them itself.
    kept
        How much the attempts have left: a number that grows as the stage gets on, and not as it does the same again.
        Without it, interruptions never count.
    """

    directory: Path
    job: str
    stage: str
    needs: tuple[str, ...] = ()
    ranks: int = 1
    kept: Callable[[], int] | None = field(default=None, compare=False)

    @property
    def config(self) -> Path:
        return self.directory / "jobs" / f"{self.job}.yaml"

    @property
    def slurm_id(self) -> Path:
        """Holds Slurm's number of the job that was submitted last, as squeue writes it."""
        return self.directory / "jobs" / f"{self.job}.slurm"

    @property
    def log(self) -> Path:
        return self.directory / "logs" / f"{self.job}.log"

    @property
    def state(self) -> JobState:
        """As the file says; of a job that was never started if there is none."""
        new = JobState(self.job, self.stage, log=str(self.log.relative_to(self.directory)), needs=self.needs)
        return read_state(self._state_path) or new

    @property
    def _state_path(self) -> Path:
        return self.directory / "jobs" / f"{self.job}.json"

    def write(self, state: JobState) -> None:
        write_state(self._state_path, state)

    def words(self) -> list[str]:
        """The command line."""
        module = ["-m", "aura_dist", self.stage, "--config", str(self.config)]
        if self.ranks == 1:
            return [sys.executable, *module]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, "--nproc-per-node", str(self.ranks), *module]

    def start(
        self, log: IO[str], *, gpus: Sequence[str] = (), keep_open: Sequence[int] = ()
    ) -> "subprocess.Popen[str]":
        """The process, in a session of its own; `gpus` are those that it sees (all, if none are named)."""
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return subprocess.Popen(
            self.words(), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True,
            start_new_session=True, pass_fds=tuple(keep_open),
        )  # fmt: skip

    def begin(self) -> None:
        """Write that an attempt starts: into the state, and as a line of the log."""
        state = self.state.begun()
        with self.open_log() as log:
            log.write(f"{_ATTEMPT} {state.starts} of {self.job}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self.write(state)

    def open_log(self) -> IO[str]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return self.log.open("a", encoding="utf-8")

    def end(self, code: int, *, asked: bool = False) -> None:
        """Write how the job stands after an attempt that ended with this exit code; `asked` for by a person or not."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
            output = file.read().decode(errors="replace")
        output = re.split(rf"^{_ATTEMPT} .*$", output, flags=re.MULTILINE)[-1]
        kept = self.kept() if self.kept is not None and code in INTERRUPTED and not asked else None
        self.write(self.state.ended_with(code, output, kept))
