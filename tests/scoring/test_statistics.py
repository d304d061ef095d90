"""Every statistic against its reference, and the compiled sums against the plain ones."""

from __future__ import annotations

import warnings
from dataclasses import fields
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, mannwhitneyu
from sklearn.metrics import average_precision_score, roc_auc_score

from aura_dist.errors import InputError
from aura_dist.scoring import column_sums, kernels
from aura_dist.scoring.column_sums import ColumnSums, sums_fast, sums_plain
from aura_dist.scoring.columns import statistics_by_concept
from aura_dist.scoring.statistics import STATISTICS, benjamini_hochberg
from tests.scoring.test_auroc import KINDS, make_values

Array = NDArray[Any]
NAMES = [name for name, statistic in STATISTICS.items() if statistic.of]


@st.composite
def cases(draw: st.DrawFn, *, infinities: bool = True) -> tuple[Array, NDArray[np.int8]]:
    """Values [N, M] of float16, 32 or 64 and labels [C, N], some missing, classes from even to one row."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_rows, num_columns, num_concepts = draw(st.integers(2, 120)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from([k for k in KINDS if k != "bits"]))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    values = make_values(rng, kind, (num_rows, num_columns)).astype(dtype)
    if infinities and draw(st.booleans()):
        values[rng.random(values.shape) < 0.05] = np.inf
        values[rng.random(values.shape) < 0.05] = -np.inf
    share = draw(st.sampled_from([0.02, 0.2, 0.5, 0.9]))
    labels_CN = (rng.random((num_concepts, num_rows)) < share).astype(np.int8)
    labels_CN[rng.random(labels_CN.shape) < draw(st.sampled_from([0.0, 0.3]))] = -1
    for labels in labels_CN:
        labels[rng.permutation(num_rows)[:2]] = [0, 1]
    return values, labels_CN


def by_column(values: Array, labels_CN: Array) -> Any:
    """(concept, column, positives, negatives, labelled values, their labels) of every concept and column."""
    for c, labels in enumerate(labels_CN):
        kept = labels >= 0
        for m, column in enumerate(values.T):
            yield c, m, column[labels == 1], column[labels == 0], column[kept], labels[kept]


def ranks(values: Array) -> Array:
    """In place of the values where only order counts: scikit-learn refuses infinities."""
    return np.unique(values, return_inverse=True)[1]


def close(ours: float, theirs: float, tolerance: float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=150)
@given(cases())
def test_auroc_and_average_precision_equal_sklearn(case: tuple[Array, Array]) -> None:
    made = statistics_by_concept(*case, ["auroc", "average_precision"])
    for c, m, _, _, values, labels in by_column(*case):
        close(made["auroc"][c, m], roc_auc_score(labels, ranks(values)), 1e-12)
        close(made["average_precision"][c, m], average_precision_score(labels, ranks(values)), 1e-12)


def brute_force_delong(positives: Array, negatives: Array) -> float:
    """Every positive against every negative (DeLong et al. 1988, equations 4 and 5), in fractions."""
    if min(len(positives), len(negatives)) < 2:
        return float("nan")
    wins = [[Fraction(2 * bool(p > q) + bool(p == q), 2) for q in negatives] for p in positives]

    def variance(parts: list[Fraction]) -> Fraction:
        mean = sum(parts) / len(parts)
        return sum((part - mean) ** 2 for part in parts) / (len(parts) - 1) / len(parts)

    by_positive = [sum(row) / len(negatives) for row in wins]
    by_negative = [sum(row[j] for row in wins) / len(positives) for j in range(len(negatives))]
    return float(variance(by_positive) + variance(by_negative)) ** 0.5


@settings(deadline=None, max_examples=40)
@given(cases())
def test_standard_error_equals_brute_force_delong(case: tuple[Array, Array]) -> None:
    made = statistics_by_concept(*case, ["auroc_se"])["auroc_se"]
    for c, m, positives, negatives, _, _ in by_column(*case):
        close(made[c, m], brute_force_delong(positives, negatives), 1e-10)


@settings(deadline=None, max_examples=150)
@given(cases())
def test_p_value_equals_scipy(case: tuple[Array, Array]) -> None:
    made = statistics_by_concept(*case, ["p_value"])["p_value"]
    for c, m, positives, negatives, values, _ in by_column(*case):
        if len(np.unique(values)) == 1:
            assert made[c, m] == 1
            continue
        p, n = len(positives), len(negatives)
        codes = np.unique(np.concatenate([positives, negatives]), return_inverse=True)[1]
        theirs = mannwhitneyu(codes[:p], codes[p:], method="asymptotic", use_continuity=False).pvalue
        assert p + n == len(codes)
        close(made[c, m], theirs, 1e-10)


def test_p_value_far_in_the_tail_is_relatively_accurate() -> None:
    values = np.arange(4000, dtype=np.float32)[:, None]
    labels = (np.arange(4000) >= 2500).astype(np.int8)
    ours = statistics_by_concept(values, labels[None], ["p_value"])["p_value"][0, 0]
    theirs = mannwhitneyu(values[labels == 1, 0], values[labels == 0, 0], method="asymptotic", use_continuity=False)
    np.testing.assert_allclose(ours, theirs.pvalue, rtol=1e-9, atol=0)
    assert 0 < ours < 1e-300 or theirs.pvalue == 0


@settings(deadline=None, max_examples=100)
@given(cases(infinities=False))
def test_class_moments_and_extremes_equal_numpy(case: tuple[Array, Array]) -> None:
    made = statistics_by_concept(*case, NAMES)
    for c, m, positives, negatives, values, _ in by_column(*case):
        for name, part in (("positive", positives), ("negative", negatives)):
            part = part.astype(np.float64)
            scale = max(1.0, float(np.abs(part).max()))
            close(made[f"mean_{name}"][c, m] / scale, part.mean() / scale, 1e-12)
            close(made[f"std_{name}"][c, m] / scale, part.std() / scale, 1e-12)
            assert made[f"min_{name}"][c, m] == part.min()
            assert made[f"max_{name}"][c, m] == part.max()
        assert made["num_distinct"][c, m] == len(np.unique(values))
    assert made["num_distinct"].dtype == np.int64


def quadratic_coupling(positives: Array, negatives: Array) -> tuple[float, float]:
    """Scale and shift from the P × Q matrix of the monotone coupling's masses, in fractions."""
    num_p, num_q = len(positives), len(negatives)
    x, y = ([Fraction(float(v)) for v in np.sort(part)] for part in (positives, negatives))
    mean_x, mean_y = sum(x) / num_p, sum(y) / num_q
    cross = Fraction(0)
    for i in range(num_p):
        for j in range(num_q):
            overlap = min(Fraction(i + 1, num_p), Fraction(j + 1, num_q)) - max(Fraction(i, num_p), Fraction(j, num_q))
            cross += max(overlap, Fraction(0)) * (x[i] - mean_x) * (y[j] - mean_y)
    variance = sum((v - mean_x) ** 2 for v in x) / num_p
    scale = cross / variance if variance else Fraction(1)
    return float(scale), float(mean_y - scale * mean_x)


