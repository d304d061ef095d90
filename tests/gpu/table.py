"""The table of parts: what is run, in which order, and for how long at most."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.gpu import fast, right
from tests.gpu.place import Place, Row


@dataclass(frozen=True)
class Part:
    """One part, in a process of its own or in the ranks of a launch; `packages` are what no other part needs."""

    run: Callable[[Place], Iterator[Row]]
    seconds: int
    ranks: int = 1
    packages: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        return (self.run.__doc__ or "").strip().splitlines()[0]


# those that can find a fault come first, in the order in which a fault would spoil what follows
PARTS = {
    "store": Part(right.store, 60),
    "use": Part(right.use, 60),
    "copies": Part(right.copies, 60),
    "static": Part(right.static, 120),
    "memory": Part(right.memory, 60),
    "shared": Part(right.shared, 60, ranks=2),
    "collectives": Part(right.collectives, 60),
    "zero3": Part(right.zero3, 60, packages=("deepspeed",)),
    "stream": Part(fast.stream, 90),
    "peak": Part(fast.peak, 60),
    "hooks": Part(fast.hooks, 45),
    "kinds": Part(fast.kinds, 90),
    "continuing": Part(fast.continuing, 60),
    "layers": Part(fast.layers, 90),
    "pooled": Part(fast.pooled, 30),
}
