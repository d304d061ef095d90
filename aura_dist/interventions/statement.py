"""How a server states the intervention that it has laid over its model: one line among its metrics (Prometheus)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from aura_dist.errors import ServerError

METRIC = "aura_dist_intervention"
ASKED = "aura_strength"  # a request's own strength, among its `vllm_xargs`
LABELS = ("digest", "strength", "num_sites", "of_requests")
_LINE = re.compile(rf"^{METRIC}\{{(.*)\}} [0-9.e+]+", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Statement:
    """Which maps are laid over a model, at which strength, at how many sites.

    `of_requests` says whether requests may have another strength, each its own.
    """

    digest: str
    strength: float
    num_sites: int
    of_requests: bool = False

    @property
    def labels(self) -> Mapping[str, str]:
        """Values of `LABELS`."""
        return {
            "digest": self.digest,
            "strength": repr(self.strength),
            "num_sites": str(self.num_sites),
            "of_requests": "yes" if self.of_requests else "no",
        }


def read_statement(metrics: str) -> Statement | None:
    """What a server's metrics state; None where they state nothing.

    ServerError if they state something that cannot be read, because it must not pass for the plain model.
    """
    for line in _LINE.findall(metrics):
        found = dict(_LABEL.findall(line))
        try:  # the plugin of before 2026-11-30 knows nothing of requests
            of_requests = found.get("of_requests") == "yes"
            return Statement(found["digest"], float(found["strength"]), int(found["num_sites"]), of_requests)
        except (KeyError, ValueError) as error:
            raise ServerError(
                f"{METRIC}: expected digest, strength and num_sites among the server's metrics, got {line!r}; install "
                "one version of aura_dist here and in the server's environment"
            ) from error
    return None
