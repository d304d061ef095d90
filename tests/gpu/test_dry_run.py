"""The script for GPUs runs whole on a CPU, with small models, so that it cannot rot."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

import aura_dist
from tests.gpu import packages, right, script
from tests.gpu.fast import alike, without_ties
from tests.gpu.place import FAILED, MISSED, NOT_HERE, OK, RAN, Place, difference
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
    absent = ["arrays in page-locked memory", "waits of a step of decoding"]
    assert [row[1] for row in rows if row[4] == NOT_HERE] == absent
    assert [line.split(":")[0] for line in lines[2:8]] == [
        "- hardware", "- date", "- versions", "- commit", "- command", "- result",
    ]  # fmt: skip


def test_a_cpu_is_not_counted_as_a_gpu_that_is_right():
    cpu, gpu = (Place(device, False, "") for device in ("cpu", "cuda"))
    assert [p.same("x", 1e-5, 1e-4).verdict for p in (cpu, gpu)] == [RAN, OK]
    assert [p.same("x", float("nan"), 1e-4).verdict for p in (cpu, gpu)] == [MISSED, MISSED]
    assert [p.fast("x", "2×", "1×", False).verdict for p in (cpu, gpu)] == [RAN, MISSED]
    assert cpu.needs_gpu("x").verdict == NOT_HERE


@pytest.mark.parametrize(("value", "verdict"), [(1.0, OK), (1.1, MISSED), (np.nan, MISSED), (np.inf, MISSED)])
def test_stores_that_differ_or_are_not_finite_are_not_right(value, verdict, monkeypatch):
    def opened(path):
        found = np.full((2, 3), value if path == "ours" else 1.0, np.float32)
        sites = {f"/activations/{name}": xr.Dataset({"max": (("sample", "neuron"), found)}) for name in "ab"}
        return xr.DataTree.from_dict(sites if path != "none" else {"/activations": xr.Dataset()})

    monkeypatch.setattr(aura_dist, "open_store", opened)
    assert Place("cuda", False, "").same("x", difference("ours", "theirs"), 1e-4).verdict == verdict
    with pytest.raises(ValueError, match="zero-size"):
        difference("none", "none")


def test_prompts_that_are_compared_fill_batches():
    def tokenizer(texts):
        return {"input_ids": [text.split() for text in texts]}

    found = alike(["a", "b b", "c", "d d", "e e e", "f", "g g"], tokenizer, 4, 2)
    assert found == ["a", "c", "b b", "d d"]


def test_values_that_are_ranked_have_no_ties():
    values = np.sort(without_ties(2500, 50, "cpu").numpy(), axis=0)
    assert (values == np.arange(2500)[:, None]).all()


def failing(place):
    yield place.holds("first", "1", "1", True)
    raise RuntimeError("broken | here")


def endless(place):
    while True:
        pass


def killed(place):
    print("about to end")
    os.kill(os.getpid(), signal.SIGKILL)
    yield


def leaving(place):
    yield place.holds("first", "1", "1", True)
    os._exit(0)


def silent(place):
    yield from ()


@pytest.mark.parametrize(
    ("run", "num_kept", "says"),
    [
        (failing, 1, "RuntimeError: broken / here"),
        (endless, 0, "still running after 2 s"),
        (killed, 0, "ended by SIGKILL; its last line: about to end"),
        (leaving, 1, "ended before its last row"),
        (silent, 0, "ended before its last row"),
    ],
)
def test_a_part_that_fails_or_hangs_keeps_its_rows_and_stops_no_other(run, num_kept, says, monkeypatch, tmp_path):
    monkeypatch.setitem(PARTS, "store", type(PARTS["store"])(run, 1))
    report = tmp_path / "report.md"
    args = script._parser().parse_args(["--device", "cpu", "--scratch", str(tmp_path), "--out", str(report)])
    it = script._Script(args, ["deepspeed"])
    it.server = multiprocessing.get_context("fork")  # the server has not seen the stand-in
    it._part("store", 2 if run is endless else 60, 1, [], "cpu")
    it._report("a machine", 1)
    *kept, last = it.rows["store"]
    assert [row.verdict for row in kept] == [OK] * num_kept
    assert last.verdict == FAILED
    assert says in last.measured
    assert "1 failed; 1 parts had not run" in report.read_text(), "what was found is kept if the script is cut off"
    it._part("zero3", 5, 1, ["deepspeed"], "cpu")
    assert it.rows["zero3"][0].verdict == NOT_HERE
    it.args.scratch = str(tmp_path / "gone")
    it._part("store", 2, 1, [], "cpu")
    assert "No such file" in it.rows["store"][0].measured


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "here.md"], "--out: expected a file that is not there yet, got 'here.md'"),
        (["--out", "nowhere/new.md"], "--out: expected a file in a directory that is there"),
        (["--scratch", "nowhere"], "--scratch: expected a directory to write to"),
        (["--wheels", "."], "--wheels: expected a directory of wheels, got '.', where none is"),
        (["--model", "."], r"--model: expected a directory with a config.json, got '.'"),
        (["--minutes", "0"], "--minutes: expected a number above 0, got 0"),
    ],
)
def test_options_that_would_fail_at_the_end_are_refused_at_the_beginning(words, says, monkeypatch, tmp_path, capsys):
    (tmp_path / "here.md").write_text("an earlier report")
    monkeypatch.chdir(tmp_path)
    assert script.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {says}")


def test_paths_are_as_seen_from_where_the_script_is_called(tmp_path):
    (tmp_path / "here.md").write_text("an earlier report")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("raise ImportError('another package')")
    run = ["bash", str(REPOSITORY / "tests" / "gpu" / "run.sh"), "--out", "here.md"]
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.split(",")[0]) == (2, "error: --out: expected a file that is not there yet")


@pytest.mark.parametrize(
    ("wanted", "there", "found"),
    [
        (None, "cuda", "cuda"),
        ("cpu", "cuda", "cpu"),
        (None, None, "error"),
        ("cuda", None, "error"),
        ("cuda:1", "cuda", "error"),
        ("gpu", "cuda", "error"),
    ],
)
def test_a_machine_without_the_gpu_that_is_asked_for_is_an_error(wanted, there, found, monkeypatch, tmp_path):
    gpu = SimpleNamespace(mem_get_info=lambda: (2**36, 2**37), get_device_name=lambda: "H100")
    monkeypatch.setattr("aura_dist.ranks.device.accelerator", lambda: there)
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    script._describe(wanted, str(tmp_path / "answer"))
    said = json.loads((tmp_path / "answer").read_text())
    if found == "error":
        assert said["error"].startswith("--device: expected ")
    else:
        assert (said["device"], said["hardware"].startswith("H100, 128 GiB (64 free)")) == (found, found == "cuda")
        assert list(said["parts"]) == list(PARTS)


def test_gpus_are_hidden_from_a_run_on_the_cpu(monkeypatch):
    names = ("CUDA_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR")
    for name in names:
        monkeypatch.setenv(name, "all")
    script._hide_gpus()
    assert [os.environ[name] for name in names] == ["", "opencl:cpu"]


def test_a_part_that_needs_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    (row,) = right.static(Place("cuda", True, str(tmp_path)))
    assert row.verdict == NOT_HERE


def test_versions_outside_of_what_is_asked_for_are_named(monkeypatch):
    found = {"torch": "2.8.1", "transformers": "5.23.0", "zarr": "2.18.3", "numpy": "2.1"}
    monkeypatch.setattr(packages, "installed", found.get)
    assert packages.outside_of_range() == ["torch 2.8.1, not 2.9 to 2.13", "zarr 2.18.3, not zarr>=3.1.6,<3.2"]


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
