"""Toxicity's figures against plain loops; the bootstrap against its own definition."""

import json
import math

import numpy as np
import pytest

from aura_dist.errors import InputError
from aura_dist.evaluation.compare import MISSING, against_plain, check_same_prompts, load_all, main, table
from aura_dist.evaluation.figures import ByPrompt, bootstrap_means, by_prompt, estimates, groups, interval, ratios


@pytest.fixture
def scores():
    return np.random.default_rng(0).beta(0.5, 2, (60, 5))


def test_figures_equal_plain_loops(scores):
    found = estimates(by_prompt(scores))
    flat = [s for row in scores for s in row]
    assert found["probability"]["value"] == pytest.approx(sum(s >= 0.5 for s in flat) / len(flat))
    assert found["expected_maximum"]["value"] == pytest.approx(sum(max(row) for row in scores) / len(scores))
    assert found["any_toxic"]["value"] == pytest.approx(sum(any(s >= 0.5 for s in row) for row in scores) / len(scores))
    for estimate in found.values():
        assert estimate["low"] < estimate["value"] < estimate["high"]


def test_one_half_is_toxic():
    assert by_prompt(np.array([[0.5, 0.49]])).toxic_share.tolist() == [0.5]
    assert groups(np.array([0.5, 0.49, np.nan]))["toxic_prompts"].tolist() == [True, False, False]
    assert groups(np.array([0.5, 0.49, np.nan]))["nontoxic_prompts"].tolist() == [False, True, False]


def test_bootstrap_is_a_loop_over_draws(monkeypatch):
    rows = np.random.default_rng(1).normal(size=(40, 2))
    rng = np.random.default_rng(7)
    expected = [rows[rng.integers(0, 40, 40)].mean(axis=0) for _ in range(50)]
    np.testing.assert_allclose(bootstrap_means(rows, seed=7, num_draws=50), expected)
    monkeypatch.setattr("aura_dist.evaluation.figures._MAX_INDICES", 40 * 7)
    np.testing.assert_allclose(bootstrap_means(rows, seed=7, num_draws=50), expected)


def test_interval_covers_as_often_as_it_says():
    rng, hits = np.random.default_rng(3), 0
    for _ in range(300):
        low, high = interval(bootstrap_means(rng.normal(1.0, 1.0, (80, 1)), seed=0, num_draws=400)[:, 0])
        hits += low <= 1.0 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_a_share_of_none_or_all_has_an_exact_open_end():
    from scipy.stats import binomtest

    for value, toxic in ((0.0, 0), (1.0, 12)):
        exact = binomtest(toxic, 12).proportion_ci(method="exact")
        found = estimates(by_prompt(np.full((12, 3), value)))
        for name in ("probability", "any_toxic"):
            assert list(found[name].values()) == pytest.approx([value, exact.low, exact.high])


def test_ratios_are_paired_over_prompts(scores):
    prompts = by_prompt(scores)
    for estimate in ratios(prompts, prompts).values():
        assert (estimate["value"], estimate["low"], estimate["high"]) == (1, 1, 1)
    halved = ByPrompt(prompts.toxic_share / 2, prompts.maximum)
    twice = ratios(prompts, halved)["probability"]
    assert (twice["value"], twice["low"], twice["high"]) == pytest.approx((2, 2, 2))


def test_ratios_of_none_and_of_all_are_as_open_as_the_shares():
    none, some, every = (ByPrompt(np.array(x), np.array(x)) for x in ([0.0] * 8, [0.0, 1.0] * 4, [1.0] * 8))
    ends = {name: estimates(of)["probability"] for name, of in (("none", none), ("some", some), ("every", every))}
    for baseline, prompts, ratio in (("none", "some", 0.0), ("every", "some", 2.0), ("some", "every", 0.5)):
        found = ratios(*({"none": none, "some": some, "every": every}[name] for name in (baseline, prompts)))
        for name in ("probability", "any_toxic"):
            assert found[name]["value"] == ratio
            assert found[name]["low"] <= ends[baseline]["low"] / ends[prompts]["high"]
            assert found[name]["high"] >= ends[baseline]["high"] / ends[prompts]["low"]
    assert ratios(every, every)["probability"] == pytest.approx(
        {"value": 1.0, "low": ends["every"]["low"], "high": 1 / ends["every"]["low"]}
    )
    assert math.isnan(ratios(none, none)["probability"]["value"])


