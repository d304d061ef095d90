"""How the ranks of a launch divide the work: which of them hold one model together, which share rows or columns.

A *replica* is a group of ranks that together hold one copy of the model; replicas never keep step. A *row worker*
is a rank, or the ranks of a replica that share the columns (neurons) of the same rows. Pure functions of numbers.
"""

import re
from dataclasses import dataclass
from math import prod

from aura_dist.errors import ConfigError

_AXES = ("fsdp", "tensor")


@dataclass(frozen=True)
class Layout:
    """The parallel axes of a launch of `world_size` ranks, under a strategy of `models.strategies.table`."""

    strategy: str = "replicate"
    world_size: int = 1
    fsdp: int = 1  # ranks over which each layer's weights are split, to be gathered a layer at a time
    tensor: int = 1  # ranks over which each layer's columns are split

    @property
    def replica_size(self) -> int:
        return self.fsdp * self.tensor

    @property
    def num_replicas(self) -> int:
        return self.world_size // self.replica_size

    @property
    def num_row_workers(self) -> int:
        return self.world_size // self.tensor

    @property
    def axes(self) -> str:
        """The axes as `--sharding` spells them, `fsdp=2,tensor=4`; an axis of one rank is left out."""
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in _AXES if getattr(self, axis) > 1)


def read_axes(sharding: str) -> dict[str, int | None] | None:
    """`fsdp=2,tensor` → {"fsdp": 2, "tensor": None}; None for a text of another form."""
    sizes: dict[str, int | None] = {}
    for part in sharding.split(","):
        axis, equals, number = part.partition("=")
        if axis not in _AXES or axis in sizes or (equals and not re.fullmatch("[1-9][0-9]{0,8}", number)):
            return None
        sizes[axis] = int(number) if equals else None
    return sizes


def axes_layout(strategy: str, sharding: str, world_size: int) -> Layout:
    """The layout of axes that `read_axes` reads. An axis without a number takes the ranks that the other leaves.

    ConfigError if both axes lack a number, or their product does not divide the ranks.
    """
    given = read_axes(sharding)
    assert given is not None
    if list(given.values()).count(None) > 1:
        raise ConfigError(f"--sharding {sharding}: expected a number for one of the axes, as in fsdp=2,tensor")
    rest = world_size // prod(size for size in given.values() if size is not None)
    sizes = {axis: rest if size is None else size for axis, size in given.items()}
    ranks = prod(sizes.values())
    if ranks < 1 or world_size % ranks:
        factors = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError(
            f"--sharding {sharding}: expected {factors} = {ranks} ranks a replica to divide the {world_size} "
            "of the launch; change the numbers, or start another number of processes"
        )
    return Layout(strategy, world_size, **sizes)
