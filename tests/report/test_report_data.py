"""What the report shows, as numbers: against plain computations over everything at once."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aura_dist.report.comparison import comparisons, headline, reduction, short_name
from aura_dist.report.continuations import choose, side_by_side
from aura_dist.report.evaluations import (
    Estimate,
    Evaluation,
    estimate,
    labelled,
    modules_in_short,
    plain_first,
    read_evaluation,
)
from aura_dist.report.figures import caption, legend_below, lines
from aura_dist.report.pictures import FAINT, INK, SERIES, Picture, inline, new_figure, tidy
from aura_dist.report.rundir import named_apart, open_run
from aura_dist.report.scores import (
    EDGES,
    Bar,
    BestNeurons,
    by_module,
    expert_map,
    median_of,
    module_of,
    summarise,
)
from aura_dist.report.tables import effects_table, results_table, split_table, zero_shot_table
from aura_dist.sites.site import Site
from tests.results import write_results

BAR = Bar(0.7, 0.05)
SITE = Site("model.layers.2.mlp.up_proj", "mlp", 2, 4)


def test_site_is_summed_up():
    auroc = np.array([0.71, 0.70, 0.9, np.nan, 0.3])
    got = summarise(SITE, auroc, np.array([0.01, 0.0, 0.06, np.nan, 0.5]), BAR)
    assert (got.num_scored, got.num_experts, got.best) == (4, 1, 0.9)
    assert got.histogram.sum() == 4
    np.testing.assert_array_equal(got.histogram, np.histogram(auroc[[0, 1, 2, 4]], EDGES)[0])
    np.testing.assert_allclose(got.quantiles[2], np.median(auroc[[0, 1, 2, 4]]))
    assert summarise(SITE, auroc, None, BAR).num_experts == 2, "without q-values the AUROC alone decides"


def test_site_without_scores_is_no_error():
    got = summarise(SITE, np.full(4, np.nan), None, BAR)
    assert (got.num_scored, got.num_experts) == (0, 0)
    assert np.isnan([got.best, *got.quantiles]).all()
    assert np.isnan(median_of(got.histogram))


@given(st.lists(st.lists(st.sampled_from([0.2, 0.5, 0.75, np.nan]), max_size=6), max_size=6), st.integers(1, 8))
def test_best_neurons_are_those_of_all_sites_at_once(sites, k):
    best = BestNeurons(k)
    for i, values in enumerate(sites):
        best.see(i, np.array(values, dtype=np.float64))
    everything = [(v, i, u) for i, values in enumerate(sites) for u, v in enumerate(values) if not np.isnan(v)]
    assert best.found == sorted(everything, key=lambda n: (-n[0], n[1], n[2]))[:k]


@pytest.mark.parametrize(
    ("name", "layer", "expected"),
    [
        ("model.layers.3.mlp.up_proj", 3, "mlp.up_proj"),
        ("transformer.h.0.attn.c_attn", 0, "attn.c_attn"),
        ("transformer.blocks.11.ffn.up_proj", 11, "ffn.up_proj"),
        ("model.layers.3.mlp.down_proj:input", 3, "mlp.down_proj:input"),
        ("odd", 0, "odd"),
    ],
)
def test_module_is_the_name_within_the_layer(name, layer, expected):
    assert module_of(Site(name, "mlp", layer, 1)) == expected


def test_layer_itself_is_named_by_its_kind():
    assert module_of(Site("transformer.h.3", "residual", 3, 1)) == "residual"


def test_map_of_experts_leaves_out_what_a_layer_has_not():
    def site(layer, module):
        return summarise(Site(f"h.{layer}.{module}", "mlp", layer, 2), np.array([0.8, 0.1]), None, BAR)

    groups = by_module([site(4, "up"), site(0, "up"), site(4, "gate")])
    layers, counts_ML = expert_map(groups)
    assert (list(groups), layers) == (["up", "gate"], [0, 4])
    np.testing.assert_array_equal(counts_ML, [[1, 1], [np.nan, 1]])


@given(st.dictionaries(st.integers(0, 200), st.none() | st.floats(0, 1), max_size=60), st.integers(1, 20))
def test_chosen_prompts_hold_the_most_toxic(scores, num_shown):
    chosen = choose(scores, num_shown)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(scores)
    assert len(chosen) == min(num_shown, len(scores))
    left = [scores[i] or 0.0 for i in set(scores) - set(chosen)]
    worst = sorted((scores[i] or 0.0 for i in chosen), reverse=True)[: num_shown // 2]
    assert not left or not worst or min(worst) >= max(left)


@pytest.mark.parametrize("value", [None, "0.5", {}, {"value": None}, {"value": float("nan")}, True, [0.5]])
def test_no_number_is_no_estimate(value):
    assert estimate(value) is None


def test_estimates_with_and_without_intervals():
    assert estimate(0.5) == Estimate(0.5)
    assert estimate({"value": 1, "low": None, "high": 2}) == Estimate(1.0, None, 2.0)


@pytest.fixture
def evaluations(tmp_path):
    """Without intervention, cheap, strong but dear; and one on other prompts."""
    write_results(tmp_path, "aura", method="aura", strength=0.5, toxic=0.1, perplexity=21.0)
    write_results(tmp_path, "act", method="mean-act", toxic=0.01, perplexity=500.0)
    write_results(tmp_path, "damp", method="damp", toxic=0.15, perplexity=20.5)
    write_results(tmp_path, "other", method="aura", toxic=0.0, perplexity=20.0, prompts_sha256="f" * 64)
    write_results(tmp_path, "plain", toxic=0.2, perplexity=20.0)
    return plain_first([read_evaluation("run", path) for path in sorted((tmp_path / "results").glob("*.json"))])


def test_only_evaluations_on_the_same_prompts_are_compared(evaluations):
    found = comparisons(labelled(evaluations))
    assert [[e.name for e in c.evaluations] for c in found] == [["plain", "act", "aura", "damp"], ["other"]]
    assert [p.one.label for p in found[0].points] == ["plain", "aura", "damp"]
    assert [p.one.label for p in found[0].outside] == ["act"], "its perplexity would press the others together"


def test_bars_beside_a_plain_model_are_of_what_is_added(tmp_path):
    """Texts of 10 and 30 tokens, likelier by 0.1 and 0.2 a token without the intervention."""
    tokens, plain = np.array([10, 30]), np.array([20.0, 90.0])
    of = {"plain": plain, "aura": plain + tokens * [0.1, 0.2]}
    for name, likelihood in of.items():
        perplexity = float(np.exp(likelihood.sum() / tokens.sum()))
        path = write_results(tmp_path, name, method=None if name == "plain" else name, toxic=0.1, perplexity=perplexity)
        document = json.loads(path.read_text())
        document["perplexity"]["sha256"] = "0" * 64
        document["perplexity"]["per_text"] = {
            "num_tokens": tokens.tolist(), "negative_log_likelihood": likelihood.tolist(),
        }  # fmt: skip
        path.write_text(json.dumps(document))

    def points():
        found = [read_evaluation("run", path) for path in sorted((tmp_path / "results").glob("*.json"))]
        return {p.one.name: p.x for p in comparisons(plain_first(found))[0].points}

    plain, aura = points()["plain"], points()["aura"]
    assert plain == Estimate(plain.value)
    # the two resamples of one text twice
    ends = sorted(np.exp(v + d) - np.exp(v) for v, d in ((2.0, 0.1), (3.0, 0.2)))
    assert (aura.low, aura.high) == pytest.approx((plain.value + ends[0], plain.value + ends[1]))
    for broken in (None, {}, {"num_tokens": [10, 30]}, {"num_tokens": [10, 30], "negative_log_likelihood": [1.0]}):
        document["perplexity"]["per_text"] = broken
        path.write_text(json.dumps(document))
        assert points()["plain"].low is not None, "each has its own, because one cannot have the other"


SETTINGS = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9, "top_k": 0, "seed": 0}


@pytest.fixture
def evaluated(tmp_path):
    """`evaluated(name, settings, section=…)`: results of that name, with the settings and parts changed."""

    def write(name, settings=None, config=None, **sections):
        path = write_results(tmp_path, name, texts=["a", "b", "c", "d"])
        document = json.loads(path.read_text())
        document["config"] |= {"max_tokens": 128, **(config or {})}
        document["toxicity"] |= {"settings": SETTINGS | (settings or {})}
        for section, changed in sections.items():
            document[section] |= changed
        path.write_text(json.dumps(document))
        return read_evaluation("run", path)

    return write


@pytest.mark.parametrize(
    ("changed", "compared"),
    [
        ({"settings": {"seed": 1}}, True),
        ({"settings": {"max_new_tokens": 50}}, False),
        ({"settings": {"top_p": 1.0}}, False),
        ({"settings": {"temperature": 0.5}}, False),
        ({"settings": {"top_k": 40}}, False),
        ({"toxicity": {"num_samples": 25}}, False),
        ({"toxicity": {"scorer": "another"}}, False),
        ({"config": {"max_tokens": 512}}, False),
        ({"perplexity": {"column": "body"}}, False),
        ({"model": {"fingerprint": "1" * 64}}, False),
    ],
)
def test_only_what_was_measured_alike_is_compared(evaluated, changed, compared):
    both = [evaluated("a"), evaluated("b", **changed)]
    assert [len(c.evaluations) for c in comparisons(both)] == ([2] if compared else [1, 1])
    beside = compared or changed.keys() & {"config", "perplexity"}
    assert [len(s.evaluations) for s in side_by_side(both, 4, 4)] == ([2] if beside else [1, 1])


@pytest.mark.parametrize(("num_tokens", "compared"), [(900, True), (800, False)])
def test_texts_cut_at_the_same_tokens_are_the_same(evaluated, num_tokens, compared):
    """A limit beyond the longest text changes nothing."""
    one = evaluated("a", perplexity={"num_tokens": 900})
    other = evaluated("b", config={"max_tokens": 512}, perplexity={"num_tokens": num_tokens})
    assert len(comparisons([one, other])) == (1 if compared else 2)


def test_what_was_measured_stands_in_words(evaluated):
    both = [evaluated("a", perplexity={"texts": "/x/passages.csv", "num_texts": 1200}), evaluated("b", {"seed": 7})]
    assert comparisons(both)[0].measured == (
        "Toxicity: 4 prompts of prompts.jsonl, 2 continuations each of at most 20 tokens, temperature 1.0, "
        "nucleus (top-p) 0.9, seeds 0, 7, scored by synthetic. "
        "Perplexity: 1,200 texts of passages.csv, cut at 128 tokens."
    )


def test_tasks_with_other_examples_stand_on_lines_of_their_own(evaluated):
    few = evaluated("few", zero_shot={"task": {"acc": 0.7, "num_fewshot": 5, "num_examples": 100}})
    table = zero_shot_table([evaluated("zero"), few])
    assert table.header == ("task", "metric", "shots", "examples", "zero", "few")
    assert table.rows == (("task", "acc", "–", "100", "0.500 ± 0.050", "–"), ("task", "acc", "5", "100", "–", "0.700"))


def test_evaluations_of_tasks_alone_are_not_compared(evaluated):
    """Their table would name methods, and no figure."""
    path = evaluated("tasks").path
    document = json.loads(path.read_text())
    del document["toxicity"], document["perplexity"]
    path.write_text(json.dumps(document))
    tasks = read_evaluation("run", path)
    assert comparisons([tasks]) == []
    other = evaluated("other")
    assert [c.evaluations for c in comparisons([tasks, other])] == [(other,)]
    assert zero_shot_table([tasks]).rows


def test_what_was_measured_elsewhere_too_has_a_ring(evaluated):
    """As where points are chosen on some prompts and reported on others."""
    acts = [{"digest": digest, "method": "aura", "strength": 1.0} for digest in ("one", "two")]
    others = {"prompts_sha256": "others"}

    def made(name, act, **sections):
        one = evaluated(name, **sections)
        return replace(one, document={**one.document, "intervention": act})

    choosing = [made("plain", None), made("a", acts[0]), made("b", acts[1])]
    reported = [made("plain-2", None, toxicity=others), made("a-2", acts[0], toxicity=others)]
    first, second = comparisons([*choosing, *reported])
    assert {p.one.name: p.ringed for p in first.points} == {"plain": False, "a": True, "b": False}
    assert not any(p.ringed for p in second.points), "all of them are chosen"
    assert "A ring marks" in caption(first)
    assert "A ring marks" not in caption(second)
    stronger = replace(reported[1], document={**reported[1].document, "intervention": {**acts[0], "strength": 0.5}})
    assert not any(p.ringed for c in comparisons([*choosing, stronger]) for p in c.points)


def test_headline_is_the_best_that_costs_little(evaluations):
    compared = comparisons(labelled(evaluations))[0].evaluations
    text = headline(labelled(compared))
    assert text is not None
    assert text.startswith("aura: toxic continuations 20.0% → 10.0%, 2.0 times fewer; perplexity 20.00 → 21.00")
    dear = [e for e in compared if e.name in ("plain", "act")]
    assert "no evaluation lowers the 20.0%" in str(headline(labelled(dear)))
    assert headline(dear[:1]) is None


def test_further_scorers_have_columns_of_their_own(evaluations):
    def judged(one, share):
        prompts = {"toxic_share": [share, share], "maximum": [share, share]}
        found = {"overall": {"probability": {"value": share, "low": 0.0, "high": 1.0}}, "per_prompt": prompts}
        toxicity = {**one.toxicity, "judges": {"strict": found}}
        return replace(one, document={**one.document, "toxicity": toxicity})

    shares = {"plain": 0.5, "aura": 0.25}
    chosen = [judged(e, shares[e.name]) if e.name in shares else e for e in evaluations]
    table = results_table(labelled(chosen))
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["aura"]["toxic (%) by strict"] == "25.0 [0.0, 100.0]"
    assert rows["aura"]["times fewer by strict"] == "2.00 [2.00, 2.00]"
    assert rows["plain"]["times fewer by strict"] == "–"
    assert rows["act"]["toxic (%) by strict"] == "–"
    assert rows["aura"]["toxic (%)"] != rows["aura"]["toxic (%) by strict"]


def test_side_effects_have_a_table_of_their_own(evaluations):
    assert not effects_table(labelled(evaluations)).rows, "none was measured"
    form = {name: {"value": v, "low": v / 2, "high": 2 * v} for name, v in (("num_tokens", 20.0), ("repetition", 0.02))}
    effects = {
        "divergence": {"mean": 0.03, "mean_low": 0.02, "mean_high": 0.05, "percentile_99": 0.4},
        "gates": {"open_tokens": 0.012, "open_texts": 0.25},
        "continuations": {side: {"token_weighted": p} for side, p in (("plain", 18.0), ("intervened", 26.0))},
    }

    def measured(one):
        toxicity = {
            **one.toxicity,
            "form": form,
            "judges": {"strict": {"agreement": 0.987, "both_toxic": {"value": 0.02, "low": 0.01, "high": 0.03}}},
        }
        return replace(one, document={**one.document, "toxicity": toxicity, "side_effects": effects})

    table = effects_table(labelled([measured(e) if e.name == "aura" else e for e in evaluations]))
    rows = {row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}
    assert rows["aura"] == {
        "KL divergence": "0.030 [0.020, 0.050]", "its 99th percentile": "0.40",
        "tokens with an open gate (%)": "1.2", "texts with an open gate (%)": "25",
        "perplexity of non-toxic continuations": "26.00", "plain": "18.00", "tokens": "20.0 [10.0, 40.0]",
        "repetition (%)": "2.0 [1.0, 4.0]", "agrees with strict (%)": "98.7",
        "toxic to strict too (%)": "2.0 [1.0, 3.0]",
    }  # fmt: skip
    assert set(rows["plain"].values()) == {"–"}


def test_results_stand_in_their_columns(evaluations):
    table = results_table(labelled(evaluations))
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["aura"]["perplexity"] == "21.00 [18.90, 23.10]"
    assert rows["aura"]["change"] == "+1.00"
    assert rows["aura"]["strength"] == "0.5"
    assert rows["plain"]["toxic (%)"] == "20.0 [18.0, 22.0]"
    assert "pre-prompt" not in table.header, "no evaluation has one"
    split = split_table(labelled(evaluations))
    assert "toxic prompts: toxic (%)" in split.header
    assert not any(name.startswith("other prompts") for name in split.header), "the fixture has none"
    assert zero_shot_table(labelled(evaluations)).rows[0][:5] == (
        "task",
        "acc",
        "–",
        "100",
        "0.500 ± 0.050",
    )


def test_strengths_as_fitted_and_as_applied_multiply(tmp_path):
    path = write_results(tmp_path, "a", method="aura", strength=0.5)
    path.write_text(path.read_text().replace('"top_k": null, "strength": 1.0', '"top_k": 7, "strength": 0.5'))
    one = read_evaluation("run", path)
    assert (one.strength, one.top_k) == (0.25, 7)


NORMS = ["*.post_attention_layernorm", "*.post_feedforward_layernorm"]


@pytest.fixture
def swept(tmp_path):
    """`swept(name, method, strength, modules=…, top_k=…)`: results as a sweep names them."""

    def write(name, method=None, strength=1.0, *, modules=None, top_k=None, max_q=None, preprompt=None):
        path = write_results(tmp_path, f"m-{name}", method=method, strength=strength, preprompt=preprompt)
        document = json.loads(path.read_text())
        if method:
            document["intervention"]["parameters"] |= {"modules": modules, "top_k": top_k, "max_q": max_q}
        path.write_text(json.dumps(document))
        return read_evaluation("run", path)

    return write


@pytest.fixture
def front(swept):
    """Two strengths of one method over two sets of modules, and what stands beside them, in a sweep's order."""
    return plain_first(
        [
            swept("act-0123456789", "mean-act", 1.0, modules=["mlp"]),
            swept("act-s0.5-0123456780", "mean-act", 0.5, modules=NORMS),
            swept("act-s0.5-0123456781", "mean-act", 0.5, modules=["mlp"]),
            swept("act-0123456782", "mean-act", 1.0, modules=NORMS),
            swept("det0-0123456783", "det0", 1.0, modules=["mlp"], top_k=500),
            swept("plain-0123456784"),
        ]
    )


