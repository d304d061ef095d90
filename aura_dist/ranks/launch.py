"""Start and end of a launch as one rank sees it: meet the others, join a replica, leave together."""

import itertools
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from aura_dist.ranks.device import backend_of, identity, kind_of
from aura_dist.ranks.layout import Layout
from aura_dist.ranks.meeting import TIMEOUT, meet
from aura_dist.ranks.process import available_cores
from aura_dist.ranks.team import Team
from aura_dist.ranks.world import Place, World, place_from_environment

logger = logging.getLogger(__name__)

_TEAMS = itertools.count()


class Sharding(Protocol):
    """What a launch asks of `models.strategies.table.Sharding`."""

    def layout(self, world_size: int) -> Layout: ...
    def collective(self, layout: Layout) -> bool: ...


@contextmanager
def start_team(sharding: Sharding, device: str, *, together: bool = False) -> Iterator[Team]:
    """The team of this launch, from the launcher's variables; meets the other ranks on entry.

    `sharding` says how the model is spread over the ranks, `device` is what `pick_device` returns. `together`: torch's
    default group holds all ranks, for the collectives of `rows.py`; replicas of several ranks must not be split then.

    ConfigError if the sharding does not fit the launch, or the other ranks cannot be met; PeerError if another rank
    failed, and says why.
    """
    if "OMP_NUM_THREADS" not in os.environ:  # torch counts the machine's cores, whatever share a container has
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    place = place_from_environment()
    layout = sharding.layout(place.world_size)
    world = World(layout, place.global_rank, place.local_rank, _device_of(place, device))
    alone = place.world_size == 1
    store: Any = (
        HashStore() if alone else PrefixStore(f"aura_dist/{next(_TEAMS)}", _launch_store(replace(place, local_rank=0)))
    )
    team = Team(world, store)
    try:
        # by a connection of its own, because a wait for a rank that fails now would block the watcher's
        if sharding.collective(layout):
            team.join(*_join_replica(world, store.clone()))
        elif together and not alone:
            _join(world, store.clone(), range(layout.world_size))
        yield team
        team.finish()
    except BaseException as error:
        ending = team.ended_by(error)
        if ending is error:
            raise
        raise ending from error
    finally:
        team.close()
        # on a GPU, leaving in the middle of a collective would wait for ranks that are gone
        if dist.is_initialized() and (sys.exc_info()[0] is None or world.device == "cpu"):
            dist.destroy_process_group()


def _device_of(place: Place, device: str) -> str:
    if device == "cpu" or place.world_size == 1:
        return device
    index = place.local_rank % torch.accelerator.device_count()  # a launcher may show each rank one GPU only
    torch.accelerator.set_device_index(index)
    os.environ["LOCAL_RANK"] = str(index)  # transformers and DeepSpeed take it for the number of the GPU
    return f"{device}:{index}"


@cache
def _launch_store(place: Place) -> Store:
    """The launch's key-value store. All teams of this process share it, because rank 0 can host only one."""
    return meet(place)


def _join_replica(world: World, store: Store) -> tuple[Any, Any]:
    """Process groups: of the replica, for host tensors, and of the row worker, for any; None where it is one rank.

    torch's default group, in which the strategy's collectives run, is the replica.
    """
    layout, first = world.layout, world.global_rank - world.rank
    _join(world, store, range(first, first + layout.replica_size))
    if layout.replica_size == 1:
        return None, None
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    columns = None
    for first in range(0, layout.replica_size, layout.tensor):
        group = dist.new_group(range(first, first + layout.tensor), timeout=TIMEOUT)
        if first == world.rank - world.column_rank:
            columns = group
    return control, columns


def _join(world: World, store: Store, ranks: range) -> None:
    """Make `ranks`, some neighbours that this rank is among, torch's default group."""
    os.environ.setdefault("LOCAL_RANK", "0")  # transformers and DeepSpeed ask for it also of a process that is alone
    dist.init_process_group(
        _backends(world, store, ranks),
        store=PrefixStore(f"ranks from {ranks.start}", store),
        rank=world.global_rank - ranks.start,
        world_size=len(ranks),
        timeout=TIMEOUT,
    )


def _backends(world: World, store: Store, ranks: range) -> str:
    """The backend of each kind of device, as torch spells it; gloo's where ranks share a GPU, as NCCL refuses that."""
    if world.device == "cpu":
        return "gloo"
    kind = kind_of(world.device)
    store.set(f"device/{world.global_rank}", identity(world.device))
    found = [store.get(f"device/{rank}") for rank in ranks]
    told = [device for device in found if device]
    shared = len(set(told)) < len(told)
    if shared and world.global_rank == ranks.start:
        logger.warning("ranks share a GPU: their collectives go through host memory, which is slow")
    return f"cpu:gloo,{kind}:{'gloo' if shared else backend_of(kind)}"
