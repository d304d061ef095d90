"""`Team`: how the processes of a launch speak to each other.

Two ways, both of small messages only. Every rank reads and writes a key-value store (torch's, hosted by the launcher
or by rank 0; in memory for a single process): tasks are claimed and committed there, and failures and signals are
told to all. Ranks of one replica, which run the same collectives, also agree step by step through a gloo group.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from aura_dist.errors import AuraError, LostRankError, PeerError, RunInterruptedError, brief
from aura_dist.ranks.signals import interruption
from aura_dist.ranks.world import World

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
BEAT_SECONDS = 1.0
# a rank whose beat stands still for so long is taken for dead
DEAD_SECONDS = 60.0
# after another rank has failed, a rank that hangs in a collective ends itself
GRACE_SECONDS = 12.0
EXIT_FAILED = 2
_GO_ON = "see what that rank said; finished tasks are kept: run the same command to go on"


class Team:
    """The processes of a launch, as one of them sees them.

    Attributes
    ----------
    world
        This process's place.
    stop_signal
        Number of a signal that another rank was stopped by, or None.
    """

    def __init__(self, world: World, store: Store, control: Any = None, columns: Any = None) -> None:
        self.world = world
        self.stop_signal: int | None = None
        self._store = store
        self._control = control
        self._columns = columns
        self._failure: AuraError | None = None
        self._leaving = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="team-watcher", daemon=True)
        if world.layout.world_size > 1:
            self._watcher.start()

    # what all ranks share through the store

    def from_first(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gives on rank 0 (anything JSON holds), on every rank; the others wait for it."""
        if self.world.is_first:
            value = make()
            self._store.set(f"value/{key}", json.dumps(value))
            return value
        self._wait(lambda: self._store.check([f"value/{key}"]), lambda: self.stop_signal)
        return json.loads(self._store.get(f"value/{key}"))

    def count(self, key: str) -> int:
        """Add one to a counter; how often that was done before."""
        return int(self._store.add(f"count/{key}", 1)) - 1

    def add(self, key: str, amount: int) -> int:
        """Add to a sum over all ranks; the sum."""
        return int(self._store.add(f"sum/{key}", amount))

    def note(self, key: str, value: Mapping[str, int]) -> None:
        """Leave a few numbers for the other ranks."""
        self._store.set(f"note/{key}", json.dumps(dict(value)))

    def noted(self, key: str) -> dict[str, int]:
        """What was left under `key`; empty where nothing was."""
        return dict(json.loads(self._store.get(f"note/{key}"))) if self._store.check([f"note/{key}"]) else {}

    def check(self) -> None:
        """PeerError if another rank has failed, LostRankError if one is gone."""
        if self._failure is not None:
            raise self._failure

    def meet(self, key: str, received: Callable[[], int | None] = lambda: None) -> None:
        """Rank 0 waits until all ranks have come here; the others do not wait.

        Parameters
        ----------
        key
            Of the place.
        received
            Gives the number of the signal that this rank has received, if it has and its handler only sets a flag.

        Raises
        ------
        RunInterruptedError
            A rank has received a signal, and so may never come.
        """
        self._store.add(key, 1)
        if self.world.is_first:
            self._wait(lambda: self._are_here(key), lambda: received() or self.stop_signal)

    def _are_here(self, key: str) -> bool:
        return bool(self._store.add(key, 0) == self.world.layout.world_size)

    # what the ranks of a replica share, step by step

    def share(self, *numbers: int) -> list[list[int]]:
        """The numbers of every rank of the replica, in rank order; all of them must call this together."""
        if self._control is None:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.world.layout.replica_size)]
        dist.all_gather(everyone, mine, group=self._control)
        return [values.tolist() for values in everyone]

    def keep_step(self, received: int | None) -> None:
        """Before a batch: raise what ends the work, on all ranks of the replica at the same batch.

        Parameters
        ----------
        received
            Number of the signal that this rank has received, if it has.

        Raises
        ------
        RunInterruptedError
            A rank of the replica has received a signal.
        PeerError
            Another rank failed.
        """
        self.check()
        number = max(numbers[0] for numbers in self.share(received or self.stop_signal or 0))
        if number:
            raise interruption(number)

    def claim(self, key: str, num_units: int) -> list[int | None]:
        """The next unit of work for each row worker of the replica, None for one that gets none; all call it together.

        Units are handed out one by one from a counter that all ranks share. Empty where none of them gets one.
        """
        leads = self.world.column_rank == 0
        claims = [numbers[0] for numbers in self.share(self.count(key) if leads else num_units)]
        units = [c if c < num_units else None for c in claims[:: self.world.layout.tensor]]
        return units if any(unit is not None for unit in units) else []

    def agreed(self, ids: Tensor) -> Tensor:
        """What the first column rank of the row worker has in the place of `ids`; all of them call this together."""
        ranks = self.world.layout.tensor
        if ranks == 1:
            return ids
        host = ids.cpu()
        if self.world.column_rank == 0:
            self.exchange(dict.fromkeys(range(1, ranks), host), {})
        else:
            self.exchange({}, {0: host})
        return host.to(ids.device)

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> None:
        """Send host tensors to other column ranks of the row worker, and fill those that come from them."""
        first = self.world.rank - self.world.column_rank
        requests = [dist.isend(t, first + peer, group=self._columns) for peer, t in sorted(sends.items())]
        requests += [dist.irecv(t, first + peer, group=self._columns) for peer, t in sorted(receives.items())]
        for request in requests:
            assert request is not None
            request.wait()

    # the end

    def finish(self) -> None:
        """Leave; rank 0, which may host the store, stays until all others have left."""
        self._store.add("departed", 1)
        if self.world.is_first:
            self._wait(lambda: self._are_here("departed"))

    def ended_by(self, error: BaseException) -> BaseException:
        """What this rank ends with, after `error` has ended its work; tells the others.

        Of several ranks that fail, one tells why: the first. What broke because another rank ended is that rank's.
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

    def _leave_stopped(self) -> None:
        """Rank 0 waits for the others, but not long."""
        self._store.add("departed", 1)
        end = time.monotonic() + GRACE_SECONDS
        while self.world.is_first and time.monotonic() < end:
            if self._are_here("departed"):
                return
            time.sleep(POLL_SECONDS)

    def _cause_of(self, error: RuntimeError) -> BaseException:
        """The failure of another rank, if that is why `error` came: its reason may take a moment to arrive."""
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
        stands = self._store.compare_set("failure", "", mine).decode()
        if self.world.is_first:
            time.sleep(2 * BEAT_SECONDS)  # the store may end with this process: let the others read it
        return error if stands == mine else PeerError("rank " + stands.replace(" ", ": ", 1))

    def close(self) -> None:
        """Stop beating and watching."""
        self._leaving.set()
        if self._watcher.is_alive():  # within a call of the store's at the interpreter's end it would abort
            self._watcher.join()
        try:
            self._store.set(f"closed/{self.world.global_rank}", "1")
        except RuntimeError:
            logger.debug("the launch's store is gone")

    def _wait(self, done: Callable[[], bool], stopped: Callable[[], int | None] = lambda: None) -> None:
        while not done():
            self.check()
            if number := stopped():
                raise interruption(number)
            time.sleep(POLL_SECONDS)

    def _watch(self) -> None:
        """Beat, and look for failed, stopped and dead ranks, until the team is closed."""
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
                logger.error("stopped, as another rank failed: %s", self._failure)
                os._exit(EXIT_FAILED)

    def _watched(self) -> list[int]:
        """Ranks whose death this one would wait for: those of its replica, and for rank 0 all."""
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