def test_a_sweeps_evaluations_are_named_by_what_they_differ_in(front, swept):
    assert [e.label for e in labelled(front)] == [
        "no intervention", "mean-act 0.5, mlp", "mean-act, mlp", "mean-act 0.5, norms", "mean-act, norms", "det0, mlp",
    ]  # fmt: skip
    selected = swept("act-s0.5-0123456787", "mean-act", 0.5, modules=["mlp"], max_q=1e-6)
    assert labelled([*front, selected])[-1].label == "mean-act 0.5, q ≤ 1e-06, mlp"
    again = swept("plain-0123456785")
    assert labelled([*front, again])[0].label == "m-plain-0123456784", "two of one name keep the files' names"
    kind = swept("plain-pre-0123456786", preprompt="Be kind.")
    assert [e.label for e in labelled([front[0], kind])] == ["no intervention", "no intervention, pre-prompt"]


def test_modules_are_short_as_long_as_they_stay_apart(swept):
    ones = [swept(f"a-{i}", "aura", modules=m) for i, m in enumerate((NORMS, ["mlp"], ["*.a_norm", "*.b_norm"], None))]
    assert list(modules_in_short(ones[:2]).values()) == ["norms", "mlp"]
    assert list(modules_in_short(ones[1:]).values()) == ["mlp", "norms", "all modules"]
    assert list(modules_in_short(ones).values()) == [
        "post_attention_layernorm + post_feedforward_layernorm", "mlp", "a_norm + b_norm", "all modules",
    ]  # fmt: skip


