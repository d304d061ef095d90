"""Units without a finite value are counted by `collect` and `fit`; where they are more than half, `collect` exits 2."""

import numpy as np
import pytest
import transformers as hf

import aura_dist
from aura_dist.cli import main
from aura_dist.store.access import open_group
from aura_dist.store.record import nonfinite_responses, units_without_numbers
from tests.models import tiny_tokenizer

WIDTHS = {"gate_proj": 80, "up_proj": 80, "down_proj": 48}


@pytest.fixture
def spoilt(tiny_dir, tmp_path):
    """`spoilt(change)`: a Llama with other weights, and the command that collects from it."""

    def model(change):
        one = hf.AutoModelForCausalLM.from_pretrained(tiny_dir("llama"))
        change(one.model.layers)
        one.save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        return [
            "collect",
            "--model",
            str(tmp_path / "model"),
            "--store",
            str(tmp_path / "s.zarr"),
            "--concepts",
            "toxic",
        ]

    return model


@pytest.fixture
def data(tmp_path):
    texts = ["you are kind", "an idle fool", "rain again, alas", "go away", "a long day", "stay", "oh well", "no, you"]
    path = tmp_path / "d.csv"
    path.write_text("text,toxic\n" + "".join(f'"{t}",{i % 2}\n' for i, t in enumerate(texts * 5)))
    return ["--data", str(path)]


def nan_from_the_first_layer(layers):
    layers[0].mlp.up_proj.weight.data.fill_(float("nan"))


def infinite_units(layers):
    """What follows the last layer's MLP is not captured; five units of it are infinite, and all that they reach NaN."""
    layers[2].mlp.up_proj.weight.data[3:8] = float("inf")


def some_texts_only(layers):
    """float16 would do so: a token's embedding overflows, so that texts without it are finite."""
    layers[2].mlp.down_proj.weight.data[7] = 3e38


def test_most_units_without_numbers_end_collect_and_the_store_is_kept(spoilt, data, refused, tmp_path, capsys):
    command = [*spoilt(nan_from_the_first_layer), *data]
    message = "8 of 9 modules and 544 of 624 units have no finite value in any text: expected at most half; .*--dtype"
    refused(command, message)
    group = open_group(str(tmp_path / "s.zarr"))
    assert group["progress/done"][:].all(), "the store is finished"
    refused(command, message)  # and a store that is there already is no better
    assert main(["score", "--store", str(tmp_path / "s.zarr"), "--statistics", "auroc"]) == 0


def test_some_units_without_numbers_are_counted(spoilt, data, tmp_path, capsys, monkeypatch):
    assert main([*spoilt(infinite_units), *data, "--pooling", "max", "mean"]) == 0
    bad = units_without_numbers(open_group(str(tmp_path / "s.zarr")))
    view = aura_dist.open_store(tmp_path / "s.zarr")["activations"]
    for site in view.children:
        never = [~np.isfinite(view[site][pooling].values).any(axis=0) for pooling in ("max", "mean")]
        assert bad.get(site, 0) == (never[0] | never[1]).sum()
    up, down = "model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"
    assert bad == {up: 5, down: 48}
    assert "1 of 9 modules and 53 of 624 units have no finite value in any text" in capsys.readouterr().err
    assert main(["score", "--store", str(tmp_path / "s.zarr")]) == 0
    fit = ["fit", "--store", str(tmp_path / "s.zarr"), "--concept", "toxic", "--out", str(tmp_path / "aura")]
    capsys.readouterr()
    assert main(fit) == 0
    assert "1 of 9 modules and 53 of 624 units have no finite scores" in capsys.readouterr().err
    assert main([*fit, "--modules", "!*.2.*"]) == 0
    assert "no finite scores" not in capsys.readouterr().err


def test_units_with_some_numbers_are_not_counted(spoilt, data, tmp_path, caplog):
    assert main([*spoilt(some_texts_only), *data, "--pooling", "max", "min"]) == 0
    group = open_group(str(tmp_path / "s.zarr"))
    bad, site = units_without_numbers(group), "model.layers.2.mlp.down_proj"
    view = aura_dist.open_store(tmp_path / "s.zarr")["activations"][site]
    never = [~np.isfinite(view[pooling].values).any(axis=0) for pooling in ("max", "min")]
    assert bad == ({site: int((never[0] | never[1]).sum())} if (never[0] | never[1]).any() else {})
    assert sum(nonfinite_responses(group).values()) > bad.get(site, 0)


def test_narrow_modules_that_are_most_of_them_end_collect(spoilt, data, refused):
    def spoil(layers):
        for layer in layers:
            layer.self_attn.k_proj.weight.data.fill_(float("nan"))

    # keys that are NaN make all that follows NaN, the projections of queries, keys and values of the first layer apart
    command = [*spoilt(spoil), *data, "--modules", "*.k_proj", "*.0.mlp.up_proj"]
    refused(command, "4 of 4 modules and 152 of 152 units have no finite value")
