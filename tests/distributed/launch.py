"""Start several ranks under torchrun, with a time limit."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """That of a rank: one thread, no network, this checkout."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def torchrun(num_ranks: int, *arguments: str) -> list[str]:
    """The command that starts `python ARGUMENTS` on so many ranks of this machine."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [*run, *arguments]


def run_ranks(num_ranks: int, arguments: Sequence[str], timeout_seconds: float = 240) -> str:
    """Run to the end and return what was printed; AssertionError with it if that fails or takes too long."""
    command = torchrun(num_ranks, *arguments)
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout_seconds} s:\n{output}") from None
    assert process.returncode == 0, output
    return output
