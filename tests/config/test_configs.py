"""Every file of `configs/`: strictly parsed for every verb, and planned on its model's true shape, without weights."""

import json
import shutil
from pathlib import Path

import pytest

from aura_dist.cli import main
from aura_dist.config.file import merge, read_config_file
from aura_dist.config.settings import resolve
from aura_dist.config.verbs import VERBS
from tests.models import tiny_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPES = Path(__file__).parents[1] / "shapes"
# config → the shape of its model, and the neurons of that model's MLP, by hand: layers × (widths of its linear layers)
PLANNED = {
    "gpt2-xl": ("gpt2-xl", 48 * (6400 + 1600)),
    "falcon-7b": ("falcon-7b", 32 * (18176 + 4544)),
    "falcon-40b": ("falcon-40b", 60 * (32768 + 8192)),
    "mpt-7b": ("mpt-7b", 32 * (16384 + 4096)),
    "mpt-30b": ("mpt-30b", 48 * (28672 + 7168)),
    "llama-2-7b": ("llama-2-7b", 32 * (2 * 11008 + 4096)),
    "mistral-7b": ("mistral-7b", 32 * (2 * 14336 + 4096)),
    "llama-3.1-8b": ("llama-3.1-8b", 32 * (2 * 14336 + 4096)),
    "llama-3.1-70b": ("llama-3.1-70b", 80 * (2 * 28672 + 8192)),
    "gemma-3-1b": ("gemma-3-1b", 26 * (2 * 6912 + 1152)),
    "qwen3-8b": ("qwen3-8b", 36 * (2 * 12288 + 4096)),
    "demo": ("gemma-3-270m", 18 * (2 * 2048 + 640)),
}
SINGLE_STEPS = {"sequential"}  # sequential.sh gives each step what the file leaves out
PIPELINE = ("collect", "score", "fit", "evaluate")


def shape_dir(name: str, directory: Path) -> Path:
    """A model directory that holds the configuration alone."""
    directory.mkdir(exist_ok=True)
    shutil.copy(SHAPES / f"{name}.json", directory / "config.json")
    return directory


def test_no_config_is_left_out():
    runs = {path.stem for path in CONFIGS.glob("*.yaml") if "grid" not in read_config_file(str(path))}
    assert runs == {*PLANNED, *SINGLE_STEPS}


@pytest.mark.parametrize("name", PLANNED)
def test_config_is_whole_for_every_verb(name):
    document = read_config_file(str(CONFIGS / f"{name}.yaml"))
    for verb in PIPELINE:
        resolve(VERBS[verb].config, merge(verb, document, {}))
    fitted, evaluated = document["fit"]["out"], document["evaluate"]
    assert evaluated["intervention"] == fitted, "what is evaluated is what was fitted"
    assert Path(document["store"]).parent == Path(fitted).parents[1] == Path(evaluated["out"]).parents[1]


@pytest.mark.parametrize("name", SINGLE_STEPS)
def test_config_of_single_steps_is_known(name):
    document = read_config_file(str(CONFIGS / f"{name}.yaml"))
    resolve(VERBS["collect"].config, merge("collect", document, {"store": "s.zarr"}))
    resolve(VERBS["fit"].config, merge("fit", document, {"store": "s.zarr", "out": "i"}))


@pytest.mark.parametrize("name", PLANNED)
def test_plan_of_the_true_shape(name, tmp_path, capsys):
    shape, neurons = PLANNED[name]
    model = str(shape_dir(shape, tmp_path / shape))
    tiny_tokenizer().save_pretrained(model)  # the demo's texts are there, and `plan` tokenizes them
    command = ["plan", "--config", str(CONFIGS / f"{name}.yaml"), "--model", model, "--json"]
    assert main([*command, "--world-size", "8", "--device-memory", "80GB"]) == 0, capsys.readouterr().err
    plan = json.loads(capsys.readouterr().out)
    assert plan["captured"][1] == neurons
    assert plan["num_replicas"] >= 2, "8 GPUs make several replicas"


def test_readme_says_what_plan_says_of_falcon_40b(tmp_path, capsys):
    model = str(shape_dir("falcon-40b", tmp_path / "falcon-40b"))
    command = ["plan", "--config", str(CONFIGS / "falcon-40b.yaml"), "--model", model, "--json"]
    sizes = {}
    for sharding in ("fsdp", "tensor", "zero3", "fsdp=4"):
        more = ["--world-size", "8", "--device-memory", "80GB", "--sharding", sharding]
        assert main([*command, *more]) == 0, capsys.readouterr().err
        sizes[sharding] = f"{json.loads(capsys.readouterr().out)['device_bytes'] / 1e9:.1f}"
    said = " ".join((CONFIGS.parent / "README.md").read_text(encoding="utf-8").split())
    assert f"{sizes['fsdp']} GB under `fsdp` (over all 8), {sizes['tensor']} under `tensor=8`" in said
    assert f"{sizes['zero3']} under `zero3`; `fsdp=4` (two replicas" in said
    assert f"as in `configs/falcon-40b.yaml`) {sizes['fsdp=4']}." in said


@pytest.mark.parametrize("name", [n for n in PLANNED if n != "demo"])
def test_protocol_of_the_paper(name):
    document = read_config_file(str(CONFIGS / f"{name}.yaml"))
    config = resolve(VERBS["collect"].config, merge("collect", document, {}))
    assert (config.num_positive, config.num_negative, config.max_tokens) == (500, 2000, 128)
    assert (config.modules, config.pooling, config.concepts) == (["mlp"], ["max"], ["toxic"])
    assert config.clean_negatives == ["severe_toxic", "obscene", "threat", "insult", "identity_hate"]
