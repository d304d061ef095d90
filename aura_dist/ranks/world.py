"""`World`: the place of this process among all processes of a launch. One frozen value, passed in, never global."""

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from aura_dist.errors import ConfigError
from aura_dist.ranks.layout import Layout

# below 32768, because Linux gives the ports from there on to outgoing connections
_FIRST_PORT, _NUM_PORTS = 12_000, 20_000
# ports that the ranks of a Slurm step try one after another, so far apart that two jobs rarely try the same
_TRIES, _STRIDE = 8, 1009


@dataclass(frozen=True)
class World:
    """Place of one process: its rank in the launch and on this machine, and its device, as torch names it."""

    layout: Layout = Layout()
    global_rank: int = 0
    local_rank: int = 0
    device: str = "cpu"

    @property
    def replica(self) -> int:
        """Index of this process's replica."""
        return self.global_rank // self.layout.replica_size

    @property
    def rank(self) -> int:
        """Rank within the replica."""
        return self.global_rank % self.layout.replica_size

    @property
    def column_rank(self) -> int:
        """Rank within the row worker: which columns it has."""
        return self.global_rank % self.layout.tensor

    @property
    def is_first(self) -> bool:
        """Whether this process makes the store and lists what is left."""
        return self.global_rank == 0


@dataclass(frozen=True)
class Place:
    """What the launcher says of a process: its rank, the number of ranks, and its rank on this machine."""

    global_rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def place_from_environment(environment: MutableMapping[str, str] | None = None) -> Place:
    """The place that torchrun's variables say, else a Slurm job step's variables, else the only process's place.

    Under Slurm this also sets the variables that torch reads to meet the other ranks. MASTER_ADDR and MASTER_PORT come
    from the job step unless they are set.

    ConfigError if a variable is missing or not a number, if there is no such rank, or if this is a command in the shell
    of an interactive step of several tasks, because it is the only process there.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        return _checked(Place(_number(env, "RANK"), _number(env, "WORLD_SIZE"), _number(env, "LOCAL_RANK", "0")))
    if _number(env, "SLURM_STEP_NUM_TASKS", "1") > 1:
        if _is_typed(env):
            raise ConfigError(
                f"expected a process for each of the {env['SLURM_STEP_NUM_TASKS']} tasks of the Slurm step, got one in "
                "the shell of `srun --pty`: the others would never come; put `RANK=0 WORLD_SIZE=1` in front of the "
                "command to run it alone, or start it with `srun` (in this shell `srun --overlap`) to run it on all"
            )
        place = _checked(
            Place(
                _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_LOCALID", "0")
            )
        )
        env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", "localhost")))
        env.setdefault("MASTER_PORT", str(_step_ports(env)[0]))
        ranks = {"RANK": place.global_rank, "WORLD_SIZE": place.world_size, "LOCAL_RANK": place.local_rank}
        env.update({name: str(value) for name, value in ranks.items()})
        return place
    return Place()


def is_first_process(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process is the first of its launch, or belongs to none; also for a command typed in a step's shell.

    It asks for no meeting: the work of a single process that every rank does alike is written by the first alone.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        return _number(env, "RANK") == 0
    return _number(env, "SLURM_STEP_NUM_TASKS", "1") == 1 or _number(env, "SLURM_PROCID", "0") == 0


def _checked(place: Place) -> Place:
    if place.global_rank >= place.world_size:
        raise ConfigError(
            f"expected a rank (RANK or SLURM_PROCID) below the number of ranks, {place.world_size}, got "
            f"{place.global_rank}; start with torchrun or srun, or correct these variables"
        )
    return place


def _is_typed(env: Mapping[str, str]) -> bool:
    """Whether a person typed this command in a step's terminal: a shell runs each command in a group of its own."""
    if "SLURM_PTY_PORT" not in env:
        return False
    try:
        return os.getpgid(_number(env, "SLURM_TASK_PID")) != os.getpgrp()
    except (ConfigError, OSError):
        return True


def meeting_place(env: Mapping[str, str]) -> tuple[str, str, tuple[int, ...]]:
    """Where the ranks of a launch meet: a name of the launch, rank 0's host, and the ports that it tries in turn.

    There are several ports where they follow from a Slurm step. ConfigError if the launcher names no place.
    """
    if not env.get("MASTER_ADDR") or not 0 < _number(env, "MASTER_PORT", "0") < 2**16:
        raise ConfigError(
            "expected MASTER_ADDR and MASTER_PORT to be a host and a free port of rank 0, got "
            f"{env.get('MASTER_ADDR')!r} and {env.get('MASTER_PORT')!r}; set them, or start with torchrun or srun"
        )
    port, ranks = _number(env, "MASTER_PORT"), env.get("WORLD_SIZE", "1")
    if "SLURM_JOB_ID" in env and "SLURM_STEP_ID" in env and "TORCHELASTIC_RUN_ID" not in env:
        ports, step = _step_ports(env), f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}"
        return f"{step}/{ranks}", env["MASTER_ADDR"], ports if port == ports[0] else (port,)
    return f"ranks/{ranks}", env["MASTER_ADDR"], (port,)


def _step_ports(env: Mapping[str, str]) -> tuple[int, ...]:
    step = _number(env, "SLURM_JOB_ID") * 31 + _number(env, "SLURM_STEP_ID", "0")
    return tuple(_FIRST_PORT + (step + i * _STRIDE) % _NUM_PORTS for i in range(_TRIES))


def first_host(nodes: str) -> str:
    """First host of Slurm's compressed list: `gpu[07-09,12],login` → `gpu07`."""
    name, bracket, rest = re.split(r",(?![^\[]*\])", nodes)[0].partition("[")
    return name + re.split(r"[,\-\]]", rest)[0] + rest.partition("]")[2] if bracket else name


def _number(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    value = env.get(name, default)
    if value is None or not value.isdecimal():
        raise ConfigError(f"environment variable {name}: expected a number, as the launcher sets it, got {value!r}")
    return int(value)
