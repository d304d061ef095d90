"""A new kind of sites is one row and one module: collected, planned, changed and folded by all that there is."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import aura_dist
from aura_dist.cli import main
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.hooks import laid_over
from aura_dist.models.load import skeleton
from aura_dist.models.strategies.tensor_plan import seen_columns, tensor_plan
from aura_dist.sites.find import find_sites, tap_of
from aura_dist.sites.kinds import KINDS, kind_words, matching
from tests.kinds import ROWS
from tests.models import TINY_CONFIGS

IDS = torch.arange(5, 29).reshape(2, 12)
NAMES = {
    "residual": [f"model.layers.{i}" for i in range(3)],
    "neurons": [f"model.layers.{i}.mlp.down_proj:input" for i in range(3)],
}


@pytest.fixture(autouse=True)
def with_new_kinds(monkeypatch):
    for name, row in ROWS.items():
        monkeypatch.setitem(KINDS, name, row)


def listen(model, kind, seen):
    """Plain hooks that keep what the model has at the sites of a new kind."""
    for name in NAMES[kind]:
        module = model.get_submodule(name.partition(":")[0])
        if kind == "residual":
            module.register_forward_hook(lambda _m, _a, out, n=name: seen.__setitem__(n, out))
        else:
            module.register_forward_pre_hook(lambda _m, args, n=name: seen.__setitem__(n, args[0]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ROWS)
def test_new_kind_is_collected(kind, tiny_dir, tmp_path, capsys):
    texts = ["you are kind", "an idle fool", "rain again, alas", "go away"]
    (tmp_path / "t.csv").write_text("text,toxic\n" + "".join(f'"{t}",{i % 2}\n' for i, t in enumerate(texts)))
    data = ["--model", str(tiny_dir("llama")), "--data", str(tmp_path / "t.csv"), "--concepts", "toxic"]
    data += ["--modules", kind, "--pooling", "last"]
    assert main(["plan", *data]) == 0
    assert kind in capsys.readouterr().out
    assert main(["collect", *data, "--store", str(tmp_path / "s.zarr")]) == 0
    view = aura_dist.open_store(tmp_path / "s.zarr")
    assert list(view["activations"]) == NAMES[kind]
    model, tokenizer = (c.from_pretrained(tiny_dir("llama")) for c in (AutoModelForCausalLM, AutoTokenizer))
    seen: dict[str, torch.Tensor] = {}
    listen(model, kind, seen)
    for row, at in enumerate(view["samples"]["row"].values):
        model(**tokenizer(texts[at], return_tensors="pt"))
        for name, acts in seen.items():
            np.testing.assert_allclose(view["activations"][name]["last"].values[row], acts[0, -1], rtol=1e-4, atol=1e-5)


def random_map(kind):
    sites = find_sites(skeleton(TINY_CONFIGS["llama"]())).select([kind])
    assert [s.name for s in sites] == NAMES[kind]
    rng = np.random.default_rng(0)
    return Intervention({s.name: rng.uniform(0.2, 1.5, s.width).astype(np.float32) for s in sites})


@torch.no_grad()
@pytest.mark.parametrize("kind", ROWS)
def test_new_kind_is_changed_and_folded_or_refused_by_name(kind, tiny_dir, tmp_path, capsys):
    model, intervention = AutoModelForCausalLM.from_pretrained(tiny_dir("llama")), random_map(kind)
    plain = model(input_ids=IDS).logits
    with aura_dist.intervene(model, intervention):
        changed = model(input_ids=IDS).logits
    with laid_over(model.model, intervention, 1.0):
        assert torch.equal(model(input_ids=IDS).logits, changed)
    assert not torch.allclose(changed, plain, atol=1e-2)
    assert torch.equal(model(input_ids=IDS).logits, plain)
    intervention.save(tmp_path / "map")
    words = ["export", "--model", str(tiny_dir("llama")), "--intervention", str(tmp_path / "map")]
    code = main([*words, "--out", str(tmp_path / "out")])
    if not KINDS[kind].folds:
        assert code == 2
        assert f"'{NAMES[kind][0]}': a map of a {kind} site cannot be folded" in capsys.readouterr().err
    else:
        assert code == 0
        folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=IDS).logits
        torch.testing.assert_close(folded, changed, rtol=1e-5, atol=1e-5)


def test_rank_sees_its_slice_of_an_input():
    model = skeleton(TINY_CONFIGS["llama"]())
    plan, sites = tensor_plan(model, 2), {s.kind: s for s in find_sites(model).sites}
    assert seen_columns(plan, tap_of(model, sites["neurons"]), 2) == [((0, 40),), ((40, 80),)]
    assert seen_columns(plan, tap_of(model, sites["residual"]), 2) == [((0, 48),)] * 2


def test_words_of_modules():
    sites = find_sites(skeleton(TINY_CONFIGS["llama"]())).sites
    assert kind_words()["all"] == "attention and mlp"
    assert matching(sites, "all") == matching(sites, "attention") | matching(sites, "mlp")
    assert matching(sites, "*.down_proj:input") == matching(sites, "neurons")