def test_lines_join_the_strengths_of_one_method_over_the_same_modules(front):
    found = lines(comparisons(labelled(front))[0].points)
    assert [(line.name, line.marks, line.joined) for line in found] == [
        ("no intervention", ("no intervention",), False),
        ("mean-act, mlp", ("0.5", "1"), True),
        ("mean-act, norms", ("0.5", "1"), True),
        ("det0, mlp", ("det0, mlp",), False),
    ]
    assert [p.one.strength for p in found[1].points] == [0.5, 1.0]


def test_units_of_a_low_q_value_are_no_part_of_the_line_of_all(front, swept):
    selected = swept("act-s0.5-0123456787", "mean-act", 0.5, modules=["mlp"], max_q=1e-6)
    found = lines(comparisons(labelled([*front, selected]))[0].points)
    assert ("mean-act, mlp", ("0.5", "1"), True) in [(line.name, line.marks, line.joined) for line in found]
    assert "mean-act, mlp, q ≤ 1e-06" in [line.name for line in found]


def test_a_line_says_how_it_was_fitted_where_no_other_of_its_method_was(front, swept):
    selected = swept("linear-0123456787", "linear-act", 0.5, modules=["mlp"], max_q=1e-6)
    names = [line.name for line in lines(comparisons(labelled([*front, selected]))[0].points)]
    assert "linear-act, mlp, q ≤ 1e-06" in names
    assert "det0, mlp" in names


