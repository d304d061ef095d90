"""AUROC against scikit-learn, against counting pairs, and the fast way against the plain one."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from aura_dist.errors import AuraError, InputError
from aura_dist.scoring import column_sums
from aura_dist.scoring.column_sums import sums_fast, sums_plain
from aura_dist.scoring.columns import auroc, statistics_by_concept
from aura_dist.scoring.kernels import MAX_WIDTH

Array = NDArray[Any]
KINDS = ("normal", "bfloat16", "ties", "signs", "constant", "near", "tiny", "bits")


def make_values(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Values that exercise one way through the kernel each."""
    normal = rng.standard_normal(shape).astype(np.float32)
    if kind == "bfloat16":
        return normal.astype(ml_dtypes.bfloat16).astype(np.float32)
    if kind == "ties":
        return np.round(normal, 1)
    if kind == "signs":
        return np.sign(normal) * np.float32(0.1)
    if kind == "constant":
        return np.full(shape, -0.3, np.float32)
    if kind == "near":  # alike in their leading bits: two radix passes do not sort them
        return np.where(normal > 1, -normal, 1 + rng.integers(0, 900, shape) * np.float32(2**-23))
    if kind == "tiny":
        return np.where(normal > 0, 1, -1) * rng.integers(0, 9, shape).astype(np.uint32).view(np.float32)
    if kind == "bits":
        values = rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
        return np.where(np.isnan(values), np.float32(np.inf), values)
    return normal


def make_labels(rng: np.random.Generator, num_rows: int, num_positive: int) -> NDArray[np.bool_]:
    return np.asarray(rng.permutation(num_rows) < num_positive)


def sklearn_auroc(values: Array, labels: Array) -> Array:
    # Ranks stand in for the values: they order alike, and scikit-learn refuses infinities.
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in values.T])
    return np.array([roc_auc_score(labels, column) for column in ranks])


def pair_counts(values: Array, labels: Array) -> Array:
    """Brute force: every positive against every negative, as Python numbers."""
    result = []
    for column in values.T.tolist():
        positives = [value for value, label in zip(column, labels, strict=True) if label]
        negatives = [value for value, label in zip(column, labels, strict=True) if not label]
        twice_u = sum(2 * (p > q) + (p == q) for p in positives for q in negatives)
        result.append(twice_u / (2 * len(positives) * len(negatives)))
    return np.array(result)


def fast_and_plain(values: Array, labels_CN: Array) -> None:
    """All concepts at once, and each alone: where all label the same rows, the kernel ranks and does nothing else."""
    for labels in (labels_CN, *labels_CN[:, None]):
        fast, plain = (way(values, labels, ranks_only=True) for way in (sums_fast, sums_plain))
        np.testing.assert_array_equal(fast.num_nan, plain.num_nan)
        clean = fast.num_nan == 0
        np.testing.assert_array_equal(fast.twice_u[clean], plain.twice_u[clean])


def auroc_by_concept(values: Array, labels_CN: Array) -> Array:
    return statistics_by_concept(values, labels_CN, ["auroc"])["auroc"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_rows, num_columns = draw(st.integers(2, 300)), draw(st.integers(1, 5))
    num_positive = draw(st.integers(1, num_rows - 1))
    values = make_values(rng, draw(st.sampled_from(KINDS)), (num_rows, num_columns))
    return values, make_labels(rng, num_rows, num_positive)


@settings(deadline=None, max_examples=200)
@given(cases())
def test_equals_sklearn(case: tuple[Array, Array]) -> None:
    values, labels = case
    np.testing.assert_allclose(auroc(values, labels), sklearn_auroc(values, labels), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.floats(width=32, allow_nan=False),
                st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-39, np.inf, -np.inf]),
            ),
            st.booleans(),
        ),
        min_size=2,
        max_size=40,
    ).filter(lambda rows: len({label for _, label in rows}) == 2)
)
def test_equals_pair_counts(rows: list[tuple[float, bool]]) -> None:
    values = np.array([[value] for value, _ in rows], np.float32)
    labels = np.array([label for _, label in rows])
    np.testing.assert_array_equal(auroc(values, labels), pair_counts(values, labels))


