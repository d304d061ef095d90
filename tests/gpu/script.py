"""Run the parts one after another, each in processes of its own, and report.

This process imports no torch, so that a part that ends badly cannot harm it. A server that has imported everything
forks the parts. What a part finds is written row by row, so that a part that is cut off keeps its rows, and the report
is written after each part, so that a script that is cut off keeps its parts.
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
_SCRATCH_BYTES = 20e9
_LAST = "end"  # what a part writes after its last row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 if nothing failed and no aim was missed, 2 if it cannot begin."""
    args = _parser().parse_args(arguments)
    wrong = _wrong(args)
    if wrong is not None:
        return _error(wrong)
    target = packages.scratch_target()
    try:
        lacking = packages.lacking()
        if lacking and args.wheels:
            lacking = packages.from_wheels(lacking, args.wheels, target)
        packages.announce(target)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH"))))
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # a library that asks for a GPU while it is imported would start CUDA, which a process that is forked cannot use
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
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
    parser.add_argument("--device", help="cpu, or the machine's accelerator as torch calls it, which is the default")
    parser.add_argument("--tiny", action="store_true", help="small models: says whether it runs, not how fast it is")
    parser.add_argument("--wheels", type=Path, help="directory of wheels for packages that are not installed")
    parser.add_argument("--out", type=Path, help="new file for the report: tests/benchmarks/results/gpu-NAME.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--model", help="directory of a small real model, which the part `store` collects from too")
    parser.add_argument("--verbose", action="store_true", help="show what every part prints")
    parser.add_argument("--scratch", help="directory for stores and checkpoints; some 20 GB")
    return parser


def _wrong(args: argparse.Namespace) -> str | None:
    """What is wrong with the options, because eight minutes later would be too late; None if nothing is."""
    if args.out is not None and args.out.exists():
        return f"--out: expected a file that is not there yet, got {str(args.out)!r}; name another"
    if args.out is not None and not args.out.absolute().parent.is_dir():
        return f"--out: expected a file in a directory that is there, got {str(args.out)!r}; make the directory"
    if args.scratch is not None and not os.access(args.scratch, os.W_OK | os.X_OK):
        return f"--scratch: expected a directory to write to, got {args.scratch!r}; make it, or name another"
    if args.wheels is not None and not any(args.wheels.glob("*.whl")):
        return f"--wheels: expected a directory of wheels, got {str(args.wheels)!r}, where none is; name another"
    if args.model is not None and not Path(args.model, "config.json").is_file():
        return f"--model: expected a directory with a config.json, got {args.model!r}; name another"
    if not args.minutes > 0:
        return f"--minutes: expected a number above 0, got {args.minutes:g}"
    free = shutil.disk_usage(args.scratch or tempfile.gettempdir()).free
    if free < _SCRATCH_BYTES and not args.tiny:
        print(f"note: {free / 1e9:.0f} GB are free for stores and checkpoints, not 20 (--scratch DIR)", flush=True)
    return None