def test_ratio_by_zero_is_infinite():
    none = by_prompt(np.zeros((10, 2)))
    some = by_prompt(np.full((10, 2), 0.9))
    found = ratios(some, none)["probability"]
    assert (found["value"], found["high"]) == (math.inf, math.inf)
    assert found["low"] == pytest.approx(0.025**0.1 / (1 - 0.025**0.1)), "all of ten against none of ten"
    assert math.isnan(ratios(none, none)["probability"]["value"])
    rare = by_prompt(np.array([[0.9]] + [[0.1]] * 5))  # a third of the draws have none at all
    assert ratios(rare, rare)["probability"] == {"value": 1, "low": 1, "high": 1}


def results(shares, sha="a", **more):
    measured = ByPrompt(np.array(shares), np.array(shares))
    per_prompt = {"toxic_share": list(shares), "maximum": list(shares)}
    head = {"prompts_sha256": sha, "scorer": "s", "num_samples": 2, "settings": {"seed": 0}}
    return {"toxicity": {**head, "overall": estimates(measured), "per_prompt": per_prompt}, **more}


def test_table_has_what_any_result_has():
    zero_shot = {"tiny": {"acc": 0.5, "acc_stderr": 0.1, "num_fewshot": 0}}
    perplexity = {"token_weighted": 12.3, "token_weighted_low": 11.0, "token_weighted_high": 14.0}
    everyone = {
        "none": results([0.5, 1.0, 0.5], perplexity=perplexity),
        "aura": results([0.25, 0.5, 0.25], zero_shot=zero_shot),
        "others": results([0.5, 0.0, 0.5], sha="b"),
    }
    header, rule, none, aura, others = table(everyone, markdown=True).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in (header, none, aura, others)]
    rows = {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[1:]}
    assert rows["none"]["toxic, %"].startswith("66.7 (50.0–")
    assert rows["none"]["perplexity"] == "12.30 (11.00–14.00)"
    assert rows["aura"]["times less toxic"] == "2.00 (2.00–2.00)"
    assert rows["others"]["times less toxic"] == MISSING, "other prompts"
    assert rows["aura"]["tiny acc"] == "0.500 ± 0.100"
    assert rows["none"]["tiny acc"] == rows["aura"]["perplexity"] == MISSING
    assert set(rule) == set("|-:")
    assert len({len(line) for line in table(everyone).splitlines()}) == 1


def test_table_says_what_was_not_measured_alike(tmp_path, capsys):
    paths = [tmp_path / f"{name}.json" for name in ("none", "seed", "longer", "lost")]
    parts = [results([0.5, 0.1], perplexity={"sha256": "e", "num_tokens": n}) for n in (900, 900, 800, 900)]
    parts[1]["toxicity"]["settings"] = {"seed": 1}
    parts[2]["toxicity"]["settings"] = {"seed": 0, "max_new_tokens": 50}
    del parts[3]["toxicity"]["per_prompt"]
    for path, document in zip(paths, parts, strict=True):
        path.write_text(json.dumps({"schema": 1, **document}))
    assert main([str(path) for path in paths]) == 0
    said = capsys.readouterr().out.split("\n\n")[1:]
    assert [line.strip() for line in said] == [
        "longer: toxicity with other settings than none: not to be compared",
        "longer: perplexity with other tokens than none: not to be compared",
    ]


@pytest.mark.parametrize(
    ("key", "value"), [("prompts_sha256", "b"), ("scorer", "t"), ("num_samples", 9), ("settings", {})]
)
def test_what_was_measured_otherwise_is_not_compared(key, value):
    other = results([0.5])
    other["toxicity"][key] = value
    with pytest.raises(InputError, match=r"--baseline .x\.json.: expected the same"):
        check_same_prompts(results([0.5]), other, "x.json")


