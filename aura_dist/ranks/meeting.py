"""How the ranks of a launch meet: all come within `MEETING_SECONDS`, or all end and name those that are missing.

Ranks that torchrun started meet in the store of its agent. Others come to rank 0, which listens at a port of the
launcher's. They exchange a few lines there before torch uses the port, because torch's client waits without end for a
program that listens and never answers:

    rank N → rank 0    aura_dist LAUNCH N ID SECONDS    which launch, rank and process, and how long it still waits
    rank 0 → rank N    here | taken                     this is that launch; or another process is its rank N
    rank N → rank 0    ready                            it heard that, and waits for the next
    rank 0 → rank N    go | missing 3, 5                all have come, or these did not come in time
"""

import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import uuid4

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from aura_dist.errors import ConfigError, brief
from aura_dist.ranks.world import Place, meeting_place

# a rank ends within a minute after its start, imports included
MEETING_SECONDS = 50.0
LONGER = "AURA_MEETING_SECONDS"
# after the meeting
TIMEOUT = timedelta(minutes=30)
POLL_SECONDS = 0.1
# how long a program at the port may take to answer, and torch to connect to a store that is there
ANSWER_SECONDS = 5.0
_CONNECT = timedelta(seconds=30)
_LINE_BYTES = 2**16


def meet(place: Place) -> Store:
    """The launch's key-value store, once all its ranks are there; ConfigError that names those that did not come."""
    given = os.environ.get(LONGER, str(MEETING_SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ConfigError(f"environment variable {LONGER}: expected a number of seconds above 0, got {given!r}")
    meeting = _Meeting(place, *meeting_place(os.environ), seconds, time.monotonic() + seconds)
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = meeting.at_agent(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        else:
            store = meeting.lead() if place.global_rank == 0 else meeting.join()
    except RuntimeError as error:  # torch's kind
        raise ConfigError(f"{meeting}: the launch's store cannot be reached: {brief(error)}") from error
    store.set_timeout(TIMEOUT)
    return store


@dataclass
class _Meeting:
    place: Place
    launch: str  # name of the launch, without spaces
    host: str
    ports: tuple[int, ...]  # to try in this order
    seconds: float
    deadline: float
    process: str = field(default_factory=lambda: uuid4().hex)
    claims: dict[int, str] = field(default_factory=dict)  # as rank 0: rank → the process that came as it

    def __str__(self) -> str:
        where = f"{self.host}:{', '.join(map(str, self.ports))}"
        return f"rank {self.place.global_rank} of {self.place.world_size}, which meets the others at {where}"

    def at_agent(self, restart: str) -> Store:
        """Wait in the store that torchrun hosts until all have come."""
        store = TCPStore(self.host, self.ports[0], None, False, _CONNECT)
        if store.add(f"came/{restart}/{self.place.global_rank}", 1) > 1:
            raise self._taken()
        store.add(f"came/{restart}", 1)
        while store.add(f"came/{restart}", 0) < self.place.world_size:
            if time.monotonic() > self.deadline:
                ranks = range(self.place.world_size)
                raise self._missing(", ".join(str(r) for r in ranks if not store.add(f"came/{restart}/{r}", 0)))
            time.sleep(POLL_SECONDS)
        return store

    def lead(self) -> Store:
        """As rank 0: listen, wait for the others, and hand the port to torch."""
        came: dict[int, socket.socket] = {}
        with self._listen() as listener:
            while len(came) < self.place.world_size - 1 and time.monotonic() < self.deadline:
                with suppress(TimeoutError):
                    threading.Thread(target=self._greet, args=(listener.accept()[0], came), daemon=True).start()
            missing = ", ".join(str(rank) for rank in range(1, self.place.world_size) if rank not in came)
            store = None
            if not missing:
                port, taken_over = listener.getsockname()[1], listener.detach()
                store = TCPStore(
                    self.host, port, None, True, _CONNECT, wait_for_workers=False, master_listen_fd=taken_over
                )
        for connection in came.values():
            with suppress(OSError), connection:
                connection.sendall(f"missing {missing}\n".encode() if missing else b"go\n")
        if store is None:
            raise self._missing(missing)
        return store

    def _listen(self) -> socket.socket:
        """A socket at the first port that is free, for both kinds of addresses where the machine has both."""
        kinds = [(socket.AF_INET6, True)] if socket.has_dualstack_ipv6() else []
        for port in self.ports:
            for family, both in (*kinds, (socket.AF_INET, False)):
                try:
                    listener = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=4096)
                except OSError as error:
                    reason = error
                    continue
                listener.settimeout(POLL_SECONDS)
                return listener
        raise ConfigError(f"{self}, cannot listen there: {brief(reason)}; set MASTER_PORT to a free port of its host")

    def _greet(self, connection: socket.socket, came: dict[int, socket.socket]) -> None:
        """Note a rank of this launch that has come; anything else is sent away."""
        rank, ours = -1, False
        with suppress(OSError, ValueError, IndexError), connection.makefile("rb") as said:
            connection.settimeout(ANSWER_SECONDS)
            words = said.readline(_LINE_BYTES).decode(errors="replace").split()
            if words[:2] == ["aura_dist", self.launch]:
                rank, process, left = int(words[2]), words[3], float(words[4])
                ours = self.claims.setdefault(rank, process) == process  # in one step, because ranks come side by side
                connection.sendall(b"here\n" if ours else b"taken\n")
                if ours and said.readline(_LINE_BYTES) == b"ready\n":
                    # so that every rank hears from this one before its own time is up
                    self.deadline = min(self.deadline, time.monotonic() + left - 1)
                    came[rank] = connection
                    return
        if ours and rank not in came:  # it hung up, so another process may come in its place
            self.claims.pop(rank, None)
        connection.close()

    def join(self) -> Store:
        """As another rank: find rank 0, and wait for its word."""
        found = ""
        while time.monotonic() < self.deadline:
            for port in self.ports:
                try:
                    if self._ask(port):
                        return TCPStore(self.host, port, None, False, _CONNECT)
                    found = f": what answers at port {port} is not rank 0 of this launch"
                except TimeoutError:
                    found = f": what listens at port {port} does not answer"
                except OSError as error:
                    found = found or f": {brief(error)}"
            time.sleep(POLL_SECONDS)
        raise self._missing("0", found)

    def _ask(self, port: int) -> bool:
        """Whether rank 0 is at this port, and all have come; ConfigError if rank 0 says that they have not."""
        left = self.deadline - time.monotonic()
        with (
            socket.create_connection((self.host, port), ANSWER_SECONDS) as connection,
            connection.makefile("rb") as answers,
        ):
            hello = f"aura_dist {self.launch} {self.place.global_rank} {self.process} {left}\n"
            connection.sendall(hello.encode())
            answer = answers.readline(_LINE_BYTES).strip()
            if answer == b"taken":
                raise self._taken()
            if answer != b"here":
                return False
            with suppress(OSError):  # rank 0 has ended
                connection.sendall(b"ready\n")
                connection.settimeout(max(left, ANSWER_SECONDS))
                answer = answers.readline(_LINE_BYTES).strip()
        word, _, missing = answer.decode().partition(" ")
        if word != "go":
            raise self._missing(missing or "the others", "" if missing else ": rank 0 came and ended; see what it said")
        return True

    def _missing(self, ranks: str, why: str = "") -> ConfigError:
        return ConfigError(
            f"{self}, waited up to {self.seconds:.0f} s for rank {ranks}{why}; expected {self.place.world_size} "
            f"processes to come: see what those said, start all, or set {LONGER} to more seconds"
        )

    def _taken(self) -> ConfigError:
        return ConfigError(f"{self}: expected one process of that rank, got another; give each process its own RANK")
