"""The script for GPUs runs whole on a CPU, with small models, so that it cannot rot."""

import multiprocessing
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.gpu import packages, script
from tests.gpu.place import FAILED, MISSED, NOT_HERE, OK, RAN, Place
from tests.gpu.table import PARTS

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_every_part_runs_on_a_cpu(tmp_path):
    report = tmp_path / "gpu-none.md"
    words = ["--device", "cpu", "--tiny", "--minutes", "14", "--out", report, "--scratch", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", *map(str, words)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=890, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = report.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    assert [row[0].split("`")[1] for row in rows if row[0]] == list(PARTS)
    assert {row[4] for row in rows} <= {OK, RAN, NOT_HERE}
    assert [row[1] for row in rows if row[4] == NOT_HERE] == ["arrays in page-locked memory"]
    assert [line.split(":")[0] for line in lines[2:8]] == [
        "- hardware", "- date", "- versions", "- commit", "- command", "- result",
    ]  # fmt: skip


def test_a_cpu_is_not_counted_as_a_gpu_that_is_right():
    cpu, gpu = (Place(device, False, "") for device in ("cpu", "cuda"))
    assert [p.same("x", 1e-5, 1e-4).verdict for p in (cpu, gpu)] == [RAN, OK]
    assert [p.same("x", float("nan"), 1e-4).verdict for p in (cpu, gpu)] == [MISSED, MISSED]
    assert [p.fast("x", "2×", "1×", False).verdict for p in (cpu, gpu)] == [RAN, MISSED]
    assert cpu.needs_gpu("x").verdict == NOT_HERE


def failing(place):
    yield place.holds("first", "1", "1", True)
    raise RuntimeError("broken | here")


def endless(place):
    while True:
        pass


@pytest.mark.parametrize(("run", "says"), [(failing, "RuntimeError: broken / here"), (endless, "still running after")])
def test_a_part_that_fails_or_hangs_keeps_its_rows_and_stops_no_other(run, says, monkeypatch, tmp_path):
    monkeypatch.setitem(PARTS, "store", type(PARTS["store"])(run, 1))
    args = script._parser().parse_args(["--device", "cpu", "--scratch", str(tmp_path)])
    it = script._Script(args, ["deepspeed"])
    it.server = multiprocessing.get_context("fork")  # the server has not seen the stand-in
    it._part("store", 60 if run is failing else 2, 1, [], "cpu")
    it._part("collectives", 5, 1, ["deepspeed"], "cpu")
    *kept, last = it.rows["store"]
    assert [row.verdict for row in kept] == ([OK] if run is failing else [])
    assert last.verdict == FAILED
    assert says in last.measured
    assert it.rows["collectives"][0].verdict == NOT_HERE


def test_unknown_parts_and_absent_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(packages, "installed", lambda name: None if name in ("zarr", "zarrs") else "1")
    monkeypatch.setattr(packages, "announce", lambda target: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    assert script.main(["--device", "cpu"]) == 2
    assert "lacking: zarr zarrs (" in capsys.readouterr().out
    assert packages.lacking() == ["zarr", "zarrs"]
    assert "deepspeed" in packages.needed()


def make_wheel(folder, name, needs=""):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        about = f"{name}-1.0.dist-info"
        file.writestr(f"{name}.py", "here = True\n")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")


def test_packages_come_from_a_directory_of_wheels(tmp_path):
    """What is here already, such as NumPy, is not looked for; a name that no wheel has is named."""
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    wheels.mkdir()
    needs = "".join(f"Requires-Dist: {n}\n" for n in ("aura_other", "numpy", 'aura_more; extra == "x"', "aura_nowhere"))
    make_wheel(wheels, "aura_absent", needs)
    make_wheel(wheels, "aura_other")
    assert packages.from_wheels(["aura_absent"], wheels, target) == ["aura_nowhere"]
    assert {path.name for path in target.glob("*.py")} == {"aura_absent.py", "aura_other.py"}
