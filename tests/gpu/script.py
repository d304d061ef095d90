"""Run the parts one after another, each in processes of its own, and report.

This process imports no torch, so that a part that ends badly cannot harm it. A server that has imported everything
forks the parts. What a part finds is written row by row, so that a part that is cut off keeps its rows.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.gpu import packages, report
from tests.gpu.place import FAILED, MISSED, NOT_HERE, Place, Row

_POLL_SECONDS = 0.05
_LOG_LINES = 30
_TINY_LIMIT = 5
# name → limit in seconds, ranks, packages that it needs: read by a process of its own, because the table imports torch
_Parts = dict[str, tuple[int, int, list[str]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 if nothing failed and no aim was missed, 2 if it cannot begin."""
    args = _parser().parse_args(arguments)
    target = packages.scratch_target()
    try:
        lacking = packages.lacking()
        if lacking and args.wheels:
            lacking = packages.from_wheels(lacking, args.wheels, target)
        packages.announce(target)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH"))))
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        for text in packages.outside_of_range():
            print(f"note: {text}", flush=True)
        if lacking:
            print(f"lacking: {' '.join(lacking)} (put their wheels into a directory: --wheels DIR)", flush=True)
        return 2 if set(lacking) - set(packages.OPTIONAL) else _Script(args, lacking).run()
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bash tests/gpu/run.sh", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="names of parts; all by default")
    parser.add_argument("--device", help="cpu, or the accelerator as torch calls it; the machine's by default")
    parser.add_argument("--tiny", action="store_true", help="small models: says whether it runs, not how fast it is")
    parser.add_argument("--wheels", type=Path, help="directory of wheels for packages that are not installed")
    parser.add_argument("--out", type=Path, help="report to write, for tests/benchmarks/results/gpu-NAME.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--model", help="directory of a small real model, which the part `store` collects from too")
    parser.add_argument("--verbose", action="store_true", help="show what every part prints")
    parser.add_argument("--scratch", help="directory for stores and checkpoints; some 20 GB")
    return parser


