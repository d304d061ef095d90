"""LinEAS through the command line, against a few lines of plain torch."""

import gc
import re
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM

import aura_dist
from aura_dist.cli import main
from aura_dist.interventions import lineas
from aura_dist.interventions.artifact import Intervention
from aura_dist.text.table import read_table
from tests.models import tiny_causal, tiny_tokenizer

STEPS, TEXTS = 12, 10
SITES = ["transformer.h.0.mlp.c_fc", "transformer.h.1.ln_2", "transformer.h.2.mlp.c_proj"]


@pytest.fixture(scope="module")
def store(tiny_dir, sentences_csv, tmp_path_factory):
    place = tmp_path_factory.mktemp("lineas") / "store.zarr"
    known = ["--model", str(tiny_dir("gpt2")), "--data", sentences_csv, "--concepts", "toxic", "--store", str(place)]
    numbers = ["--num-positive", "12", "--num-negative", "14", "--max-tokens", "24"]
    assert main(["collect", *known, *numbers, "--modules", *SITES]) == 0
    return place


def fit(store, out, *more, steps=STEPS, rate=0.05):
    known = ["fit", "--store", str(store), "--concept", "toxic", "--out", str(out)]
    few = ["--method", "lineas", "--steps", str(steps), "--texts-per-class", str(TEXTS), "--learning-rate", str(rate)]
    return main([*known, *few, *map(str, more)])


@pytest.fixture(scope="module")
def fitted(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / "lineas"
    assert fit(store, out) == 0
    assert [p.name for p in out.parent.iterdir()] == ["lineas"], "no state is left"
    return out


def same_files(a, b):
    return (a / "intervention.safetensors").read_bytes() == (b / "intervention.safetensors").read_bytes()


def hooked(model, maps):
    """The maps by plain hooks, and what each site passes."""
    seen = {}

    def hook(name):
        scale, shift = (torch.tensor(values) for values in maps[name])

        def change(module, args, out):
            seen[name] = out * scale + shift
            return seen[name]

        return change

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in maps]
    return handles, seen


@torch.no_grad()
def loss(store, sentences_csv, maps):
    """The sum over sites of sorted squared differences, in units of the site, for the texts that the seed draws."""
    samples = aura_dist.open_store(store)["samples"]
    texts = read_table(sentences_csv, ["text"]).columns["text"]
    positive = samples["label"].values[:, 0] == 1
    draw = np.random.default_rng(0)
    rows = [draw.permutation(np.flatnonzero(of))[:TEXTS] for of in (positive, ~positive)]
    model, tokenizer = tiny_causal("gpt2"), tiny_tokenizer()

    def responses(rows, maps):
        handles, seen = hooked(model, maps)
        found = {name: [] for name in maps}
        for row in samples["row"].values[rows]:
            model(**tokenizer(texts[row], return_tensors="pt", truncation=True, max_length=24))
            for name in maps:
                found[name].append(seen[name][0].mean(dim=0))
        for handle in handles:
            handle.remove()
        return {name: torch.stack(of).sort(dim=0).values for name, of in found.items()}

    nothing = {name: (np.ones_like(w), np.zeros_like(w)) for name, (w, _) in maps.items()}
    z, y = responses(rows[0], maps), responses(rows[1], nothing)
    return float(sum(((z[n] - y[n]) ** 2).mean(dim=0).sum() / (y[n] ** 2).mean() for n in maps))


def test_maps_by_plain_hooks_give_the_same_logits_and_a_smaller_loss(fitted, store, sentences_csv):
    made = Intervention.load(fitted)
    maps = {name: made.map_of(name) for name in SITES}
    assert all((scale != 1).all() and shift.any() for scale, shift in maps.values())
    model, ids = tiny_causal("gpt2"), torch.arange(3, 40)[None]
    with torch.no_grad(), aura_dist.intervene(model, made):
        ours = model(input_ids=ids).logits
    handles, _ = hooked(model, maps)
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    nothing = {name: (np.ones_like(w), np.zeros_like(w)) for name, (w, _) in maps.items()}
    before, after = (loss(store, sentences_csv, of) for of in (nothing, maps))
    assert after < 0.6 * before
    assert made.meta["parameters"]["learning_rate"] == 0.05


