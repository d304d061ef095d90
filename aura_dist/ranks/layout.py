"""How the ranks of a launch divide the work: which of them hold one model together, which share rows or columns.

A *replica* is a group of ranks that together hold one copy of the model; replicas never keep step. A *row worker*
is a rank, or the ranks of a replica that share the columns (neurons) of the same rows. Pure functions of numbers.
"""

from dataclasses import dataclass
from math import prod

from aura_dist.errors import ConfigError

STRATEGIES = ("replicate", "fsdp[=K]", "tensor[=K]", "fsdp=N,tensor=K", "zero3", "dispatch")
_AXES = ("fsdp", "tensor")


@dataclass(frozen=True)
class Layout:
    """The parallel axes of a launch.

    Attributes
    ----------
    strategy
        `replicate`, `fsdp`, `tensor` (also together with `fsdp`), `zero3` or `dispatch`.
    world_size
        Ranks of the launch.
    fsdp
        Ranks over which each layer's weights are split, to be gathered a layer at a time (`zero3` too).
    tensor
        Ranks over which each layer's columns are split.
    """

    strategy: str = "replicate"
    world_size: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def replica_size(self) -> int:
        return self.fsdp * self.tensor

    @property
    def num_replicas(self) -> int:
        return self.world_size // self.replica_size

    @property
    def num_row_workers(self) -> int:
        return self.world_size // self.tensor


def parse_layout(sharding: str, world_size: int) -> Layout:
    """The layout of `--sharding` over the ranks of a launch.

    An axis without a number takes the ranks that the other leaves.

    Raises
    ------
    ConfigError
        An unknown strategy or number, or a product that does not divide the ranks.
    """
    if sharding == "replicate":
        return Layout("replicate", world_size)
    if sharding == "zero3":
        return Layout("zero3", world_size, fsdp=world_size)
    if sharding == "dispatch":
        if world_size != 1:
            raise ConfigError(
                f"--sharding dispatch: expected one process, which spreads the model over its devices, got {world_size}"
            )
        return Layout("dispatch")
    given = _axes(sharding)
    rest = world_size // prod(size for size in given.values() if size is not None)
    sizes = {axis: rest if size is None else size for axis, size in given.items()}
    ranks = prod(sizes.values())
    if ranks < 1 or world_size % ranks:
        factors = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError(
            f"--sharding {sharding}: expected {factors} = {ranks} ranks a replica to divide the {world_size} "
            "of the launch; change the numbers, or start another number of processes"
        )
    strategy = "tensor" if "tensor" in sizes else "fsdp"
    return Layout(strategy, world_size, sizes.get("fsdp", 1), sizes.get("tensor", 1))


def _axes(sharding: str) -> dict[str, int | None]:
    """`fsdp=2,tensor` → {"fsdp": 2, "tensor": None}."""
    sizes: dict[str, int | None] = {}
    for part in sharding.split(","):
        axis, equals, number = part.partition("=")
        valid = axis in _AXES and axis not in sizes and (not equals or (number.isdecimal() and int(number) > 0))
        if not valid:
            raise ConfigError(f"--sharding: expected one of {', '.join(STRATEGIES)}, got {sharding!r}")
        sizes[axis] = int(number) if equals else None
    if list(sizes.values()).count(None) > 1:
        raise ConfigError(f"--sharding {sharding}: expected a number for one of the axes, as in fsdp=2,tensor")
    return sizes