@pytest.mark.parametrize("length", [5, 70, 110])
def test_a_legend_is_no_wider_than_its_figure(length):
    figure, ax = new_figure(760, 540)
    handles = [ax.plot([0], [0], label=f"{i} {'x' * length}")[0] for i in range(12)]
    legend_below(figure, handles)
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= figure.bbox.x0
    assert box.x1 <= figure.bbox.x1
    assert ax.bbox.y0 > box.y1, "below the axes"


def test_caption_tells_of_the_lines_that_are_drawn(front):
    (compared,) = comparisons(labelled(front))
    assert "the number at a marker is the strength" in caption(compared)
    assert "Grey lines mark the model without intervention." in caption(compared)
    assert "hollow" not in caption(compared)


def test_caption_tells_of_what_is_not_drawn(evaluations):
    text = caption(comparisons(labelled(evaluations))[0])
    assert "Lines join" not in text
    assert text.endswith("Outside the plot: act (perplexity 500, 1.0% toxic).")


def test_lines_join_numbers_of_neurons(swept):
    ones = [swept(f"d-{k}", "damp", top_k=k) for k in (1000, 10, 100)]
    (line,) = lines(comparisons(labelled(ones))[0].points)
    assert (line.marks, line.joined) == (("k 10", "k 100", "k 1,000"), True)
    more = [*ones, swept("d-half", "damp", 0.5, top_k=10)]
    found = lines(comparisons(labelled(more))[0].points)
    assert [(one.name, one.marks, one.joined) for one in found] == [
        ("damp, top 1,000", ("m-d-1000",), False),
        ("damp, top 10", ("0.5", "1"), True),
        ("damp, top 100", ("m-d-100",), False),
    ]