@settings(deadline=None, max_examples=30)
@given(cases(infinities=False))
def test_linear_act_equals_quadratic_coupling(case: tuple[Array, Array]) -> None:
    values, labels_CN = case[0][:40], case[1][:, :40]
    labels_CN[:, :2] = [0, 1]
    made = statistics_by_concept(values, labels_CN, ["linear_act_scale", "linear_act_shift"])
    for c, m, positives, negatives, _, _ in by_column(values, labels_CN):
        scale, shift = quadratic_coupling(positives, negatives)
        spread = max(1.0, abs(scale), float(np.abs(positives).max(initial=0)) * abs(scale))
        close(made["linear_act_scale"][c, m] / spread, scale / spread, 1e-9)
        close(made["linear_act_shift"][c, m] / spread, shift / spread, 1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_linear_act_of_equal_classes_is_the_regression_of_sorted_pairs(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((400, 5)).astype(dtype)
    labels = (np.arange(400) % 2).astype(np.int8)
    made = statistics_by_concept(values, labels[None], ["linear_act_scale", "linear_act_shift"])
    for m, column in enumerate(values.T.astype(np.float64)):
        slope, intercept = np.polyfit(np.sort(column[labels == 1]), np.sort(column[labels == 0]), 1)
        close(made["linear_act_scale"][0, m], slope, 1e-10)
        close(made["linear_act_shift"][0, m], intercept, 1e-10)


def test_linear_act_of_an_affine_copy_is_its_inverse() -> None:
    y = np.random.default_rng(1).standard_normal(64)
    values = np.concatenate([2 * y + 3, y])[:, None]
    labels = np.repeat(np.array([[1, 0]], np.int8), 64, axis=1)
    made = statistics_by_concept(values, labels, ["linear_act_scale", "linear_act_shift"])
    close(made["linear_act_scale"][0, 0], 0.5, 1e-12)
    close(made["linear_act_shift"][0, 0], -1.5, 1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_constant_positives_are_moved_by_the_mean_alone(dtype: Any) -> None:
    values = np.array([[0.1], [0.1], [0.1], [2], [4]], dtype)
    made = statistics_by_concept(values, np.array([[1, 1, 1, 0, 0]], np.int8), NAMES)
    assert made["linear_act_scale"][0, 0] == 1
    close(made["linear_act_shift"][0, 0], 3 - float(dtype(0.1)), 1e-15)
    assert made["std_positive"][0, 0] == 0


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.5, 1.0])), min_size=1, max_size=200))
def test_q_values_equal_scipy(p: list[float]) -> None:
    np.testing.assert_allclose(benjamini_hochberg(np.array(p)), false_discovery_control(p), rtol=1e-13, atol=0)


