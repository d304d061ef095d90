"""A strength for each request: the strengths of the tokens of a forward, in the order in which vLLM has them.

T tokens of a forward, at most N.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aura_dist.errors import ConfigError, ModelError
from aura_dist.interventions.statement import ASKED

MOST = 1000.0  # a strength beyond this is a slip


def checked_strength(given: object, expected: str) -> float:
    """ConfigError, which begins with `expected`, unless it is a number from 0 to `MOST`."""
    if not isinstance(given, int | float) or isinstance(given, bool) or not 0 <= given <= MOST:
        raise ConfigError(f"{expected} from 0 to {MOST:.0f}, got {given!r}")
    return float(given)


class Strengths:
    """What requests ask for, on one worker; `of_tokens` is what the maps read, so its memory stays.

    Attributes
    ----------
    default
        The server's strength, of requests that ask for none.
    of_tokens
        [N] float32, or [1] where all requests have the same strength; beside the model's weights.
    """

    def __init__(self, default: float, num_tokens: int = 1, device: torch.device | None = None) -> None:
        self.default = default
        self.of_tokens = torch.full((num_tokens,), default, dtype=torch.float32, device=device)
        self._asked: dict[str, float] = {}  # of the requests that are not finished, where they ask for one
        self._due = False  # whether the next forward needs strengths that are not written yet
        self._written: tuple[list[float], list[int]] = [], []  # of each request of the last forward, and its tokens

    @property
    def of_requests(self) -> bool:
        """Whether requests may have strengths of their own."""
        return len(self.of_tokens) > 1

    def follow(self, scheduled: Any) -> None:
        """Read what a forward is about to run: vLLM's `SchedulerOutput`."""
        for request in scheduled.finished_req_ids:
            self._asked.pop(request, None)
        for request in scheduled.scheduled_new_reqs:
            self._asked.pop(request.req_id, None)
            of_request = getattr(request.sampling_params, "extra_args", None) or {}
            if ASKED in of_request:
                self._asked[request.req_id] = checked_strength(of_request[ASKED], f"{ASKED}: expected a number")
        if self._asked and not self.of_requests:
            raise ModelError(f"{ASKED}: expected no request with it where all have one strength, got one")
        self._due = bool(self._asked) and scheduled.total_num_scheduled_tokens > 0

    def write(self, requests: Sequence[str], num_tokens: NDArray[Any]) -> None:
        """Write the strengths of a forward, whose tokens are those of `requests` in order, `num_tokens` of each."""
        self._due = False
        each = [self._asked.get(request, self.default) for request in requests] if self._asked else []
        now = each, num_tokens.tolist() if each else []
        if now == self._written:
            return
        strength_T = torch.from_numpy(np.repeat(np.array(each, np.float32), np.array(now[1], np.int64)))
        self.of_tokens.fill_(self.default)  # what is padded, and what no request has
        self.of_tokens[: len(strength_T)].copy_(strength_T)
        self._written = now

    def check_written(self) -> None:
        """ModelError if a forward ran without the strengths that its requests asked for."""
        if self._due:
            raise ModelError(
                f"{ASKED}: expected vLLM to say the order of its tokens before a forward, got none; leave {ASKED} out "
                "of requests, and start a server for each strength"
            )


def along(strength_N: Tensor, values: Tensor) -> Tensor:
    """The strengths of the rows of `values` [T, …], shaped to multiply them."""
    if strength_N.shape[0] == 1:
        return strength_N
    return strength_N[: values.shape[0]].view(-1, *[1] * (values.ndim - 1))