def with_prompts(evaluation, shares):
    document = json.loads(evaluation.path.read_text())
    document["toxicity"]["per_prompt"] = {"toxic_share": shares, "maximum": shares}
    document["toxicity"]["overall"]["probability"]["value"] = float(np.mean(shares))
    evaluation.path.write_text(json.dumps(document))
    return read_evaluation("run", evaluation.path)


def test_ratio_is_paired_over_prompts_without_a_baseline_too(swept):
    plain = with_prompts(swept("plain"), [1.0, 0.5, 0.5, 0.0] * 10)
    half = with_prompts(swept("half", "aura"), [0.5, 0.25, 0.25, 0.0] * 10)
    assert reduction(half, plain) == Estimate(2.0, 2.0, 2.0)
    assert reduction(plain, plain) is None
    none_left = with_prompts(swept("zero", "det0"), [0.0] * 40)
    assert "∞ [4.40, ∞]" in results_table([plain, none_left]).rows[1]
    assert reduction(swept("other", "damp"), plain) is None, "no figures of its prompts"
    text = headline([plain, half])
    assert text is not None
    assert "50.0% → 25.0%, 2.0 times fewer [2.0, 2.0]" in text


def test_headline_claims_nothing_that_may_be_chance(swept):
    plain = with_prompts(swept("plain"), [1.0, 0.0, 0.0, 0.0] * 5)
    mixed = with_prompts(swept("mixed", "damp"), [0.0, 1.0, 0.0, 0.0] * 4 + [0.0] * 4)
    assert str(headline([plain, mixed])).startswith(
        "no evaluation lowers the 25.0% of toxic continuations by more than chance at no more than 10%"
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [("google/gemma-3-270m", "google/gemma-3-270m"), ("/models/gemma", "gemma"), ("gpt2", "gpt2"), ("./a/b", "b")],
)
def test_directories_are_named_by_their_last_part(model, expected):
    assert short_name(model) == expected


