"""Every strategy on every architecture gives the store that one process gives. One launch a strategy."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from aura_dist.models.load import skeleton
from aura_dist.sites.find import decoder_layers_name
from aura_dist.store.access import open_group, read_array
from aura_dist.store.record import response_names
from aura_dist.store.schema import FIRST_TOKEN
from tests.distributed.launch import REPOSITORY, run_ranks
from tests.distributed.loop import OPTIONS, run_in_memory, run_plan
from tests.models import MIXTURE_CONFIGS, ODD_CONFIGS, TINY_CONFIGS

pytestmark = pytest.mark.timeout(420)

TOLERANCE = 1e-5
MODELS = ("llama", "falcon-rotary", "falcon-40b-style", "mpt", "gpt2", "opt", "bloom", "gemma3", "mistral")
# no columns of the README's table
OTHERS = ("falcon-alibi", "qwen3", "phi3", "mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3", "qwen3-next")
CONFIGS = TINY_CONFIGS | MIXTURE_CONFIGS | ODD_CONFIGS


@dataclass(frozen=True)
class Launch:
    """One row of the table of what is supported."""

    title: str
    num_ranks: int
    sharding: str
    options: tuple[tuple[str, object], ...] = ()
    refused: tuple[str, ...] = ()


LAUNCHES = (
    Launch("replicate", 2, "replicate"),
    Launch("fsdp", 2, "fsdp"),
    Launch("fsdp=2 (2 replicas)", 4, "fsdp=2"),
    Launch("tensor", 2, "tensor", refused=("gpt2",)),
    Launch("tensor=2 (2 replicas)", 4, "tensor=2", refused=("gpt2",)),
    Launch("tensor=3", 3, "tensor=3", refused=("gpt2",)),
    Launch("fsdp=2,tensor=2", 4, "fsdp=2,tensor=2", refused=("gpt2",)),
    Launch("zero3", 2, "zero3"),
    Launch("zero3, offload to the CPU", 2, "zero3", (("offload", "cpu"),)),
    Launch("dispatch, partly on disk", 1, "dispatch", (("max_memory", ["cpu=150KB"]),)),
    Launch("layers", 2, "layers"),
)
# they run `OTHERS` too; but for one these are slow tests
ONCE_EACH = ("fsdp", "tensor", "fsdp=2,tensor=2", "zero3", "dispatch, partly on disk", "layers")


def assert_same(ours: Path, plain: Path, name: str) -> None:
    store, expected = open_group(str(ours)), open_group(str(plain))
    np.testing.assert_array_equal(read_array(store, "samples/row"), read_array(expected, "samples/row"))
    assert response_names(store) == response_names(expected)
    for path in response_names(expected):
        theirs = read_array(expected, path)
        difference = np.abs(read_array(store, path) - theirs).max() / np.abs(theirs).max()
        assert difference < TOLERANCE, f"{name}: {path}: {difference:.1e}"
    counts, plainly = (read_array(group, FIRST_TOKEN).max(axis=1).astype(int) for group in (store, expected))
    assert np.abs(counts - plainly).sum() <= 1e-3 * plainly.sum(), f"{name}: maxima at the first token"


def others(launch):
    marks = () if launch.sharding == "tensor" else pytest.mark.slow
    return pytest.param(launch, OTHERS, marks=marks, id=f"{launch.title}, other models")


@pytest.mark.parametrize(
    ("launch", "models"),
    [
        *(pytest.param(launch, MODELS, id=launch.title) for launch in LAUNCHES),
        *(others(launch) for launch in LAUNCHES if launch.title in ONCE_EACH),
    ],
)
def test_store_equals_that_of_one_process(launch, models, tiny_dir, sentences_csv, plain_store, tmp_path):
    options = {**OPTIONS, **dict(launch.options)}
    if launch.sharding == "dispatch":
        options["offload_folder"] = str(tmp_path / "offloaded")
    if launch.sharding == "layers":  # both ranks copy what they read
        options["layer_cache"] = str(tmp_path / "copies")
    directories = {name: str(tiny_dir(name)) for name in models}
    plan = {
        "sharding": launch.sharding,
        "options": options,
        "data": sentences_csv,
        "runs": {directory: str(tmp_path / name) for name, directory in directories.items()},
        "notes": str(tmp_path),
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run_ranks(launch.num_ranks, [str(tmp_path / "plan.json")], run_plan, timeout_seconds=400)
    notes = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(launch.num_ranks)]
    refused = {directories[name] for name in models if name in launch.refused}
    assert set(notes[0]["refused"]) == refused, notes[0]["refused"]
    for error in notes[0]["refused"].values():
        assert "use --sharding fsdp" in error
    written = Counter[str]()
    for rank in notes:
        written.update(rank["written"])
    assert set(written.values()) == {1}, "every chunk is written once, by one rank"
    assert [source for rank in notes for source in rank["read"]] == [sentences_csv] * len(models), "once a host"
    for name in models:
        if name not in launch.refused:
            assert_same(tmp_path / name, plain_store(name), name)
        if launch.sharding == "layers":
            assert len(list((tmp_path / "copies").glob("*/layer-*.safetensors"))) == 3 * len(models)
        if launch.sharding in ("fsdp", "fsdp=2", "zero3"):
            assert 0 < max(rank["whole"][directories[name]] for rank in notes) <= largest_whole(name), name


def test_texts_in_memory_reach_all_ranks(tiny_dir, sentences_csv, plain_store, tmp_path):
    run_ranks(2, [str(tiny_dir("llama")), sentences_csv, str(tmp_path / "store")], run_in_memory)
    assert_same(tmp_path / "store", plain_store("llama"), "llama")


def largest_whole(name: str) -> int:
    """Parameters of a model outside its layers (embeddings, the last norm), and of two layers."""
    base = skeleton(CONFIGS[name]()).base_model
    layers = base.get_submodule(decoder_layers_name(base))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return sum(p.numel() for p in base.parameters()) - sum(sizes) + 2 * max(sizes)


def test_table_of_the_readme_says_what_is_tested():
    text = (REPOSITORY / "README.md").read_text()
    for launch in LAUNCHES:
        cells = ["–" if name in launch.refused else "✓" for name in MODELS]
        assert f"| `{launch.title}` | {launch.num_ranks} | {' | '.join(cells)} |" in text
