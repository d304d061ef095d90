"""From AUROC to scales: the formulas, exactly k units, and what never happens by accident."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from aura_dist.errors import ConfigError, InputError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.methods import (
    METHODS,
    aura_scale,
    compose,
    find_method,
    fit_maps,
    needed_statistics,
    settle_options,
    top_units,
    with_strength,
)
from aura_dist.scoring.columns import auroc

NAN = float("nan")


def maps(method, statistics, **given):
    """What `fit` makes of statistics with these options."""
    return fit_maps(METHODS[method], statistics, settle_options(method, given))


def test_aura_formula():
    scale = aura_scale(np.array([0.0, 0.3, 0.5, np.nextafter(0.5, 1), 0.75, 0.9, 1.0, NAN]))
    assert scale.dtype == np.float32
    np.testing.assert_allclose(scale, [1, 1, 1, 1, 0.5, 0.2, 0, 1], atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_aura_of_random_responses_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    labels = rng.random(300) < 0.3
    values = (rng.normal(size=(300, 40)) + 0.7 * labels[:, None] * rng.normal(size=40)).round(1).astype(np.float32)
    expected = [1 - 2 * (max(roc_auc_score(labels, column), 0.5) - 0.5) for column in values.T]
    scale = maps("aura", {"auroc": {"site": auroc(values, labels)}})[0]["site"]
    np.testing.assert_allclose(scale, expected, rtol=0, atol=1e-7)
    assert 0 < np.count_nonzero(scale < 1) < 40


def test_det0_and_damp_change_the_experts_only():
    scores = {"a": np.array([0.9, 0.4]), "b": np.array([0.5, NAN, 0.6])}
    det0, damp = maps("det0", {"auroc": scores})[0], maps("damp", {"auroc": scores}, alpha=0.3)[0]
    assert {s: v.tolist() for s, v in det0.items()} == {"a": [0, 1], "b": [1, 1, 0]}
    np.testing.assert_allclose(damp["a"], [0.3, 1], rtol=1e-7)
    np.testing.assert_allclose(damp["b"], [1, 1, 0.3], rtol=1e-7)
    assert {v.dtype for v in [*det0.values(), *damp.values()]} == {np.dtype(np.float32)}
    assert damp["a"][0] == maps("damp", {"auroc": scores}, top_k=1, alpha=0.3)[0]["a"][0]
    assert maps("damp", {"auroc": scores}, top_k=1, alpha=0.3)[0]["b"].tolist() == [1, 1, 1]


def test_ties_go_to_the_earlier_site_then_unit():
    scores = {"z": np.array([0.7, 0.9, 0.8]), "a": np.array([0.8, 0.9, 0.8])}
    chosen = {k: [(s, int(u)) for s, v in top_units(scores, k).items() for u in np.flatnonzero(v)] for k in range(1, 6)}
    assert chosen[1] == [("z", 1)]
    assert chosen[2] == [("z", 1), ("a", 1)]
    assert chosen[3] == [("z", 1), ("z", 2), ("a", 1)]
    assert chosen[4] == [("z", 1), ("z", 2), ("a", 0), ("a", 1)]
    assert chosen[5] == [("z", 1), ("z", 2), ("a", 0), ("a", 1), ("a", 2)]


@settings(deadline=None)
@given(st.data())
def test_top_k_is_exactly_k_and_never_nan(data):
    levels = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, NAN])
    scores = {s: np.array(data.draw(st.lists(levels, min_size=1, max_size=8))) for s in ("b", "a", "c")}
    units = [(-v, index, unit) for index, s in enumerate(scores) for unit, v in enumerate(scores[s]) if not np.isnan(v)]
    k = data.draw(st.integers(0, len(units)))
    chosen = top_units(scores, k)
    assert [len(v) for v in chosen.values()] == [len(v) for v in scores.values()]
    got = {(index, int(unit)) for index, s in enumerate(scores) for unit in np.flatnonzero(chosen[s])}
    assert got == {(index, unit) for _, index, unit in sorted(units)[:k]}


def test_more_than_there_are_is_an_error():
    with pytest.raises(InputError, match="at most 2, the number of neurons to choose from, got 3"):
        top_units({"a": np.array([0.1, NAN, 0.2])}, 3)


def test_top_k_under_aura_leaves_units_below_a_half_alone():
    assert maps("aura", {"auroc": {"a": np.array([0.75, 0.25])}}, top_k=2)[0]["a"].tolist() == [0.5, 1]


def statistics(seed=0, sites=("b", "a")):
    """Random statistics of two sites, one unit of each without a score."""
    rng = np.random.default_rng(seed)
    names = ("auroc", "q_value", "mean_positive", "mean_negative", "linear_act_scale", "linear_act_shift")
    return {n: {s: np.append(rng.random(5 + i), NAN) for i, s in enumerate(sites)} for n in names}


def test_mean_act_moves_the_mean_of_one_class_to_the_others():
    found = statistics()
    scales, shifts = maps("mean-act", found)
    for site in ("b", "a"):
        assert (scales[site] == 1).all()
        moved = (found["mean_positive"][site] + shifts[site])[:-1]
        np.testing.assert_allclose(moved, found["mean_negative"][site][:-1], rtol=1e-6)
        assert shifts[site][-1] == 0, "a unit without a score is left alone"
        assert shifts[site].dtype == scales[site].dtype == np.float32


def test_linear_act_is_the_stored_map():
    found = statistics()
    scales, shifts = maps("linear-act", found)
    for site in ("b", "a"):
        np.testing.assert_array_equal(scales[site][:-1], found["linear_act_scale"][site][:-1].astype(np.float32))
        np.testing.assert_array_equal(shifts[site][:-1], found["linear_act_shift"][site][:-1].astype(np.float32))
        assert (scales[site][-1], shifts[site][-1]) == (1, 0)


def test_a_map_that_is_not_finite_is_left_out():
    found = statistics()
    found["linear_act_scale"]["a"][0] = np.inf
    found["linear_act_shift"]["a"][1] = NAN
    found["linear_act_scale"]["a"][2] = 1e39  # more than float32 holds
    scales, shifts = maps("linear-act", found)
    assert scales["a"][:3].tolist() == [1, 1, 1]
    assert shifts["a"][:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", ["damp", "det0", "mean-act", "linear-act", "pid-act"])
def test_top_k_is_exactly_k_under_every_method(method):
    scales, shifts = maps(method, statistics(), top_k=4)
    assert Intervention(scales, shifts).num_changed == 4
    auroc = np.concatenate([v[:-1] for v in statistics()["auroc"].values()])
    changed = np.concatenate([(scales[s] != 1) | (shifts.get(s, 0) != 0) for s in ("b", "a")])
    scores = np.concatenate(list(statistics()["auroc"].values()))
    assert sorted(scores[changed]) == sorted(auroc)[-4:]


@pytest.mark.parametrize("method", ["aura", "damp", "det0", "mean-act", "linear-act", "pid-act"])
def test_only_units_below_a_q_value(method):
    found = statistics()
    found["q_value"]["b"][0], found["q_value"]["b"][1] = 0.4, np.nextafter(0.4, 1)
    found["auroc"]["b"][:2] = 0.9
    scales, shifts = maps(method, found, max_q=0.4)
    for site in ("b", "a"):
        changed = (scales[site] != 1) | (shifts.get(site, np.zeros(1)) != 0)
        assert not changed[~(found["q_value"][site] <= 0.4)].any()
    assert scales["b"][0] != 1 or shifts["b"][0] != 0, "the level itself counts"
    few = sum(int((v <= 0.4).sum()) for v in found["q_value"].values())
    with pytest.raises(InputError, match=f"at most {few}, the number"):
        maps(method, found, max_q=0.4, top_k=few + 1)


def test_statistics_that_a_fit_needs():
    assert needed_statistics(METHODS["aura"], {"top_k": 3, "max_q": None}) == ("auroc",)
    assert needed_statistics(METHODS["mean-act"], {"top_k": None}) == ("mean_positive", "mean_negative")
    assert needed_statistics(METHODS["linear-act"], {"top_k": 3, "max_q": 0.1}) == (
        "linear_act_scale", "linear_act_shift", "auroc", "q_value",
    )  # fmt: skip
    with pytest.raises(
        InputError, match="expected one of aura, damp, det0, mean-act, linear-act, pid-act, lineas, got 'magic'"
    ):
        find_method("magic")


def test_options_are_settled_and_those_of_other_methods_refused():
    assert settle_options("damp", {}) == {"pooling": "max", "top_k": None, "alpha": 0.5, "max_q": None}
    assert settle_options("mean-act", {"pooling": None, "top_k": 3, "alpha": None}) == {
        "pooling": "mean", "top_k": 3, "max_q": None,
    }  # fmt: skip
    message = "--alpha: expected it with --method damp alone, got it with aura; leave it out"
    with pytest.raises(ConfigError, match=message):
        settle_options("aura", {"alpha": 0.5})


def test_strength_interpolates_and_extrapolates():
    scale, shift = np.array([0, 0.5, 1], np.float32), np.array([1, -2, 0], np.float32)
    for s in (0.0, 0.25, 1.0, 2.0):
        scaled, shifted = with_strength(scale, shift, s)
        np.testing.assert_allclose(scaled, 1 + s * (scale - 1), atol=1e-7)
        np.testing.assert_allclose(shifted, s * shift, atol=1e-7)
        assert scaled.dtype == shifted.dtype == np.float32
    rng = np.random.default_rng(0)
    odd = rng.random(1000).astype(np.float32)
    assert (with_strength(odd, odd, 0)[0] == 1).all()
    assert not with_strength(odd, odd, 0)[1].any()
    assert np.array_equal(with_strength(odd, None, 1.0)[0], odd)


@pytest.mark.parametrize("strength", [-0.5, NAN, float("inf")])
def test_senseless_strength_is_refused(strength):
    with pytest.raises(InputError, match="--strength"):
        with_strength(np.ones(2, np.float32), None, strength)


@pytest.mark.parametrize("outer_shifts", [False, True])
@pytest.mark.parametrize("inner_shifts", [False, True])
def test_compose_is_one_map_after_the_other(outer_shifts, inner_shifts):
    rng = np.random.default_rng(1)
    outer, inner = (
        (rng.normal(size=6).astype(np.float32), rng.normal(size=6).astype(np.float32) if shifts else None)
        for shifts in (outer_shifts, inner_shifts)
    )
    z = rng.normal(size=6)
    scale, shift = compose(outer, inner)
    once = scale * z + (0 if shift is None else shift)
    for one_scale, one_shift in (inner, outer):
        z = one_scale * z + (0 if one_shift is None else one_shift)
    np.testing.assert_allclose(once, z, rtol=1e-5, atol=1e-6)
    assert (shift is None) == (not outer_shifts and not inner_shifts)


def test_changed_neurons_are_counted_once():
    scales = {"a": np.array([1, 0.5, 0], np.float32), "b": np.ones(2, np.float32)}
    shifts = {"a": np.array([0, 1, 0], np.float32), "c": np.array([3, 0], np.float32)}
    assert Intervention(scales, shifts).num_changed == 3


def test_strength_zero_is_the_identity_whatever_the_map():
    scale, shift = with_strength(np.array([np.nan, np.inf, 0.5], np.float32), np.array([1, np.nan, 2], np.float32), 0.0)
    assert scale.tolist() == [1, 1, 1]
    assert shift is not None
    assert shift.tolist() == [0, 0, 0]