def test_q_values_leave_nan_out() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03, np.nan])
    q = benjamini_hochberg(p)
    assert np.isnan(q[[1, 4]]).all()
    np.testing.assert_allclose(q[[0, 2, 3]], false_discovery_control([0.01, 0.04, 0.03]))


def equal_sums(a: ColumnSums, b: ColumnSums) -> None:
    np.testing.assert_array_equal(a.num_nan, b.num_nan)
    valid = a.num_nan == 0
    for f in fields(ColumnSums):
        mine, other = (np.broadcast_to(getattr(s, f.name), valid.shape)[valid] for s in (a, b))
        if mine.dtype.kind == "i":
            np.testing.assert_array_equal(mine, other, err_msg=f.name)
        else:
            with np.errstate(all="ignore"):
                scale = np.maximum(1, np.abs(a.max_positive) + np.abs(a.min_positive))[valid] ** 2
                scale = np.maximum(scale, (np.maximum(np.abs(a.max_negative), np.abs(a.min_negative)) ** 2)[valid])
            scale = np.where(np.isfinite(mine) & np.isfinite(scale), scale, 1)
            np.testing.assert_allclose(mine / scale, other / scale, rtol=1e-11, atol=1e-11, err_msg=f.name)


@settings(deadline=None, max_examples=150)
@given(cases(), st.integers(0, 2**32))
def test_fast_sums_equal_plain_sums(case: tuple[Array, Array], seed: int) -> None:
    values, labels_CN = case
    values = np.where(np.random.default_rng(seed).random(values.shape) < 0.005, np.nan, values).astype(values.dtype)
    if values.dtype != np.float64:
        equal_sums(sums_fast(values, labels_CN), sums_plain(values, labels_CN))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bits"])
@pytest.mark.parametrize("num_concepts", [1, 6])
def test_fast_sums_equal_plain_sums_in_large_columns(kind: str, num_concepts: int) -> None:
    rng = np.random.default_rng(num_concepts)
    values = make_values(rng, kind, (3000, 3))
    labels_CN = rng.choice(np.array([-1, 0, 0, 0, 1], np.int8), (num_concepts, 3000))
    equal_sums(sums_fast(values, labels_CN), sums_plain(values, labels_CN))
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    equal_sums(sums_fast(half, labels_CN), sums_plain(half, labels_CN))


def test_every_float16_keeps_its_value() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[~np.isnan(every)]
    other = np.zeros_like(every)
    values = np.stack([every, other], axis=0)
    sums = sums_fast(values, np.array([[1, 0]], np.int8))
    np.testing.assert_array_equal(sums.min_positive[0], every.astype(np.float64))


