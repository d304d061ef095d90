"""The small file that says how a job stands: written aside and renamed, so that readers see a whole one at any time."""

import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from signal import Signals
from typing import Any, Literal

State = Literal["queued", "running", "done", "failed"]
_REASON_LIMIT = 500
# what a stage returns when a signal ended it in an orderly way: 128 + the number of SIGINT, SIGUSR1 or SIGTERM
INTERRUPTED = (130, 138, 143)
# so many attempts in a row that a signal ended before they had left anything new are a failure
MAX_STALLS = 3
_STALLED = (
    f"{MAX_STALLS} starts in a row were ended by a signal (a time limit, or preemption) before any work was finished: "
    "give the job more time, or smaller pieces (collect: --tokens-per-batch)"
)


@dataclass(frozen=True)
class JobState:
    """How a job stands.

    Attributes
    ----------
    job, stage
        Its name, and the stage that it runs.
    state
        `queued`, `running`, `done`, or `failed`.
    reason
        Why it failed; empty otherwise.
    attempts
        How often it was started and not interrupted in an orderly way.
    seconds
        Of the last attempt that ended.
    started, ended
        Seconds since the epoch, of the last attempt; None before it.
    log
        Where its output is, within the directory of the sweep.
    needs
        Jobs that it waits for.
    starts
        How often it was started at all.
    submission
        Which of its submissions to a queue counts; empty if none does.
    kept
        How much its attempts had left when the last one was interrupted.
    stalls
        How many attempts in a row were interrupted and left nothing new.
    """

    job: str
    stage: str
    state: State = "queued"
    reason: str = ""
    attempts: int = 0
    seconds: float = 0.0
    started: float | None = None
    ended: float | None = None
    log: str = ""
    needs: tuple[str, ...] = field(default=())
    starts: int = 0
    submission: str = ""
    kept: int = 0
    stalls: int = 0

    def renewed(self) -> "JobState":
        """As if it had not been tried: it waits to be started, and no submission counts any more."""
        return replace(self, state="queued", reason="", attempts=0, submission="", stalls=0)

    def submitted(self) -> "JobState":
        """As it stands once another attempt is in a queue: what the last one left must not be read as its end."""
        return replace(self, state="queued", reason="", submission=uuid.uuid4().hex, stalls=0)

    def begun(self) -> "JobState":
        """As it stands once an attempt has started."""
        attempts, starts = self.attempts + 1, self.starts + 1
        return replace(
            self, state="running", reason="", attempts=attempts, starts=starts, started=time.time(), ended=None
        )

    def ended_with(self, code: int, output: str, kept: int | None = None) -> "JobState":
        """As it stands after an attempt that ended with this exit code and this output.

        `kept` is how much its attempts have left; None where interruptions do not count, as a person's.
        """
        ended = time.time()
        seconds = round(ended - (self.started or ended), 3)
        after = replace(self, seconds=seconds, ended=ended)
        if code == 0:
            return replace(after, state="done")
        if code in INTERRUPTED:
            if kept is not None:
                after = replace(after, kept=kept, stalls=0 if kept > self.kept else self.stalls + 1)
            if after.stalls >= MAX_STALLS:  # Slurm may queue it again all the same
                return replace(after, state="failed", reason=_STALLED, submission="")
            return replace(after, state="queued", attempts=self.attempts - 1)
        return replace(after, state="failed", reason=reason_of(code, output))

    def lost(self, reason: str) -> "JobState":
        """As it stands when its process is gone without a word, or never began: that is an attempt too."""
        attempts = self.attempts + (self.state != "running")
        return replace(self, state="failed", reason=reason, attempts=attempts, ended=time.time())


def read_state(path: Path) -> JobState | None:
    """What the file says, or None where there is none, or none of ours."""
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return JobState(**{**found, "needs": tuple(found["needs"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_state(path: Path, state: JobState) -> None:
    """Replace the file in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


def reason_of(code: int, output: str) -> str:
    """Why a command failed: its error line, else its last words; and the signal that killed it, if one did."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    said = (errors or lines or ["no output"])[-1][:_REASON_LIMIT]
    if code < 0:
        return f"killed by {_signal_name(-code)}; last output: {said}"
    return said if errors else f"exit code {code}; last output: {said}"


def _signal_name(number: int) -> str:
    try:
        return Signals(number).name
    except ValueError:  # a real-time signal has none
        return f"signal {number}"
