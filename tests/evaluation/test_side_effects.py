"""Side effects of an intervention: against loops over plain forwards, alone and on two ranks, and what is refused."""

import json

import numpy as np
import pytest
import torch

from aura_dist.cli import main
from aura_dist.errors import InputError
from aura_dist.evaluation.figures import form
from aura_dist.evaluation.side_effects import divergence_figures, divergences
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.gates import Gate
from aura_dist.interventions.use import LoadedModel
from aura_dist.ranks.team import Team
from aura_dist.sites.find import find_sites
from aura_dist.text.tokens import tokenize
from tests.models import save_tiny, tiny_causal, tiny_tokenizer

pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")

TEXTS = ["Short one.", "A sentence of middling length about nothing much.", "Word " * 30, "Rivers carry silt."]


def an_intervention(model, gated):
    """Moves every output of an MLP; the gate of one site opens at some tokens, those of the others never."""
    rng = np.random.default_rng(0)
    sites = [site for site in find_sites(model).sites if site.kind == "mlp"][:4]
    shift = {site.name: rng.normal(0, 0.5, site.width).astype(np.float32) for site in sites}
    scale = {site.name: np.ones(site.width, np.float32) for site in sites}
    gates = {}
    if gated:
        for site in sites:
            weight = rng.normal(0, 30.0 if site is sites[0] else 0.0, site.width).astype(np.float32)
            bias = np.array([-1.0 if site is sites[0] else -9.0], np.float32)
            gates[site.name] = Gate("tokens", {"weight": weight, "bias": bias})
    return Intervention(scale, shift, gate=gates)


@pytest.mark.parametrize("gated", [False, True])
def test_divergence_and_gates_equal_plain_loops(gated):
    model, tokenizer = tiny_causal("llama"), tiny_tokenizer()
    loaded = LoadedModel(model, tokenizer, "", an_intervention(model, gated))
    tokens = tokenize(TEXTS, tokenizer, max_tokens=128, skip_special=False, source="t")
    by_text, opened = divergences(loaded, 1.0, tokens, 1, 40, Team.alone(), lambda: None)
    expected_open = []
    for ids, found in zip(tokens.ids, by_text, strict=True):
        seen = []
        row = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.no_grad():
            p = model(row).logits[0, :-1].double().softmax(-1)
            with loaded.intervened(1.0, lambda site, g: seen.append(g[0, 1:, 0] > 0.5)):  # noqa: B023
                q = model(row).logits[0, :-1].double().softmax(-1)
        np.testing.assert_allclose(found, (p * (p / q).log()).sum(-1), rtol=1e-3, atol=1e-6)  # of float32 softmaxes
        expected_open.append(int(torch.stack(seen).any(0).sum()) if seen else 0)
    assert np.concatenate(by_text).max() > 1e-3
    if gated:
        assert opened.tolist() == expected_open
        assert any(expected_open)
    else:
        assert opened is None
        assert not any(expected_open)


def test_nothing_diverges_at_strength_0():
    model, tokenizer = tiny_causal("llama"), tiny_tokenizer()
    loaded = LoadedModel(model, tokenizer, "", an_intervention(model, gated=False))
    tokens = tokenize(TEXTS, tokenizer, max_tokens=128, skip_special=False, source="t")
    by_text, _ = divergences(loaded, 0.0, tokens, 1, 4096, Team.alone(), lambda: None)
    assert [len(values) for values in by_text] == [len(ids) - 1 for ids in tokens.ids]
    assert not np.concatenate(by_text).any()