def _error(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


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
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a part must not outlive the script
        if self.args.device == "cpu":
            _hide_gpus()
        found = self._ask()
        if "error" in found:
            return _error(found["error"])
        device, hardware, parts = found["device"], found["hardware"], found["parts"]
        unknown = [name for name in self.args.parts if name not in parts]
        if unknown:
            return _error(f"parts: expected some of {', '.join(parts)}, got {unknown[0]!r}")
        print(f"{hardware}; {report.versions()}", flush=True)
        wanted = list(dict.fromkeys(self.args.parts or parts))
        for number, name in enumerate(wanted, start=1):
            self._part(name, *parts[name], device)
            self._report(hardware, len(wanted) - number)
        print("\n" + report.table(self.rows, self.seconds) + f"\n\n{report.counts(self.rows)}", flush=True)
        bad = {row.verdict for found in self.rows.values() for row in found} & {FAILED, MISSED}
        return 1 if bad else 0

    def _report(self, hardware: str, left: int) -> None:
        """Write the report of what has run, if one is wanted; `left` parts have not."""
        if self.args.out is not None:
            words = " ".join(["bash tests/gpu/run.sh", *self.args.parts, *(["--tiny"] if self.args.tiny else [])])
            text = report.markdown(hardware, words, self.rows, self.seconds, self.logs, left)
            self.args.out.write_text(text, encoding="utf-8")

    def _ask(self) -> dict[str, Any]:
        """`device`, `hardware` and `parts`, or `error`, from a process that imports torch."""
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            process = self.server.Process(target=_describe, args=(self.args.device, str(answer)))
            process.start()
            process.join(120)
            process.kill()
            if not answer.exists():
                return {"error": "torch or the product cannot be imported, or the GPU cannot be used; see above"}
            return dict(json.loads(answer.read_text()))

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
            self.rows[name] = self._run(name, ranks, left, device)
        self.seconds[name] = time.monotonic() - begun
        for row in self.rows[name]:
            print(f"{name:12} {row.verdict:9} {row.what}: {row.measured} ({row.aim})", flush=True)

    def _run(self, name: str, ranks: int, left: float, device: str) -> list[Row]:
        """Rows of a part; one more if any of its processes fails or takes too long."""
        # what a part says is elsewhere than what it makes, because it may fill that disk
        folder = {"prefix": f"aura-gpu-{name}-", "ignore_cleanup_errors": True}
        try:
            with (
                tempfile.TemporaryDirectory(**folder) as notes,
                tempfile.TemporaryDirectory(**folder, dir=self.args.scratch) as scratch,
            ):
                found, log = (Path(notes) / f for f in ("rows.jsonl", "log.txt"))
                log.touch()
                found.touch()
                place = Place(device, self.args.tiny, scratch, self.args.model)
                codes = self._processes(name, ranks, left, place, str(log), str(found))
                said, lines = found.read_text().splitlines(), log.read_text(errors="replace").splitlines()
        except OSError as error:
            return [Row("–", _cell(str(error)), "–", FAILED)]
        rows = [Row(**json.loads(line)) for line in said if line.endswith("}")]
        fault = _fault(codes, left, lines, whole=bool(rows) and said[-1] == _LAST)
        rows += [] if fault is None else [Row("–", _cell(fault), "–", FAILED)]
        if self.args.verbose or {row.verdict for row in rows} & {FAILED, MISSED}:
            self.logs[name] = "\n".join(lines[-_LOG_LINES:])
            print(self.logs[name], flush=True)
        return rows

    def _processes(self, name: str, ranks: int, left: float, place: Place, log: str, found: str) -> list[int | None]:
        """Exit codes of the `ranks` processes of a part, None for one that has taken too long; none is left running."""
        envs = _environments(ranks)
        processes = [self.server.Process(target=_child, args=(name, place, env, log, found)) for env in envs]
        end = time.monotonic() + left
        try:
            for process in processes:
                process.start()
            while any(p.is_alive() for p in processes) and time.monotonic() < end:
                if any(p.exitcode for p in processes):
                    end = min(end, time.monotonic() + 15)  # the others see it and say so
                time.sleep(_POLL_SECONDS)
            return [process.exitcode for process in processes]
        finally:
            for process in processes:
                _end(process)


def _hide_gpus() -> None:
    """So that `--device cpu` is the same on any machine: some strategies run where the GPUs are."""
    from aura_dist.ranks.device import KINDS

    for kind in KINDS.values():
        name, _, value = kind.hidden_by.partition("=")
        os.environ[name] = value


def _fault(codes: Sequence[int | None], left: float, lines: Sequence[str], *, whole: bool) -> str | None:
    """Why a part is not right, by its processes' exit codes and what they printed; None if its rows are `whole`."""
    last = lines[-1] if lines else "it printed nothing"
    failed = [code for code in codes if code]
    if failed:
        return last if max(failed) > 0 else f"ended by {signal.Signals(-failed[0]).name}; its last line: {last}"
    if None in codes:
        return f"still running after {left:.0f} s"
    return None if whole else f"ended before its last row; its last line: {last}"


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split())[:200].replace("|", "/")


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
    if process.pid is None:  # it has not been started
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # if it has no group yet
    process.join(20)


def _describe(wanted: str | None, answer: str) -> None:
    import torch

    from aura_dist.ranks.device import accelerator
    from tests.gpu.table import PARTS

    found = accelerator()
    device, cores = wanted or found, len(os.sched_getaffinity(0))
    said: dict[str, Any] = {"device": device, "hardware": f"{cores} cores, no GPU"}
    if device is None:
        about = f"torch {torch.__version__}, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'all')!r}"
        said = {"error": f"--device: expected a GPU that torch can use, found none ({about}); or give --device cpu"}
    elif device not in ("cpu", found):
        said = {"error": f"--device: expected cpu{f' or {found}' if found else ', as there is no GPU'}, got {device!r}"}
    elif device != "cpu":
        gpu = torch.get_device_module(torch.device(device))
        free, total = (amount / 2**30 for amount in gpu.mem_get_info())
        said["hardware"] = f"{gpu.get_device_name()}, {total:.0f} GiB ({free:.0f} free), {cores} cores"
    said["parts"] = {name: (part.seconds, part.ranks, list(part.packages)) for name, part in PARTS.items()}
    Path(answer).write_text(json.dumps(said))


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
    if first:
        with open(found, "a", encoding="utf-8") as rows:
            rows.write(_LAST)
    print(f"{time.process_time():.1f} s of CPU time")