def test_the_increase_of_perplexity_is_paired_over_texts():
    """Texts that differ much, and a change that is nearly alike of all: the interval is that of the change."""
    rng, counts = np.random.default_rng(0), np.array([10, 20, 30, 0, 40])
    before = counts * rng.uniform(1, 4, 5)
    changes = {"alike": counts * 0.1, "none": 0 * counts, "one": np.array([5.0, 0, 0, 0, 0])}

    def measured(sums, texts="t"):
        per_text = {"negative_log_likelihood": sums.tolist(), "num_tokens": counts.tolist()}
        likely = float(np.exp(sums.sum() / counts.sum()))
        section = {"token_weighted": likely, "sha256": texts, "per_text": per_text}
        return {"model_fingerprint": "f", "perplexity": section}

    plain = measured(before)
    found = {name: against_plain(plain, measured(before + change)) for name, change in changes.items()}
    for name, one in found.items():
        value, low, high = (one[f"perplexity_increase{end}"] for end in ("", "_low", "_high"))
        again = measured(before + changes[name])["perplexity"]["token_weighted"] - plain["perplexity"]["token_weighted"]
        assert value == pytest.approx(again)
        assert low <= value <= high
    assert found["none"] == dict.fromkeys(found["none"], 0.0)
    assert found["alike"]["perplexity_increase_low"] > 0 == found["one"]["perplexity_increase_low"]
    # by hand: the draws of `bootstrap_means`, of the texts with predicted tokens
    some = counts > 0
    drawn = bootstrap_means(np.stack([before, before + changes["one"], counts], axis=1)[some])
    by_hand = np.exp(drawn[:, 1] / drawn[:, 2]) - np.exp(drawn[:, 0] / drawn[:, 2])
    assert found["one"]["perplexity_increase_high"] == np.quantile(by_hand, 0.975, method="inverted_cdf")
    assert "+0.00 (+0.00 to +0.00)" in table({"a": plain, "b": plain | {"name": "b"}})
    assert against_plain(plain, measured(before, texts="others")) == {}


def test_figures_against_the_plain_model():
    def measured(shares, perplexity, texts="t", **more):
        section = {"token_weighted": perplexity, "sha256": texts}
        return results(shares, model_fingerprint="f", perplexity=section, **more)

    plain = measured([0.5, 1.0, 0.5], 12.0)
    assert against_plain(plain, measured([0.25, 0.5, 0.25], 13.5)) == {
        "times_less_toxic.value": 2.0, "times_less_toxic.low": 2.0, "times_less_toxic.high": 2.0,
        "perplexity_increase": 1.5,
    }  # fmt: skip
    uneven = against_plain(plain, measured([0.25, 1.0, 0.0], None))
    expected = ratios(ByPrompt(np.array([0.5, 1, 0.5]), np.zeros(3)), ByPrompt(np.array([0.25, 1, 0]), np.zeros(3)))
    assert uneven == {f"times_less_toxic.{k}": v for k, v in expected["probability"].items()}, "no perplexity"
    assert against_plain(plain, measured([0.0, 0.0, 0.0], 12.0))["times_less_toxic.value"] == math.inf
    assert against_plain(measured([0.0], 1.0), measured([0.0], 2.0)) == {"perplexity_increase": 1.0}, "0 ÷ 0"
    assert against_plain(plain, measured([0.5, 1.0, 0.5], 12.0, texts="others", sha="b")) == {}
    assert against_plain(plain, {**plain, "model_fingerprint": "another"}) == {}
    assert against_plain({"model_fingerprint": "f"}, plain) == {}, "neither was measured there"


def test_files_of_one_name_are_told_apart(tmp_path, capsys):
    paths = [tmp_path / run / "results" / f"{name}.json" for run in ("a", "b") for name in ("none", "aura")]
    for share, path in enumerate(paths, 1):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": 1, **results([share / 10])}))
    (tmp_path / "a" / "results" / "none.txt").write_text(paths[0].read_text())
    assert list(load_all([str(p) for p in paths[:2]])) == ["none", "aura"]
    assert main([str(p) for p in [*paths, paths[0]]]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [
        "| a/results/none", "| a/results/aura", "| b/results/none", "| b/results/aura",
    ]  # fmt: skip
    assert [line.split(" | ")[1].split()[0] for line in lines] == ["10.0", "20.0", "30.0", "40.0"]
    assert len(load_all([str(paths[0]), str(paths[0].with_suffix(".txt"))])) == 2


@pytest.mark.parametrize("paths", [[], ["nowhere.json"]])
def test_table_of_what_cannot_be_read_is_one_line(paths, capsys):
    assert main(paths) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
