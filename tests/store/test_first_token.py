"""How many units have their maximum at the first token: counted in every run, said by `score`, avoided by a flag."""

import shutil

import numpy as np
import pytest
import torch
import transformers as hf

import aura_dist
from aura_dist.cli import main
from aura_dist.collecting.capture import Capture
from aura_dist.sites.pooling import POOLINGS, TokenMask
from aura_dist.store.access import open_group, read_array
from aura_dist.store.first_token import _totals, first_token_warnings
from aura_dist.store.record import unfinished
from aura_dist.store.schema import FIRST_TOKEN, StoreSpec, first_token_columns
from aura_dist.text.table import read_table
from tests.models import tiny_tokenizer

SITES = ["model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj"]
SETTINGS = ["--modules", *SITES, "--tokens-per-batch", "256", "--num-positive", "70", "--num-negative", "70"]
SAYS = "at the first token in at least 95% of the texts"


@pytest.fixture(scope="module")
def model(tiny_dir, tmp_path_factory):
    """A Llama whose first token moves half of the units of one site far up or down, as attention sinks do."""
    directory = tmp_path_factory.mktemp("outlier")
    one = hf.AutoModelForCausalLM.from_pretrained(tiny_dir("llama"))
    torch.manual_seed(0)
    with torch.no_grad():
        one.get_input_embeddings().weight[0] *= 50
        direction = one.get_input_embeddings().weight[0] / one.get_input_embeddings().weight[0].norm()
        signs = torch.randint(-1, 2, (80, 1)).float()
        one.model.layers[0].mlp.gate_proj.weight += 3.0 * signs * direction
    one.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def collect(model, data, store, *more):
    settings = ["--model", str(model), "--data", data, "--concepts", "toxic", "--store", str(store), *SETTINGS]
    return main(["collect", *settings, *map(str, more)])


def read(store):
    group = open_group(str(store))
    spec = StoreSpec.of(group)
    return group, spec


def totals(store):
    group, spec = read(store)
    counts = _totals(group, range(read_array(group, FIRST_TOKEN).shape[0]))
    return {key: counts[columns] for key, columns in first_token_columns(spec).items()}


@torch.no_grad()
def brute_force(model, store, data):
    """(site, pooling) → [D] texts whose largest, smallest or absolutely largest value is the first token's."""
    rows = aura_dist.open_store(store)["samples"]["row"].values
    texts = read_table(data, ["text", "toxic"]).columns["text"]
    plain, tokenizer = (c.from_pretrained(model) for c in (hf.AutoModelForCausalLM, hf.AutoTokenizer))
    seen: dict[str, torch.Tensor] = {}
    for site in SITES:
        plain.get_submodule(site).register_forward_hook(lambda _m, _a, out, s=site: seen.__setitem__(s, out[0]))
    found = {(s, p): 0 for s in SITES for p in ("max", "min", "absmax")}
    for row in rows:
        plain(**tokenizer(texts[row], return_tensors="pt"))
        for site, acts_TD in seen.items():
            found[site, "max"] += (acts_TD.argmax(dim=0) == 0).numpy().astype(int)
            found[site, "min"] += (acts_TD.argmin(dim=0) == 0).numpy().astype(int)
            found[site, "absmax"] += (acts_TD.abs().argmax(dim=0) == 0).numpy().astype(int)
    return found


EVERY_POOLING = ["--pooling", "max", "mean", "min", "last", "absmax"]


@pytest.fixture(scope="module")
def counted(model, sentences_csv, tmp_path_factory):
    store = tmp_path_factory.mktemp("counted") / "s.zarr"
    assert collect(model, sentences_csv, store, *EVERY_POOLING) == 0
    return store


def test_counts_are_those_of_an_argmax_text_by_text(counted, model, sentences_csv):
    expected, found = brute_force(model, counted, sentences_csv), totals(counted)
    assert set(found) == set(expected)
    assert read_array(read(counted)[0], FIRST_TOKEN).shape[0] > 1, "several tasks"
    for key, counts in expected.items():
        assert np.abs(found[key] - counts).max() <= 1, key  # batches may round otherwise
        assert found[key].sum() > 0
    assert (found[SITES[0], "max"] == 140).sum() > 10


