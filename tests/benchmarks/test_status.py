"""The README's table of what ran agrees with the results that are filed."""

import pytest

from tests.benchmarks.status import NO_GPU, README, table, with_table
from tests.gpu.place import MISSED, OK, Row
from tests.gpu.report import markdown


def test_readme_says_what_the_filed_results_say():
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text, table()), "run `python -m tests.benchmarks.status`"


def test_a_report_of_a_gpu_is_a_row(tmp_path):
    (tmp_path / "bench_x.txt").write_text(
        "bench_x.py\n2 cores of an AMD EPYC (Zen 3), no GPU; 2026-11-24; torch 2.13\n"
    )
    assert NO_GPU in table(tmp_path)
    rows = {"store": [Row("collect", "1e-6", "≤ 1e-4", OK), Row("AUROC", "1", "0", MISSED)]}
    (tmp_path / "gpu-h100.md").write_text(
        markdown("NVIDIA H100, 80 GiB", "run.sh", rows, {"store": 3.0}, {"store": "log"})
    )
    gpu, cpu = table(tmp_path).splitlines()[2:]
    assert gpu.startswith("| NVIDIA H100, 80 GiB | `tests/gpu` (torch 2.")
    assert gpu.endswith("1 ok, 1 missed: gpu-h100.md |")
    assert cpu.startswith("| 2 cores of an AMD EPYC (Zen 3), no GPU | bench_x | 2026-11-24 |")


def test_another_file_of_that_name_is_an_error(tmp_path):
    (tmp_path / "gpu-mine.md").write_text("fast\n")
    with pytest.raises(ValueError, match="expected a report of tests/gpu"):
        table(tmp_path)
