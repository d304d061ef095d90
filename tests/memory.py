"""Peak anonymous memory of a command: RssAnon summed over its process tree, sampled from /proc."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.05


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process and its children; 0 for one that has ended."""
    try:
        tree = [pid, *(c.pid for c in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for member in tree:
        try:
            lines = Path(f"/proc/{member}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return total


def peak_of(arguments: Sequence[str], timeout_seconds: float = 240, before: str = "") -> int:
    """Run `aura-dist ARGUMENTS`, after some lines of Python, and return its peak anonymous memory in bytes."""
    code = f"{before}\nimport sys\nfrom aura_dist.cli import main\nsys.exit(main(sys.argv[1:]))"
    peak, end = 0, time.monotonic() + timeout_seconds
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            if time.monotonic() > end:
                process.kill()
                raise AssertionError(f"still running after {timeout_seconds} s")
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
        output.seek(0)
        assert process.returncode == 0, output.read()
    return peak
