"""`Team`: how the processes of a launch speak to each other.

All ranks share a key-value store (torch's, hosted by the launcher or by rank 0; in memory for a single process). Work
is claimed there, results of a few megabytes are gathered there, and every rank learns there of failures and signals.
The ranks of one replica run the same collectives, and so also agree step by step through a gloo group.
"""

import json
import logging
import os
import pickle
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from aura_dist.errors import AuraError, LostRankError, PeerError, RunInterruptedError, brief
from aura_dist.ranks.signals import interruption
from aura_dist.ranks.world import World

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
BEAT_SECONDS = 1.0
# a rank that has not beaten for so long is taken for dead
DEAD_SECONDS = 45.0
# after another rank has failed, a rank that hangs in a collective ends itself
GRACE_SECONDS = 12.0
EXIT_FAILED = 2
# torch's store refuses a value of more than 8 MiB
_VALUE_BYTES = 4 * 2**20
_GO_ON = "see what that rank said; finished tasks are kept: run the same command to go on"

Unit = TypeVar("Unit")
Value = TypeVar("Value")


class Team:
    """The processes of a launch, as one of them sees them."""

    def __init__(self, world: World, store: Store) -> None:
        self.world = world
        self.stop_signal: int | None = None  # number of a signal that another rank was stopped by
        self._store = store
        self._control: Any = None
        self._columns: Any = None
        self._failure: AuraError | None = None
        self._shown: list[int] = []
        self._num_here = 0  # ranks of this host, once `keep_abreast` has asked
        self._turns = Counter[str]()  # of each key of `keep_abreast` so far
        self._leaving = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="team-watcher", daemon=True)
        if world.layout.world_size > 1:
            self._watcher.start()

    @classmethod
    def alone(cls) -> "Team":
        """The team of a process that belongs to no launch."""
        return cls(World(), HashStore())

    def join(self, control: Any, columns: Any) -> None:
        """Take the process groups: the replica's, of host tensors, and the row worker's; None where one rank is all."""
        self._control, self._columns = control, columns

    # what all ranks share through the store

    def from_first(self, key: str, make: Callable[[], Any]) -> Any:
        """Return on every rank what `make` returns on rank 0, anything that JSON can hold; the others wait for it."""
        if self.world.is_first:
            value = make()
            self._store.set(f"value/{key}", json.dumps(value))
            return value
        return json.loads(self._awaited(f"value/{key}"))

    def once_a_host(self, key: str, make: Callable[[], Value]) -> Value:
        """Return on every rank what `make` returns on one rank of its host; the other ranks of the host wait for it.

        The value travels, pickled, through a file in memory that its maker keeps open until `close`. A rank that
        cannot open the file makes the value itself.
        """
        if self.world.layout.world_size == 1 or not hasattr(os, "memfd_create"):
            return make()
        place = f"file/{platform.node()}/{key}"
        if self.count(place):
            path, name = self._awaited(place).decode().split()
            try:
                with open(path, "rb") as file:
                    if name in os.readlink(f"/proc/self/fd/{file.fileno()}"):  # not a file that has taken its place
                        return cast(Value, pickle.load(file))
            except OSError:
                logger.debug("%s: what another rank made cannot be opened", key)
            return make()
        value, name = make(), uuid4().hex
        self._shown.append(os.memfd_create(name))
        with open(self._shown[-1], "wb", closefd=False) as file:
            pickle.dump(value, file, pickle.HIGHEST_PROTOCOL)
        self._store.set(place, f"/proc/{os.getpid()}/fd/{self._shown[-1]} {name}")
        return value

    def gather(self, key: str, value: Value, received: Callable[[], int | None] = lambda: None) -> list[Value]:
        """Return the values of all ranks, in rank order, on every rank; all of them wait for one another.

        A `key` serves once. Values are anything that can be pickled, of a few megabytes in all. `received` and what
        is raised: as in `meet`.
        """
        mine, own = pickle.dumps(value, pickle.HIGHEST_PROTOCOL), f"gather/{key}/{self.world.global_rank}"
        starts = range(0, len(mine), _VALUE_BYTES)
        for part, start in enumerate(starts):
            self._store.set(f"{own}/{part}", mine[start : start + _VALUE_BYTES])  # type: ignore[arg-type]
        self._store.set(own, str(len(starts)))
        values: list[Value] = []
        for rank in range(self.world.layout.world_size):
            theirs = f"gather/{key}/{rank}"
            parts = range(int(self._awaited(theirs, received)))
            values.append(pickle.loads(b"".join(self._store.get(f"{theirs}/{part}") for part in parts)))
        return values

    def count(self, key: str) -> int:
        """Add one to a counter; return how often that was done before."""
        return int(self._store.add(f"count/{key}", 1)) - 1

    def add(self, key: str, amount: int) -> int:
        """Add to a sum over all ranks; return the sum."""
        return int(self._store.add(f"sum/{key}", amount))

    def note(self, key: str, value: Mapping[str, int]) -> None:
        """Leave a few numbers for the other ranks."""
        self._store.set(f"note/{key}", json.dumps(dict(value)))

    def noted(self, key: str) -> dict[str, int]:
        """Return the numbers left under `key`, none if nobody left any."""
        return dict(json.loads(self._store.get(f"note/{key}"))) if self._store.check([f"note/{key}"]) else {}

    def check(self) -> None:
        """PeerError if another rank has failed, LostRankError if one is gone."""
        if self._failure is not None:
            raise self._failure

    def meet(self, key: str, received: Callable[[], int | None] = lambda: None) -> None:
        """Let rank 0 wait until all ranks have come here; the others do not wait.

        RunInterruptedError if a rank has received a signal, because it may never come. `received` returns the number
        of this rank's signal, if its handler only sets a flag.
        """
        self._store.add(key, 1)
        if self.world.is_first:
            self._wait(lambda: self._are_here(key), lambda: received() or self.stop_signal)

    def _are_here(self, key: str) -> bool:
        return bool(self._store.add(key, 0) == self.world.layout.world_size)

    # what the ranks of a replica share, step by step

    def share(self, number: int) -> list[int]:
        """Return the number of every rank of the replica, in rank order; all of them must call this together."""
        if self._control is None:
            return [number]
        mine = torch.tensor([number], dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.world.layout.replica_size)]
        dist.all_gather(everyone, mine, group=self._control)
        return [int(theirs) for theirs in everyone]

    def keep_step(self, received: int | None) -> None:
        """Raise what ends the work, on all ranks of the replica before the same batch.

        RunInterruptedError if a rank of the replica has received a signal (`received`: this one's), PeerError if
        another rank failed.
        """
        self.check()
        number = max(self.share(received or self.stop_signal or 0))
        if number:
            raise interruption(number)

    def claimed(
        self,
        key: str,
        units: Sequence[Unit],
        before: Callable[[], int | None],
        num_turns: Callable[[Unit], int] = lambda unit: 1,
    ) -> Iterator[tuple[Unit, int] | None]:
        """Hand this row worker its share of `units`, turn by turn, in step with the rest of its replica.

        Row workers claim units one by one from a counter that all ranks share, so that fast and slow ranks end
        together. The ranks of a replica take turns together, because their forwards may be collective. `key` names the
        counter and serves once. `units` are alike on all ranks, the longest first, and take `num_turns` turns, at least
        one. `before` is called before each turn: it raises what ends this rank's work, or returns the number of the
        signal that this rank has received, if it has.

        Yields (unit, index of the turn), or None for a turn in which the rank runs a forward and drops its result.
        """
        worker = self.world.rank // self.world.layout.tensor
        while claims := self._claim(key, units):
            turns = [0 if unit is None else num_turns(unit) for unit in claims]
            mine = claims[worker]
            for turn in range(max(turns)):
                self.keep_step(before())
                yield None if mine is None or turn >= turns[worker] else (mine, turn)
        self.meet(f"claimed/{key}", before)

    def claim(self, key: str, units: Sequence[Unit]) -> Unit | None:
        """Hand the next of `units` to this rank, which is a replica of its own; None at the end. As for `claimed`."""
        number = self.count(f"claimed/{key}")
        return units[number] if number < len(units) else None

    def _claim(self, key: str, units: Sequence[Unit]) -> list[Unit | None]:
        """Return the next unit of each row worker of the replica, None for one that gets none; nothing at the end."""
        leads = self.world.column_rank == 0
        claims = self.share(self.count(f"claimed/{key}") if leads else 0)[:: self.world.layout.tensor]
        return [units[c] if c < len(units) else None for c in claims] if min(claims) < len(units) else []

    def turn(self, key: str) -> int:
        """How many turns of `keep_abreast` this rank has begun."""
        return self._turns[key]

    def keep_abreast(self, key: str, received: Callable[[], int | None] = lambda: None, *, leaves: bool) -> None:
        """Begin a turn together with the other ranks of this host, so that they read the same files at the same time.

        Waits until each of them has begun as many turns, or has left; a rank that `leaves` does not wait. All ranks of
        the launch call this, and each leaves at its end. `received` and what is raised: as in `meet`.
        """
        turn = self._turns[key]
        self._turns[key] += 1
        if self.world.layout.world_size == 1:
            return
        host = platform.node()
        self._num_here = self._num_here or self.gather("hosts", host, received).count(host)
        left, begun = (f"turns/{host}/{key}/{which}" for which in ("left", turn))
        self._store.add(left if leaves else begun, 1)
        if not leaves:
            self._wait(
                lambda: self._store.add(begun, 0) + self._store.add(left, 0) >= self._num_here,
                lambda: received() or self.stop_signal,
            )

    def agreed(self, ids: Tensor) -> Tensor:
        """Return the `ids` of the row worker's first column rank; all of its ranks must call this together."""
        if self.world.layout.tensor == 1:
            return ids
        agreed, first = ids.clone(), self.world.rank - self.world.column_rank
        dist.broadcast(agreed, first, group=self._columns)  # through NCCL the host does not wait
        return agreed

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> None:
        """Send host tensors to other column ranks of the row worker, and fill `receives` with theirs."""
        first = self.world.rank - self.world.column_rank
        requests = [dist.isend(t, first + peer, group=self._columns) for peer, t in sorted(sends.items())]
        requests += [dist.irecv(t, first + peer, group=self._columns) for peer, t in sorted(receives.items())]
        for request in requests:
            assert request is not None
            request.wait()

    # the end

    def finish(self) -> None:
        """Leave; rank 0 stays until all others have left, because it may host the store."""
        self._store.add("departed", 1)
        if self.world.is_first:
            self._wait(lambda: self._are_here("departed"))

    def ended_by(self, error: BaseException) -> BaseException:
        """Tell the other ranks that `error` has ended this rank's work; return the error that it ends with.

        If several ranks fail, only the first says why. An error that came because another rank ended is a PeerError.
        """
        if self.world.layout.world_size == 1:
            return error
        try:
            if isinstance(error, RunInterruptedError):
                self._store.compare_set("stopped", "", f"{self.world.global_rank} {error.signal_number}")
                self._leave_stopped()
                return error
            if isinstance(error, RuntimeError):
                error = self._cause_of(error)
            return error if isinstance(error, (PeerError, LostRankError)) else self._tell(error)
        except RuntimeError:
            logger.debug("the launch's store is gone")
            return error
        except RunInterruptedError:  # a launcher ends the others at the first that fails; the reason must not be lost
            return error

    def _leave_stopped(self) -> None:
        """Let rank 0 wait for the others, but not long."""
        self._store.add("departed", 1)
        end = time.monotonic() + GRACE_SECONDS
        while self.world.is_first and time.monotonic() < end:
            if self._are_here("departed"):
                return
            time.sleep(POLL_SECONDS)

    def _cause_of(self, error: RuntimeError) -> BaseException:
        """Return another rank's failure if `error` came from it; its reason may take a moment to arrive."""
        end = time.monotonic() + 3 * BEAT_SECONDS
        while self._failure is None and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        if self._failure is not None:
            return self._failure
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            return LostRankError(f"another rank is gone: {brief(error, 120)}; {_GO_ON}")
        return error

    def _tell(self, error: BaseException) -> BaseException:
        mine = f"{self.world.global_rank} {str(error) or type(error).__name__}"
        first = self._store.compare_set("failure", "", mine).decode()
        if self.world.is_first:
            time.sleep(2 * BEAT_SECONDS)  # the store may end with this process: let the others read it
        return error if first == mine else PeerError("rank " + first.replace(" ", ": ", 1))

    def close(self) -> None:
        """Stop beating and watching, and drop what was made once a host."""
        while self._shown:
            os.close(self._shown.pop())
        self._leaving.set()
        if self._watcher.is_alive():  # a thread inside the store's code would abort the interpreter's end
            self._watcher.join()
        try:
            self._store.set(f"closed/{self.world.global_rank}", "1")
        except RuntimeError:
            logger.debug("the launch's store is gone")

    def _awaited(self, key: str, received: Callable[[], int | None] = lambda: None) -> bytes:
        """Return the value of a key once another rank has set it."""
        self._wait(lambda: self._store.check([key]), lambda: received() or self.stop_signal)
        return bytes(self._store.get(key))

    def _wait(self, done: Callable[[], bool], stopped: Callable[[], int | None] = lambda: None) -> None:
        while not done():
            self.check()
            if number := stopped():
                raise interruption(number)
            time.sleep(POLL_SECONDS)

    def _watch(self) -> None:
        """Beat, and look for failed, stopped and dead ranks, until `close`."""
        beats = dict.fromkeys(self._watched(), (0, time.monotonic()))
        while not self._leaving.wait(BEAT_SECONDS):
            try:
                self._store.add(f"beat/{self.world.global_rank}", 1)
                self._look(beats)
            except RuntimeError as error:  # the host of the store is gone
                self._failure = LostRankError(
                    f"the launch's store cannot be reached any more: {brief(error)}; {_GO_ON}"
                )
            if self._failure is not None and not self._leaving.wait(GRACE_SECONDS):
                logger.error("stopped because another rank failed: %s", self._failure)
                os._exit(EXIT_FAILED)

    def _watched(self) -> list[int]:
        """Return the ranks that this one waits for: its replica's; for rank 0, all."""
        size, first = self.world.layout.replica_size, self.world.replica * self.world.layout.replica_size
        ranks = range(self.world.layout.world_size) if self.world.is_first else range(first, first + size)
        return [rank for rank in ranks if rank != self.world.global_rank]

    def _look(self, beats: dict[int, tuple[int, float]]) -> None:
        if self._store.check(["failure"]):
            failed, _, reason = self._store.get("failure").decode().partition(" ")
            if int(failed) != self.world.global_rank:
                self._failure = PeerError(f"rank {failed}: {reason}")
        if self._store.check(["stopped"]):
            self.stop_signal = int(self._store.get("stopped").decode().split()[1])
        now = time.monotonic()
        for rank, (beat, since) in beats.items():
            current = self._store.add(f"beat/{rank}", 0)
            if current != beat:
                beats[rank] = (current, now)
            elif now - since > DEAD_SECONDS and not self._store.check([f"closed/{rank}"]):
                self._failure = LostRankError(f"rank {rank} gave no sign of life for {DEAD_SECONDS:.0f} s; {_GO_ON}")
