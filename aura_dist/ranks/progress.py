"""Progress of a long run as log lines: readable on a terminal and in a Slurm log alike."""

import logging
import time
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


def clock(seconds: float) -> str:
    """Seconds as `h:mm:ss`, or `m:ss` below an hour."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


@dataclass
class Progress:
    """Counts work done against work to do and logs a line every `interval_seconds`.

    The time left is estimated from `cost` (tokens, bytes), because rows sorted by length are not equally long. Where
    bytes are counted too, the line shows their rate.
    """

    what: str
    total_units: int
    total_cost: int
    unit: str = "rows"
    cost_unit: str = "tokens"
    interval_seconds: float = 5.0
    units: int = 0
    cost: int = 0
    num_bytes: int = 0
    _start: float = field(default_factory=time.perf_counter)
    _last: float = 0.0

    def advance(self, units: int, cost: int, num_bytes: int = 0) -> None:
        """Count what was done since the last call."""
        self.num_bytes += num_bytes
        self.reach(self.units + units, self.cost + cost)

    def reach(self, units: int, cost: int) -> None:
        """Count what was done since the start."""
        self.units, self.cost = units, cost
        if self.elapsed_seconds - self._last >= self.interval_seconds:
            self._last = self.elapsed_seconds
            left = (self.total_cost - self.cost) / max(self.cost, 1) * self.elapsed_seconds
            logger.info("%s, %s left", self.line(), clock(left))

    @property
    def elapsed_seconds(self) -> float:
        return time.perf_counter() - self._start

    def line(self) -> str:
        seconds = max(self.elapsed_seconds, 1e-9)
        volume = f", {self.num_bytes / seconds / 1e9:.2f} GB/s" if self.num_bytes else ""
        return (
            f"{self.what}: {self.units:,} of {self.total_units:,} {self.unit}, "
            f"{self.cost / seconds:,.0f} {self.cost_unit}/s{volume}, {clock(self.elapsed_seconds)} elapsed"
        )

    def finish(self) -> None:
        logger.info("%s", self.line())