def test_blocks_of_converted_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values, labels = rng.standard_normal((50, 300)).astype(np.float16), (rng.random((2, 50)) < 0.4).astype(np.int8)
    whole = sums_fast(values, labels)
    monkeypatch.setattr(column_sums, "CONVERTED_VALUES", 50 * 70)
    equal_sums(sums_fast(values, labels), whole)
    equal_sums(sums_fast(np.asfortranarray(values.astype(np.float32)), labels), whole)
    equal_sums(
        sums_fast(values.astype(ml_dtypes.bfloat16), labels), sums_plain(values.astype(ml_dtypes.bfloat16), labels)
    )


def test_one_sort_serves_concepts_with_other_missing_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((300, 8)).astype(np.float32)
    labels_CN = rng.choice(np.array([-1, 0, 1], np.int8), (6, 300))
    calls: list[int] = []
    kernel = kernels.column_sums
    monkeypatch.setattr(kernels, "column_sums", lambda *a: calls.append(1) or kernel(*a))
    together = statistics_by_concept(values, labels_CN, NAMES)
    assert len(calls) == 1
    for c in range(6):
        kept = labels_CN[c] >= 0
        alone = statistics_by_concept(values[kept], labels_CN[c : c + 1, kept], NAMES)
        for name in NAMES:
            np.testing.assert_array_equal(together[name][c], alone[name][0], err_msg=name)


def test_auroc_alone_equals_auroc_among_others() -> None:
    rng = np.random.default_rng(2)
    values = make_values(rng, "ties", (500, 20))
    labels = (rng.random((3, 500)) < 0.3).astype(np.int8)
    alone, among = (statistics_by_concept(values, labels, names)["auroc"] for names in (["auroc"], NAMES))
    np.testing.assert_array_equal(alone, among)


def test_nan_and_infinity_do_what_is_said() -> None:
    values = np.array([[np.nan, np.inf, 1], [2, 1, np.inf], [3, 2, -np.inf], [4, 3, 3], [5, 4, 4]], np.float32)
    labels = np.array([[1, 1, 1, 0, 0], [-1, 1, 1, 0, 0]], np.int8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = statistics_by_concept(values, labels, NAMES)
    for name in NAMES:
        assert made[name][0, 0] == 0 if name == "num_distinct" else np.isnan(made[name][0, 0]), name
        assert not np.isnan(made[name][1, 0]), f"{name}: NaN only in a row that is not labelled"
    order = ("auroc", "auroc_se", "p_value", "average_precision", "num_distinct")
    assert not any(np.isnan(made[name][:, 1:]).any() for name in order)
    assert made["mean_positive"][0, 1] == np.inf
    assert made["max_positive"][0, 1] == np.inf
    assert np.isnan(made["mean_positive"][0, 2])
    assert np.isnan(
        [made[n][0, m] for n in ("std_positive", "linear_act_scale", "linear_act_shift") for m in (1, 2)]
    ).all()
    assert not np.isnan(made["std_negative"][0, 1:]).any()


def test_float64_is_not_rounded() -> None:
    values = 1 + np.arange(8)[:, None] * 2.0**-52
    made = statistics_by_concept(values, np.array([[0, 0, 0, 0, 1, 1, 1, 1]], np.int8), NAMES)
    assert made["auroc"][0, 0] == 1
    assert made["num_distinct"][0, 0] == 8
    assert made["min_positive"][0, 0] == values[4, 0]


def test_perfectly_separated_classes_have_no_error() -> None:
    values = np.arange(1000, dtype=np.float32)[:, None]
    labels = (np.arange(1000) >= 300).astype(np.int8)[None]
    assert statistics_by_concept(values, labels, ["auroc_se"])["auroc_se"][0, 0] == 0


def test_too_many_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aura_dist.scoring.columns.MAX_ROWS", 4)
    values, labels = np.zeros((4, 1), np.float32), np.array([[0, 1, 0, 1]], np.int8)
    with pytest.raises(InputError, match="fewer than 4 rows"):
        statistics_by_concept(values, labels, NAMES)
    assert statistics_by_concept(values, labels, ["auroc"])["auroc"][0, 0] == 0.5