def test_a_run_that_is_named_twice_is_one(tmp_path):
    for name in ("a/run", "b/run", "c/other"):
        (tmp_path / name / "results").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "run")
    named = ["a/run", "a/run/", "b/../a/run", "link", "b/run", "c/other"]
    runs = named_apart([open_run(str(tmp_path / name)) for name in named])
    assert [run.name for run in runs] == ["a/run", "b/run", "c/other"]
    assert [run.name for run in named_apart([open_run(str(tmp_path / name)) for name in named[:4]])] == ["run"]


def test_drawing_takes_the_theme_of_the_page():
    raw = (
        '<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "x">\n<svg width="72pt" height="72pt" viewBox="0 0 72 72">'
        "<metadata><a>program</a></metadata><defs><style>*{stroke: red}</style></defs>"
        f'<path id="m1" style="stroke: {SERIES[0]}; fill: {INK}"/><use xlink:href="#m1" style="stroke: {FAINT}"/>'
        '<g clip-path="url(#p1)">'
        "<text style=\"font-size: 11px; font-family: 'DejaVu Sans', sans-serif\">a</text></g></svg>"
    )
    tidied = tidy(raw)
    assert "program" not in tidied
    assert "DejaVu" not in tidied
    svg = inline(Picture("one", 'what "it" shows', tidied, b"", 100))
    assert svg.startswith('<svg role="img" aria-label="what &quot;it&quot; shows"')
    assert "stroke: var(--series-1); fill: currentColor" in svg
    assert "var(--faint)" in svg
    for gone in ("<?xml", "<style", "font-family", "72pt", *SERIES, INK):
        assert gone not in svg
    assert 'id="one-m1"' in svg
    assert 'href="#one-m1"' in svg
    assert "url(#one-p1)" in svg


def test_a_label_says_what_a_gate_was_fitted_on():
    made = {"gate": {"kind": "tokens", "control": {}}, "parameters": {"gate_pooling": "drawn", "gate_sharpness": 4.0}}
    one = Evaluation("run", "a", Path("a.json"), "a", {"intervention": made})
    assert one.variant == "gate of tokens fitted on drawn values, sharpness 4"
    del made["parameters"]["gate_pooling"]
    made["gate"]["control"] = {"store": "c.zarr"}
    assert one.variant == "gate of tokens with controls, sharpness 4"