@settings(deadline=None, max_examples=100)
@given(cases(), st.integers(0, 2**32), st.integers(1, 5))
def test_fast_equals_plain(case: tuple[Array, Array], seed: int, num_concepts: int) -> None:
    values, labels = case
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(values.shape) < 1e-3, np.float32(np.nan), values)
    labels_CN = rng.choice(np.array([-1, 0, 0, 1], np.int8), (num_concepts, labels.size))
    labels_CN[:, labels.argmax()], labels_CN[:, labels.argmin()] = 1, 0
    fast_and_plain(values, labels_CN)
    with np.errstate(over="ignore"):
        fast_and_plain(values.astype(np.float16), labels_CN)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "num_positive"), [(2_500, 500), (10_000, 9_000), (10_000, 1), (1_024, 512)])
def test_large_columns(kind: str, num_rows: int, num_positive: int) -> None:
    rng = np.random.default_rng(num_rows)
    values = make_values(rng, kind, (num_rows, 3))
    labels = make_labels(rng, num_rows, num_positive)
    np.testing.assert_allclose(auroc(values, labels), sklearn_auroc(values, labels), rtol=0, atol=1e-12)
    fast_and_plain(values, labels[None].astype(np.int8))


def test_more_columns_than_one_block_and_mixed_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_sums, "CONVERTED_VALUES", 200 * 512)
    rng = np.random.default_rng(0)
    parts = [make_values(rng, KINDS[i % len(KINDS)], (200, 1)) for i in range(512 + 70)]
    values, labels = np.concatenate(parts, axis=1), make_labels(rng, 200, 50)
    expected = auroc(values, labels)
    np.testing.assert_allclose(expected, sklearn_auroc(values, labels), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(expected, auroc(np.asfortranarray(values), labels))
    assert values.shape[1] % MAX_WIDTH  # the last block is not a whole one


def test_many_rows() -> None:
    rng = np.random.default_rng(3)
    values = make_values(rng, "normal", (300_000, 2))  # keys are gathered in narrower blocks, and fully sorted
    labels = make_labels(rng, 300_000, 60_000)
    fast_and_plain(values, labels[None].astype(np.int8))


def test_threads_do_not_share_scratch() -> None:
    rng = np.random.default_rng(4)
    values, labels = make_values(rng, "normal", (500, 400)), make_labels(rng, 500, 100)
    values[:, ::2] = make_values(rng, "bfloat16", (500, 200))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: auroc(values, labels), range(16)))
    for result in results:
        np.testing.assert_array_equal(result, auroc(values, labels))


def test_known_values() -> None:
    values = np.array([[0.1, 3, 1], [0.4, 2, 1], [0.35, 1, 1], [0.8, 0, 1]], np.float32)
    np.testing.assert_array_equal(auroc(values, [False, False, True, True]), [0.75, 0.0, 0.5])


