"""How a server states the intervention that it has laid over its model: one line among its metrics (Prometheus)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

METRIC = "aura_dist_intervention"
LABELS = ("digest", "strength", "num_sites")
_LINE = re.compile(rf"^{METRIC}\{{(.*)\}} [0-9.e+]+", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Statement:
    """Which maps are laid over a model, at which strength, at how many sites."""

    digest: str
    strength: float
    num_sites: int

    @property
    def labels(self) -> Mapping[str, str]:
        """Values of `LABELS`."""
        return {"digest": self.digest, "strength": repr(self.strength), "num_sites": str(self.num_sites)}


def read_statement(metrics: str) -> Statement | None:
    """What a server's metrics state; None where they state nothing."""
    for line in _LINE.findall(metrics):
        found = dict(_LABEL.findall(line))
        if found.keys() >= set(LABELS):
            return Statement(found["digest"], float(found["strength"]), int(found["num_sites"]))
    return None