def test_logged_loss_is_that_of_the_formula(store, sentences_csv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lineas, "_LOG_EVERY", 1)
    assert fit(store, tmp_path / "out", steps=1) == 0
    said = re.findall(r"lineas: loss (\S+) after (\d) of 1 steps", capsys.readouterr().err)
    made = Intervention.load(tmp_path / "out")
    maps = {name: made.map_of(name) for name in SITES}
    nothing = {name: (np.ones_like(w), np.zeros_like(w)) for name, (w, _) in maps.items()}
    assert [int(step) for _, step in said] == [0, 1]
    for (value, _), of in zip(said, (nothing, maps), strict=True):
        assert float(value) == pytest.approx(loss(store, sentences_csv, of), rel=1e-4)


def test_a_step_that_raises_the_loss_is_taken_back(store, sentences_csv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lineas, "_LOG_EVERY", 1)
    assert fit(store, tmp_path / "out", steps=40, rate=1e6) == 0
    said = capsys.readouterr().err
    losses = [float(value) for value in re.findall(r"lineas: loss (\S+) after", said)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    assert len(set(losses)) + int(re.search(r"(\d+) of 40 steps raised the loss", said)[1]) == 41
    made = Intervention.load(tmp_path / "out")
    assert losses[-1] == pytest.approx(loss(store, sentences_csv, {n: made.map_of(n) for n in SITES}), rel=1e-4)


def test_steps_that_are_taken_back_leave_no_memory_in_use(store, tmp_path, monkeypatch, capsys):
    callback, seen = lineas._callback, []

    def watched(tap, map_DD, tokens, pooled):
        call = callback(tap, map_DD, tokens, pooled)

        def run(raw, alone):
            found = call(raw, alone)
            seen.append(weakref.ref(pooled[tap.site]))
            return found

        return run

    monkeypatch.setattr(lineas, "_callback", watched)
    assert fit(store, tmp_path / "out", "--recompute", steps=20, rate=1e6) == 0
    assert int(re.search(r"(\d+) of 20 steps raised the loss", capsys.readouterr().err)[1]) > 5
    gc.collect()
    assert len(seen) > 20 * len(SITES)
    assert sum(responses() is not None for responses in seen) == 0


def test_in_bfloat16_it_learns_on_although_the_least_loss_is_partly_luck(
    tiny_dir, sentences_csv, tmp_path, monkeypatch, capsys
):
    known = ["--model", str(tiny_dir("gpt2")), "--dtype", "bfloat16", "--data", sentences_csv, "--concepts", "toxic"]
    numbers = ["--num-positive", "12", "--num-negative", "14", "--max-tokens", "24", "--modules", *SITES]
    assert main(["collect", *known, *numbers, "--store", str(tmp_path / "s.zarr")]) == 0
    monkeypatch.setattr(lineas, "_LOG_EVERY", 1)
    assert fit(tmp_path / "s.zarr", tmp_path / "out", steps=200) == 0
    losses = [float(value) for value in re.findall(r"lineas: loss (\S+) after", capsys.readouterr().err)]
    least = np.minimum.accumulate(losses)
    assert (np.array(losses) <= least * (1 + 2**-7)).all()
    assert losses[-1] < 0.6 * losses[0]
    assert len(set(losses[-50:])) > 25, "most of the last steps are kept"


def test_resumed_equals_uninterrupted(store, fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(lineas, "_SAVE_EVERY", 3)
    descend, taken = lineas._Learner._descend, []

    def broken(self, at, rate):
        taken.append(rate)
        if len(taken) == 9:
            raise MemoryError
        descend(self, at, rate)

    with monkeypatch.context() as patch:
        patch.setattr(lineas._Learner, "_descend", broken)
        with pytest.raises(MemoryError):
            fit(store, tmp_path / "out")
    assert (tmp_path / "out.training").is_file()
    kept = (tmp_path / "out.training").read_bytes()
    assert fit(store, tmp_path / "out") == 0
    assert same_files(tmp_path / "out", fitted)
    assert not (tmp_path / "out.training").exists()
    (tmp_path / "out.training").write_bytes(kept)
    assert fit(store, tmp_path / "out", "--fit-seed", 1) == 0
    assert fit(store, tmp_path / "whole", "--fit-seed", 1) == 0
    assert same_files(tmp_path / "out", tmp_path / "whole"), "a state of other settings is not gone on with"
    assert not same_files(tmp_path / "out", fitted)


def test_layers_computed_twice_make_the_same_maps(store, fitted, tmp_path):
    assert fit(store, tmp_path / "out", "--recompute") == 0
    mine, theirs = Intervention.load(tmp_path / "out"), Intervention.load(fitted)
    for name in SITES:
        for a, b in zip(mine.map_of(name), theirs.map_of(name), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_no_steps_is_the_identity(store, tmp_path):
    assert fit(store, tmp_path / "out", steps=0) == 0
    made = Intervention.load(tmp_path / "out")
    assert made.num_changed == 0
    assert all((made.map_of(name)[0] == 1).all() for name in SITES)


def test_penalties_leave_units_and_sites_as_they_are(store, fitted, tmp_path):
    assert fit(store, tmp_path / "sparse", "--sparsity", 0.05) == 0
    assert fit(store, tmp_path / "none", "--group-sparsity", 1000) == 0
    made = [Intervention.load(place).num_changed for place in (tmp_path / "none", tmp_path / "sparse", fitted)]
    assert made[0] == 0 < made[1] < made[2]


@pytest.mark.parametrize(("l1", "group"), [(0.3, 0.0), (0.0, 0.2), (0.2, 0.1), (0.0, 9.0)])
def test_proximal_operator_minimises_what_it_should(l1, group):
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(9, generator=draw, dtype=torch.float64)

    def objective(x):
        return 0.5 * ((x - v) ** 2).sum(-1) + l1 * x.abs().sum(-1) + group * 3 * x.norm(dim=-1)

    found = lineas.proximal(v, l1, group)
    others = found + torch.randn((5000, 9), generator=draw, dtype=torch.float64) * 10.0 ** -torch.arange(5000)[
        :, None
    ].remainder(5)
    assert (objective(others) >= objective(found) - 1e-12).all()


def test_folds(fitted, tiny_dir, tmp_path):
    out = tmp_path / "folded"
    assert main(["export", "--model", str(tiny_dir("gpt2")), "--intervention", str(fitted), "--out", str(out)]) == 0
    folded, model, ids = AutoModelForCausalLM.from_pretrained(out), tiny_causal("gpt2"), torch.arange(3, 40)[None]
    with torch.no_grad(), aura_dist.intervene(model, Intervention.load(fitted)):
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(folded(input_ids=ids).logits, expected, rtol=0, atol=1e-4)


def test_bad_input_is_one_line(store, tmp_path, refused, monkeypatch):
    known = ["fit", "--store", str(store), "--concept", "toxic", "--out", str(tmp_path / "out")]
    refused([*known, "--method", "lineas", "--texts-per-class", "13"], "--texts-per-class: expected at most 12, the n")
    refused([*known, "--method", "aura", "--steps", "5"], "--steps: expected it with --method lineas alone")
    refused([*known, "--method", "lineas", "--top-k", "5"], "--top-k: expected it with --method")
    few = ["--texts-per-class", "5"]
    for other in (b"{}", save({"step": torch.tensor(3)})):
        (tmp_path / "out.training").write_bytes(other)
        refused([*known, "--method", "lineas", *few], "cannot be read .*; remove it to train from the beginning")
    (tmp_path / "out.training").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(lineas, "summed", lambda world, tensors: [tensor / 0 for tensor in tensors])
        refused([*known, "--method", "lineas", *few], "expected finite gradients, got NaN or infinity at a loss of")
    monkeypatch.setattr(lineas, "_root_mean_square", lambda z_ND: float("nan"))
    refused([*known, "--method", "lineas", *few], "expected a finite loss of the model as it is, got nan")


def test_experts_learn_too(tiny_dir, sentences_csv, tmp_path, monkeypatch, capsys):
    """A mixture's values come by expert; each step brings their means nearer to those without the concept."""
    monkeypatch.setattr(lineas, "_LOG_EVERY", 1)
    store = tmp_path / "s.zarr"
    known = [
        "--model",
        str(tiny_dir("qwen3-moe")),
        "--data",
        sentences_csv,
        "--concepts",
        "toxic",
        "--store",
        str(store),
    ]
    numbers = ["--num-positive", "12", "--num-negative", "14", "--max-tokens", "24"]
    assert main(["collect", *known, *numbers, "--modules", "experts"]) == 0
    capsys.readouterr()
    assert fit(store, tmp_path / "map", steps=4, rate=0.01) == 0
    losses = [float(found) for found in re.findall(r"lineas: loss (\S+) after", capsys.readouterr().err)]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert losses[4] < losses[0]
    assert set(Intervention.load(tmp_path / "map").sites) == {f"model.layers.{i}.mlp.experts" for i in range(3)}