def test_score_says_how_many_units_and_what_to_do(counted, model, sentences_csv, tmp_path, capsys):
    number = int((totals(counted)[SITES[0], "max"] >= 0.95 * 140).sum())
    other = int((totals(counted)[SITES[1], "max"] >= 0.95 * 140).sum())
    for _ in range(2):  # also where all is scored
        assert main(["score", "--store", str(counted), "--statistics", "auroc"]) == 0
        error = capsys.readouterr().err
        assert f"{number + other} of 128 units (mlp {number}" in error
        assert f"have their max {SAYS}" in error
        assert f"have their min {SAYS}" in error
        assert f"have their absmax {SAYS}" in error
        assert "have their mean" not in error
        assert "have their last" not in error
    assert collect(model, sentences_csv, tmp_path / "s.zarr", "--skip-first-tokens", "1") == 0
    group, spec = read(tmp_path / "s.zarr")
    assert spec.skip_first_tokens == 1
    assert FIRST_TOKEN not in group
    assert main(["score", "--store", str(tmp_path / "s.zarr"), "--statistics", "auroc"]) == 0
    assert SAYS not in capsys.readouterr().err
    auroc = aura_dist.open_store(tmp_path / "s.zarr")["scores"][SITES[0]]["max"]["auroc"].values
    assert not (auroc == 0.5).any()


@pytest.mark.parametrize(("flag", "first"), [(["--skip-special-tokens"], 1), (["--skip-first-tokens", "3"], 3)])
def test_left_out_tokens_do_not_count_and_no_text_is_pooled_over_them(flag, first, model, sentences_csv, tmp_path):
    assert collect(model, sentences_csv, tmp_path / "s.zarr", *flag, "--pooling", "min", "mean") == 0
    group, spec = read(tmp_path / "s.zarr")
    assert list(first_token_warnings(group, spec)) == []
    view = aura_dist.open_store(tmp_path / "s.zarr")
    texts = read_table(sentences_csv, ["text", "toxic"]).columns["text"]
    plain, tokenizer = (c.from_pretrained(model) for c in (hf.AutoModelForCausalLM, hf.AutoTokenizer))
    seen = []
    plain.get_submodule(SITES[0]).register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    with torch.no_grad():
        for row in view["samples"]["row"].values[::20]:
            plain(**tokenizer(texts[row], return_tensors="pt"))
    for pooling, reduce in (("min", lambda acts: acts.min(dim=0).values), ("mean", lambda acts: acts.mean(dim=0))):
        expected = np.stack([reduce(acts[first:]).numpy() for acts in seen])
        ours = view["activations"][SITES[0]][pooling].values[::20]
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_counts_of_a_run_that_was_cut_off_and_continued_are_the_same(
    counted, model, sentences_csv, tmp_path, monkeypatch
):
    store, run, calls = tmp_path / "s.zarr", Capture.run, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(Capture, "run", interrupted)
    assert collect(model, sentences_csv, store, *EVERY_POOLING) == 130
    assert 0 < len(unfinished(read(store)[0])) < read_array(read(store)[0], FIRST_TOKEN).shape[0]
    monkeypatch.setattr(Capture, "run", run)
    assert collect(model, sentences_csv, store, *EVERY_POOLING) == 0
    for key, counts in totals(counted).items():
        np.testing.assert_array_equal(totals(store)[key], counts)


def test_store_that_was_begun_without_counts_is_continued_without(model, sentences_csv, tmp_path, capsys):
    store = tmp_path / "s.zarr"
    assert collect(model, sentences_csv, store) == 0
    shutil.rmtree(store / FIRST_TOKEN)
    group, _ = read(store)
    group["progress/done"][0] = 0
    assert collect(model, sentences_csv, store) == 0
    assert FIRST_TOKEN not in read(store)[0]
    capsys.readouterr()
    assert main(["score", "--store", str(store), "--statistics", "auroc"]) == 0
    assert SAYS not in capsys.readouterr().err


def test_only_texts_of_several_tokens_with_a_first_that_counts_are_evidence():
    mask_BT = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1]], dtype=np.bool_)
    acts_BTD = torch.zeros(4, 3, 2)
    acts_BTD[:, 0, 0] = 1.0
    acts_BTD[:, 2, 1] = -1.0
    mask = TokenMask.build(mask_BT, "cpu")
    for pooling, expected in (("max", [2, 2]), ("min", [0, 1]), ("absmax", [2, 1])):
        how = POOLINGS[pooling]
        counts_1D = mask.count_first(how.pool(mask, acts_BTD), acts_BTD, how.of_token)
        assert counts_1D.tolist() == [expected], pooling
