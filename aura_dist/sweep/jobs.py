"""A job's files in the sweep's directory: its settings, its state, its log; and the process that runs it."""

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from signal import Signals
from typing import IO, Any, Literal

from aura_dist.files import write_whole

State = Literal["queued", "running", "done", "failed"]
_REASON_LIMIT = 500
_LOG_TAIL_BYTES = 20_000
# starts an attempt's part of the log, because the reason of a failure is in the last attempt's part alone
_ATTEMPT = "== start"
# a stage that a signal ended in an orderly way exits with 128 + the number of SIGINT, SIGUSR1 or SIGTERM
INTERRUPTED = (130, 138, 143)
# a job has failed after so many attempts in a row that a signal ended before they finished any new work
MAX_STALLS = 3
_STALLED = (
    f"{MAX_STALLS} starts in a row were ended by a signal (a time limit, or preemption) before any work was finished: "
    "give the job more time, or smaller pieces (collect: --tokens-per-batch)"
)


@dataclass(frozen=True)
class JobState:
    """The content of a job's state file; times are in seconds, since the epoch or as durations."""

    job: str
    stage: str
    state: State = "queued"
    reason: str = ""  # why it failed
    attempts: int = 0  # without those that were interrupted in an orderly way
    seconds: float = 0.0  # duration of the last attempt that ended
    started: float | None = None  # start of the last attempt
    ended: float | None = None  # its end
    log: str = ""  # path within the sweep's directory
    needs: tuple[str, ...] = ()  # jobs that it waits for
    starts: int = 0  # all attempts
    submission: str = ""  # the submission to a queue that counts
    kept: int = 0  # how much finished work was on disk when the last attempt was interrupted
    stalls: int = 0  # attempts in a row that were interrupted before they finished any new work

    def renewed(self) -> "JobState":
        """The state of a job that waits for its first attempt; no submission counts any more."""
        return replace(self, state="queued", reason="", attempts=0, submission="", stalls=0)

    def submitted(self) -> "JobState":
        """The state once another attempt is in a queue, so that no reader takes the last attempt's end for its end."""
        return replace(self, state="queued", reason="", submission=uuid.uuid4().hex, stalls=0)

    def begun(self) -> "JobState":
        """The state once an attempt has started."""
        counted = replace(self, attempts=self.attempts + 1, starts=self.starts + 1)
        return replace(counted, state="running", reason="", started=time.time(), ended=None)

    def ended_with(self, code: int, output: str, kept: int | None = None) -> "JobState":
        """The state after an attempt with this exit code and output; without `kept`, an interruption does not count."""
        ended = time.time()
        seconds = round(ended - (self.started or ended), 3)
        after = replace(self, seconds=seconds, ended=ended)
        if code == 0:
            return replace(after, state="done")
        if code in INTERRUPTED:
            if kept is not None:
                after = replace(after, kept=kept, stalls=0 if kept > self.kept else self.stalls + 1)
            if after.stalls >= MAX_STALLS:  # without a submission, because Slurm may queue the job again
                return replace(after, state="failed", reason=_STALLED, submission="")
            return replace(after, state="queued", attempts=self.attempts - 1)
        return replace(after, state="failed", reason=reason_of(code, output))

    def lost(self, reason: str) -> "JobState":
        """The state of a job whose process vanished or never started; that counts as an attempt."""
        attempts = self.attempts + (self.state != "running")
        return replace(self, state="failed", reason=reason, attempts=attempts, ended=time.time())


def reason_of(code: int, output: str) -> str:
    """Why a command failed: its error line, else its last line; and the signal that killed it, if one did."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    said = (errors or lines or ["no output"])[-1][:_REASON_LIMIT]
    if code < 0:
        names = {signal.value: signal.name for signal in Signals}  # real-time signals have none
        return f"killed by {names.get(-code, f'signal {-code}')}; last output: {said}"
    return said if errors else f"exit code {code}; last output: {said}"


@dataclass(frozen=True)
class JobCommand:
    """A stage's command, and the files of its job."""

    directory: Path  # of the sweep
    job: str
    stage: str
    needs: tuple[str, ...] = ()
    ranks: int = 1  # processes that the command starts, through torchrun if there are several
    # returns how much finished work is on disk (`stage_specs.kept`); without it, interruptions never count
    kept: Callable[[], int] | None = field(default=None, compare=False)

    @property
    def config(self) -> Path:
        return self.directory / "jobs" / f"{self.job}.yaml"

    @property
    def slurm_id(self) -> Path:
        """File with the Slurm id of the last submission, as squeue writes it."""
        return self.directory / "jobs" / f"{self.job}.slurm"

    @property
    def log(self) -> Path:
        return self.directory / "logs" / f"{self.job}.log"

    @property
    def state(self) -> JobState:
        """The state in the job's file, or of a job that was never started."""
        try:
            found: Mapping[str, Any] = json.loads(self._state_path.read_text(encoding="utf-8"))
            return JobState(**{**found, "needs": tuple(found["needs"])})
        except (OSError, ValueError, TypeError, KeyError):  # no file, or another program's
            return JobState(self.job, self.stage, log=str(self.log.relative_to(self.directory)), needs=self.needs)

    @property
    def _state_path(self) -> Path:
        return self.directory / "jobs" / f"{self.job}.json"

    def write(self, state: JobState) -> None:
        self._state_path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._state_path, json.dumps(asdict(state), indent=2) + "\n")

    def words(self) -> list[str]:
        """The command line."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        start = [sys.executable, *(torchrun if self.ranks > 1 else [])]
        return [*start, "-m", "aura_dist", self.stage, "--config", str(self.config)]

    def start(
        self, log: IO[str], *, gpus: Sequence[str] = (), keep_open: Sequence[int] = ()
    ) -> "subprocess.Popen[str]":
        """Start the process in a session of its own; it sees `gpus`, or all if none are named."""
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return subprocess.Popen(
            self.words(), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True,
            start_new_session=True, pass_fds=tuple(keep_open),
        )  # fmt: skip

    def begin(self) -> None:
        """Write into state and log that an attempt starts."""
        state = self.state.begun()
        with self.open_log() as log:
            log.write(f"{_ATTEMPT} {state.starts} of {self.job}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self.write(state)

    def open_log(self) -> IO[str]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return self.log.open("a", encoding="utf-8")

    def end(self, code: int, *, asked: bool = False) -> None:
        """Write the state after an attempt that ended with this exit code; `asked` if a person ended it."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
            output = file.read().decode(errors="replace")
        output = re.split(rf"^{_ATTEMPT} .*$", output, flags=re.MULTILINE)[-1]
        kept = self.kept() if self.kept is not None and code in INTERRUPTED and not asked else None
        self.write(self.state.ended_with(code, output, kept))
