"""`World`: where this process stands among all processes of a launch. One frozen value, passed in, never global."""

import os
from dataclasses import dataclass

from aura_dist.errors import ConfigError

SHARDINGS = ("replicate",)


@dataclass(frozen=True)
class World:
    """Place of one process.

    A *replica* is a group of ranks that together hold one copy of the model; a *row worker* is a rank, or
    the ranks that share the columns (neurons) of the same rows.

    Attributes
    ----------
    replica, num_replicas
        Index of this process's replica, and how many there are.
    rank, replica_size
        Rank within the replica, and ranks in it.
    row_worker, num_row_workers
        Index of the row worker this process belongs to, and how many there are.
    device
        Device of this process, as torch names it.
    """

    replica: int = 0
    num_replicas: int = 1
    rank: int = 0
    replica_size: int = 1
    row_worker: int = 0
    num_row_workers: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """Whether this process makes the store and lists what is left."""
        return self.replica == 0 and self.rank == 0


def world_from_environment(sharding: str, device: str) -> World:
    """The world of this launch.

    Raises
    ------
    ConfigError
        `sharding` is unknown, or the launch has more than one process.
    """
    if sharding not in SHARDINGS:
        raise ConfigError(f"--sharding: expected one of {', '.join(SHARDINGS)}, got {sharding!r}")
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise ConfigError(f"this version runs one process; the launch has WORLD_SIZE={size}: start it without torchrun")
    return World(device=device)
