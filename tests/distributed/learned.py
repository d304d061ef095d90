"""Trained maps by the ranks of a launch: several commands one after another, the last of which fails on rank 1."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aura_dist.cli import main
from aura_dist.errors import ModelError

BATCH_TOKENS = 120
SAVE_EVERY = 3
FAILS_IN_STEP = 5


def run_commands(commands: Sequence[str]) -> int:
    """Exit code of the last command; each rank prints what it writes."""
    from aura_dist.interventions import lineas
    from aura_dist.interventions.artifact import Intervention

    rank, save, descend = os.environ["RANK"], Intervention.save, lineas._Learner._descend
    lineas._BATCH_TOKENS, lineas._SAVE_EVERY = BATCH_TOKENS, SAVE_EVERY
    taken = []

    def announced(self: Intervention, directory: str | Path) -> None:
        print(f"rank {rank} writes {Path(directory).name}", flush=True)
        save(self, directory)

    def failing(self: Any, at: Any, rate: float) -> None:
        taken.append(rate)
        if rank == "1" and len(taken) == FAILS_IN_STEP:
            raise ModelError("no more steps here")
        descend(self, at, rate)

    Intervention.save = announced
    for command in commands[:-1]:
        if code := main(shlex.split(command)):
            return code
    lineas._Learner._descend = failing
    return main(shlex.split(commands[-1]))
