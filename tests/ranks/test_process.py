"""Cores that control groups leave, and processes that still run."""

import os
import subprocess

import pytest

from aura_dist.ranks.process import _began, _cpu_quotas, available_cores, is_running, this_process

GROUPS = {
    "version 2, a container's own": ("0::/", {"cpu.max": "200000 100000"}, [2.0]),
    "version 2, no limit": ("0::/job", {"job/cpu.max": "max 100000"}, []),
    "version 2, limits around it": (
        "0::/slice/job/step",
        {
            "slice/cpu.max": "800000 100000",
            "slice/job/cpu.max": "150000 100000",
            "slice/job/step/cpu.max": "max 100000",
        },
        [1.5, 8.0],
    ),
    "version 2, the host's path": ("0::/docker/abc", {"cpu.max": "50000 100000"}, [0.5]),
    "version 1": (
        "5:memory:/job\n4:cpu,cpuacct:/job\n0::/",
        {"cpu,cpuacct/job/cpu.cfs_quota_us": "300000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
        [3.0],
    ),
    "version 1, no limit": ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
    "version 1, the host's path": (
        "1:cpu:/docker/abc",
        {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"},
        [4.0],
    ),
    "none": ("", {}, []),
}


@pytest.mark.parametrize("case", GROUPS)
def test_quotas(case, tmp_path):
    groups, files, expected = GROUPS[case]
    for name, content in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(content + "\n")
    (tmp_path / "cgroup").write_text(groups + "\n" if groups else "")
    assert sorted(_cpu_quotas(tmp_path / "fs", tmp_path / "cgroup")) == expected


@pytest.mark.parametrize(("quotas", "cores"), [([], 8), ([2.0], 2), ([1.5, 6.0], 2), ([0.2], 1), ([64.0], 8)])
def test_cores_are_the_fewest_that_anything_allows(quotas, cores, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("aura_dist.ranks.process._cpu_quotas", lambda: quotas)
    assert available_cores() == cores


def test_process_runs_until_it_ends_and_its_number_is_not_enough():
    me = this_process()
    assert is_running(me) is True
    assert is_running({**me, "began": "1"}) is False, "another process had the number"
    assert is_running({**me, "space": "another machine"}) is None
    child = subprocess.Popen(["sleep", "60"])
    theirs = {**me, "pid": child.pid, "began": _began(child.pid)}
    assert is_running(theirs) is True
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_running(theirs) is False, "nobody has waited for it yet"
    child.wait()
    assert is_running(theirs) is False