class _Script:
    """One run of the script."""

    def __init__(self, args: argparse.Namespace, lacking: Sequence[str]) -> None:
        self.args, self.lacking = args, lacking
        self.end = time.monotonic() + 60 * args.minutes
        self.rows: dict[str, list[Row]] = {}
        self.seconds: dict[str, float] = {}
        self.logs: dict[str, str] = {}
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload(["tests.gpu.preload"])

    def run(self) -> int:
        device, hardware, parts = self._ask()
        unknown = [name for name in self.args.parts if name not in parts]
        if unknown:
            print(f"error: parts: expected some of {', '.join(parts)}, got {unknown[0]!r}", file=sys.stderr)
            return 2
        print(f"{hardware}; {report.versions()}", flush=True)
        for name in self.args.parts or parts:
            self._part(name, *parts[name], device)
        print("\n" + report.table(self.rows, self.seconds) + f"\n\n{report.counts(self.rows)}", flush=True)
        if self.args.out is not None:
            words = " ".join(["bash tests/gpu/run.sh", *self.args.parts, *(["--tiny"] if self.args.tiny else [])])
            text = report.markdown(hardware, words, self.rows, self.seconds, self.logs)
            self.args.out.write_text(text, encoding="utf-8")
        bad = {row.verdict for found in self.rows.values() for row in found} & {FAILED, MISSED}
        return 1 if bad else 0

    def _ask(self) -> tuple[str, str, _Parts]:
        """The device, the hardware's name, and the parts, from a process that imports torch."""
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            process = self.server.Process(target=_describe, args=(self.args.device, str(answer)))
            process.start()
            process.join(120)
            if not answer.exists():
                raise SystemExit("error: torch or the product cannot be imported; see above")
            found = json.loads(answer.read_text())
        return found["device"], found["hardware"], found["parts"]

    def _part(self, name: str, limit: int, ranks: int, needs: Sequence[str], device: str) -> None:
        """Run a part, and print what it found."""
        slow = _TINY_LIMIT if self.args.tiny else 1  # the limits are for a GPU on a machine that is idle
        left = min(slow * limit, self.end - time.monotonic())
        absent = [package for package in needs if package in self.lacking]
        begun = time.monotonic()
        if absent:
            self.rows[name] = [Row("–", f"needs {absent[0]}", "–", NOT_HERE)]
        elif left <= 0:
            self.rows[name] = [Row("–", "no time was left", "–", FAILED)]
        else:
            with tempfile.TemporaryDirectory(prefix=f"aura-gpu-{name}-", dir=self.args.scratch) as scratch:
                place = Place(device, self.args.tiny, scratch, self.args.model)
                self.rows[name] = self._processes(name, ranks, left, place)
        self.seconds[name] = time.monotonic() - begun
        for row in self.rows[name]:
            print(f"{name:12} {row.verdict:9} {row.what}: {row.measured} ({row.aim})", flush=True)

    def _processes(self, name: str, ranks: int, left: float, place: Place) -> list[Row]:
        """Rows of the first of `ranks` processes; one more if any of them fails or takes too long."""
        found, log = (Path(place.scratch) / f for f in ("rows.jsonl", "log.txt"))
        log.touch()
        found.touch()
        envs = _environments(ranks)
        processes = [self.server.Process(target=_child, args=(name, place, env, str(log), str(found))) for env in envs]
        end = time.monotonic() + left
        for process in processes:
            process.start()
        while any(p.is_alive() for p in processes) and time.monotonic() < end:
            if any(p.exitcode for p in processes):
                end = min(end, time.monotonic() + 15)  # the others see it and say so
            time.sleep(_POLL_SECONDS)
        late = any(p.is_alive() for p in processes)
        for process in processes:
            _end(process)
        rows = [Row(**json.loads(line)) for line in found.read_text().splitlines() if line.endswith("}")]
        lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        if late:
            rows.append(Row("–", f"still running after {left:.0f} s", "–", FAILED))
        elif any(p.exitcode for p in processes):
            rows.append(Row("–", (lines or ["ended without a word"])[-1][:200].replace("|", "/"), "–", FAILED))
        if self.args.verbose or {row.verdict for row in rows} & {FAILED, MISSED}:
            self.logs[name] = "\n".join(lines)
            print("\n".join(lines), flush=True)
        return rows


def _environments(ranks: int) -> list[dict[str, str]]:
    """Variables of each rank of a launch; none for a process that is alone."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **launch} for rank in range(ranks)]


def _end(process: Any) -> None:
    """End a part's process and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # if it has no group yet
    process.join(20)


def _describe(wanted: str | None, answer: str) -> None:
    import torch

    from aura_dist.ranks.device import accelerator
    from tests.gpu.table import PARTS

    device = wanted or accelerator() or "cpu"
    cores = len(os.sched_getaffinity(0))
    hardware = f"{cores} cores, no GPU"
    if device != "cpu":
        found = torch.get_device_module(torch.device(device))
        free, total = found.mem_get_info()
        hardware = f"{found.get_device_name()}, {total / 2**30:.0f} GiB ({free / 2**30:.0f} free), {cores} cores"
    parts = {name: (part.seconds, part.ranks, list(part.packages)) for name, part in PARTS.items()}
    Path(answer).write_text(json.dumps({"device": device, "hardware": hardware, "parts": parts}))


def _child(name: str, place: Place, env: dict[str, str], log: str, found: str) -> None:
    """Run one part, or one rank of it; rows go to a file as they come, all else to the log."""
    os.setpgrp()
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    from tests.gpu.table import PARTS

    first = env.get("RANK", "0") == "0"
    for row in PARTS[name].run(place):
        if first:
            with open(found, "a", encoding="utf-8") as rows:
                rows.write(json.dumps(asdict(row)) + "\n")
    print(f"{time.process_time():.1f} s of CPU time")