def test_a_gate_that_opens_before_the_text_does_not_count():
    model, tokenizer = tiny_causal("llama"), tiny_tokenizer()
    site = next(site for site in find_sites(model).sites if site.kind == "mlp")
    gate = Gate("tokens", {"weight": np.zeros(site.width, np.float32), "bias": np.array([9.0], np.float32)})
    loaded = LoadedModel(
        model, tokenizer, "", Intervention({site.name: np.zeros(site.width, np.float32)}, gate={site.name: gate})
    )
    tokens = tokenize(TEXTS, tokenizer, max_tokens=128, skip_special=False, source="t")
    for context in (1, 3, 500):
        by_text, opened = divergences(loaded, 1.0, tokens, context, 40, Team.alone(), lambda: None)
        assert opened.tolist() == [max(0, len(ids) - context) for ids in tokens.ids] == list(map(len, by_text))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("effects")
    save_tiny("llama", place / "model")
    texts = [{"prompt": {"text": text, "toxicity": 0.9 if i % 2 else 0.1}} for i, text in enumerate(TEXTS)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    (place / "texts.csv").write_text("text\n" + "\n".join(TEXTS) + "\n")
    an_intervention(tiny_causal("llama"), gated=True).save(place / "map")
    common = [
        "evaluate", "--model", str(place / "model"), "--toxicity-prompts", str(place / "prompts.jsonl"),
        "--scorer", "profanity-check", "--num-samples", "3", "--max-new-tokens", "8",
    ]  # fmt: skip
    assert main([*common, "--out", str(place / "none.json")]) == 0
    return place, common


def test_evaluate_writes_them(files, capsys):
    place, common = files
    asked = [*common, "--intervention", str(place / "map"), "--perplexity-texts", str(place / "texts.csv")]
    asked += ["--side-effects", "--baseline", str(place / "none.json"), "--out", str(place / "map.json")]
    assert main(asked) == 0
    found = json.loads((place / "map.json").read_text())
    effects = found["side_effects"]
    assert effects["divergence"]["mean"] > 0
    assert effects["divergence"]["percentile_99"] > effects["divergence"]["mean"]
    assert effects["divergence"]["num_tokens"] == found["perplexity"]["num_tokens"]
    assert effects["gates"]["num_texts"] == len(TEXTS)
    assert effects["gates"]["num_tokens"] == found["perplexity"]["num_tokens"]
    assert 0 < effects["gates"]["open_tokens"] < effects["gates"]["open_texts"] <= 1
    plain, changed = effects["continuations"]["plain"], effects["continuations"]["intervened"]
    # of the two toxic prompts alone
    assert 0 < plain["num_texts"] == changed["num_texts"] <= 6
    assert plain["token_weighted"] != changed["token_weighted"]
    records = [json.loads(line) for line in (place / "none.continuations.jsonl").read_text().splitlines()]
    kept = [r for r in records if r["prompt_toxicity"] >= 0.5 and r["toxicity"] < 0.5 and r["ids"]]
    assert plain["num_tokens"] == sum(len(r["ids"]) for r in kept)
    model, tokenizer, total = tiny_causal("llama"), tiny_tokenizer(), 0.0
    for record in kept:
        head = tokenizer(record["prompt_text"])["input_ids"]
        ids = torch.tensor([[*head, *record["ids"]]])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        total -= float(log_p.gather(1, ids[0, 1:, None])[len(head) - 1 :].sum())
    assert plain["token_weighted"] == pytest.approx(np.exp(total / plain["num_tokens"]), rel=1e-5)
    assert found["toxicity"]["form"]["num_tokens"]["value"] <= 8


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--side-effects --perplexity-texts {}/texts.csv", "expected it with --intervention, got none"),
        ("--side-effects --intervention {}/map", "expected it with --perplexity-texts"),
        (
            "--side-effects --intervention {}/map --perplexity-texts {}/texts.csv --sharding layers --no-toxicity",
            "because each batch is read with and without the intervention, got --sharding layers",
        ),
    ],
)
def test_refused(files, words, expected, capsys):
    place, common = files
    given = words.replace("{}", str(place)).split()
    if "--no-toxicity" in given:
        given.remove("--no-toxicity")
        common = common[:3]
    assert main([*common, *given, "--out", str(place / "no.json")]) == 2
    assert expected in capsys.readouterr().err


def test_form_of_continuations():
    found = form([[[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]], [[7], [7, 7, 7, 7, 7]]])
    assert found["num_tokens"]["value"] == pytest.approx((5 + 5 + 1 + 5) / 4)
    assert found["repetition"]["value"] == pytest.approx((0.5 + 0 + 0 + 0.75) / 4)


def test_texts_that_predict_no_token_have_no_divergence():
    with pytest.raises(InputError, match="--side-effects: expected a perplexity text of at least two tokens, got none"):
        divergence_figures([np.empty(0), np.empty(0)])