@pytest.mark.parametrize("num_concepts", [1, 6, 70])
def test_missing_labels_are_dropped_rows(num_concepts: int) -> None:
    rng = np.random.default_rng(num_concepts)
    values = make_values(rng, "ties", (400, 9))
    labels_CN = rng.choice(np.array([-1, 0, 1], np.int8), (num_concepts, 400))
    labels_CN[:, :2] = [0, 1]
    labels_CN[num_concepts // 2 :, 7] = np.abs(labels_CN[num_concepts // 2 :, 7])
    before = labels_CN.copy()
    result = auroc_by_concept(values, labels_CN)
    assert result.shape == (num_concepts, 9)
    assert result.dtype == np.float64
    np.testing.assert_array_equal(labels_CN, before)
    for row, labels in zip(result, labels_CN, strict=True):
        kept = labels >= 0
        np.testing.assert_array_equal(row, auroc(values[kept], labels[kept]))
        np.testing.assert_allclose(row, sklearn_auroc(values[kept], labels[kept]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_concepts", [1, 6, 80])
def test_several_concepts_equal_one_by_one(num_concepts: int) -> None:
    rng = np.random.default_rng(num_concepts)
    values = make_values(rng, "bfloat16", (500, 70))
    labels = rng.random((500, num_concepts)) < 0.3
    result = auroc(values, labels)
    assert result.shape == (num_concepts, 70)
    for c in range(num_concepts):
        np.testing.assert_array_equal(result[c], auroc(values, labels[:, c]))
        np.testing.assert_array_equal(result[c], auroc(values, labels[:, c].astype(np.uint8)))


@pytest.mark.parametrize("name", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_integer_dtypes(name: str) -> None:
    rng = np.random.default_rng(0)
    dtype = np.dtype(name)
    if dtype.kind == "b":
        values = rng.random((200, 4)) < 0.4
    else:
        info = np.iinfo(dtype)
        values = rng.integers(info.min, info.max, (200, 4), dtype=dtype, endpoint=True)
        values[:90, 1:3] = info.max - rng.integers(0, 4, (90, 2)).astype(dtype)
    labels = make_labels(rng, 200, 80)
    np.testing.assert_array_equal(auroc(values, labels), pair_counts(values, labels))


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_integers_above_float64_precision_stay_apart(dtype: type) -> None:
    values: Array = np.array([[2**53 + 1], [2**53], [2**62 + 1], [2**62]], dtype)
    assert auroc(values, [1, 0, 1, 0]).tolist() == [0.75]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, ">f2", ">f4", ml_dtypes.bfloat16])
def test_float_dtypes(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((150, 6)).astype(dtype)
    values[::7, 1], values[::5, 2], values[1::5, 2] = 0.0, -0.0, 0.0
    values[::9, 3], values[::11, 3] = np.inf, -np.inf
    values[:, 4] = (rng.standard_normal(150) * 2e-7).astype(dtype)  # float16's subnormals
    labels = make_labels(rng, 150, 40)
    np.testing.assert_array_equal(auroc(values, labels), pair_counts(values.astype(np.float64), labels))


def test_float64_is_not_rounded() -> None:
    values = 1 + np.arange(8)[:, None] * 2.0**-52
    assert auroc(values, [0, 0, 0, 0, 1, 1, 1, 1]).tolist() == [1.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_memory_layout_and_inputs_left_alone(dtype: type) -> None:
    rng = np.random.default_rng(2)
    base: Array = rng.standard_normal((300, 40)).astype(dtype)
    labels = make_labels(rng, 300, 60)
    expected = auroc(base.copy(), labels)
    base.flags.writeable = False
    labels.flags.writeable = False
    unaligned: Array = np.frombuffer(b"\0" + base.tobytes(), np.uint8)[1:].view(dtype).reshape(base.shape)
    for values in (
        base,
        np.asfortranarray(base),
        np.repeat(base, 2, axis=1)[:, ::2],
        base[::-1][::-1],
        unaligned,
    ):
        np.testing.assert_array_equal(auroc(values, labels), expected)
    np.testing.assert_array_equal(auroc(np.repeat(base, 2, axis=0)[::2], labels), expected)
    np.testing.assert_array_equal(auroc(base.tolist(), labels.tolist()), expected)
    writable = base.copy()
    auroc(writable, labels)
    assert writable.flags.writeable
    np.testing.assert_array_equal(writable, base)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("nan", [np.nan, -np.nan])
def test_nan_gives_nan_and_one_warning(dtype: Any, nan: float) -> None:
    rng = np.random.default_rng(0)
    clean, labels = rng.standard_normal((50, 5)).astype(dtype), rng.random((50, 2)) < 0.5
    values = clean.copy()
    values[[3, 4, 9], 1], values[7, 4] = nan, nan
    with pytest.warns(RuntimeWarning, match=r"^2 of 5 columns hold NaN \(4 values\)") as record:
        result = auroc(values, labels)
    assert len(record) == 1
    assert record[0].filename == __file__
    assert np.isnan(result[:, [1, 4]]).all()
    np.testing.assert_array_equal(result[:, [0, 2, 3]], auroc(clean, labels)[:, [0, 2, 3]])


def test_nan_counts_only_where_labelled() -> None:
    values = np.array([[1, 1], [2, 2], [np.nan, 3], [4, np.nan]], np.float32)
    labels_CN = np.array([[0, 1, -1, 1], [0, 1, 1, -1], [0, 1, 1, 1]], np.int8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = auroc_by_concept(values, labels_CN)
    np.testing.assert_array_equal(result, [[1, np.nan], [np.nan, 1], [np.nan, np.nan]])


def test_no_columns_or_no_concepts() -> None:
    assert auroc(np.empty((4, 0)), [0, 1, 0, 1]).shape == (0,)
    assert auroc(np.empty((4, 0), np.float32), np.eye(4, 3, dtype=bool)).shape == (3, 0)
    assert auroc(np.zeros((4, 2), np.float32), np.empty((4, 0), bool)).shape == (0, 2)


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        (np.zeros(3), [0, 1, 0], r"values must be \[N, M\], got shape \(3,\)"),
        (np.zeros((3, 1, 1)), [0, 1, 0], r"values must be \[N, M\], got shape \(3, 1, 1\)"),
        (np.zeros((3, 1), complex), [0, 1, 0], "values must be real numbers, got dtype complex128"),
        ([["a"], ["b"], ["c"]], [0, 1, 0], "values must be real numbers, got dtype <U1"),
        (np.zeros((3, 1), object), [0, 1, 0], "values must be real numbers, got dtype object"),
        (np.zeros((3, 1)), [0, 1], r"labels must be \[N\] or \[N, C\] with N = 3 .* got shape \(2,\)"),
        (np.zeros((3, 1)), np.zeros((3, 1, 1), bool), r"labels must be \[N\] or \[N, C\] .* \(3, 1, 1\)"),
        (np.zeros((3, 1)), True, r"labels must be \[N\] or \[N, C\] .* got shape \(\)"),
        (np.zeros((3, 1)), [0, 1, 2], "got 2 in row 2 of concept 0"),
        (np.zeros((3, 1)), [[0, 0], [1, -1], [1, 1]], "got -1 in row 1 of concept 1"),
        (np.zeros((3, 1)), np.array([0, 1, 2**63], np.uint64), "got 9223372036854775808 in row 2"),
        (np.zeros((3, 1)), [0.5, 1.0, 0.0], r"bool or integers 0 and 1, got dtype float64, first value 0\.5"),
        (np.zeros((3, 1)), ["yes", "no", "no"], "got dtype <U3, first value 'yes'"),
        (np.zeros((3, 1)), [1, 1, 1], "concept 0 has 3 positive and 0 negative rows"),
        (np.zeros((3, 1)), [[0, 0], [1, 0], [1, 0]], "concept 1 has 0 positive and 3 negative rows"),
        (np.zeros((0, 1)), np.zeros(0, bool), "concept 0 has 0 positive and 0 negative rows"),
    ],
)
def test_errors(values: Any, labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        auroc(values, labels)
    assert isinstance(error.value, AuraError | ValueError)


@pytest.mark.parametrize(
    ("labels_CN", "message"),
    [
        (np.zeros(3, np.int8), r"labels must be \[C, N\] with N = 3 .* got shape \(3,\)"),
        (np.zeros((3, 2), np.int8), r"got shape \(3, 2\)"),
        (np.array([[0, 1, 1], [0, -2, 1]], np.int8), r"\(not labelled\), got -2 in row 1 of concept 1"),
        (np.zeros((1, 3)), "got dtype float64, first value 0.0"),
        (np.array([[0, 1, 1], [-1, -1, 1]], np.int8), "concept 1 has 1 positive and 0 negative rows"),
    ],
)
def test_errors_by_concept(labels_CN: Array, message: str) -> None:
    with pytest.raises(InputError, match=message):
        auroc_by_concept(np.zeros((3, 1), np.float32), labels_CN)


def test_torch_tensors_that_numpy_cannot_hold_are_named():
    torch = pytest.importorskip("torch")
    values, labels = torch.randn(6, 2), [1, 0, 1, 0, 1, 0]
    hint = r"values must be an array of numbers, such as a torch tensor as tensor\.detach\(\)\.float\(\)\.cpu\(\): "
    for wrong in (values.bfloat16(), values.requires_grad_(), [[1.0, 2.0], [3.0]]):
        with pytest.raises(InputError, match=hint):
            auroc(wrong, labels)
    with pytest.raises(InputError, match="labels must be an array of numbers"):
        auroc(values.detach(), torch.tensor(labels).bfloat16())
    assert auroc(values.detach().bfloat16().float(), torch.tensor(labels)).shape == (2,)
