"""Labels are read strictly; rows are drawn by class, seeded, and at equal lengths where asked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aura_dist.errors import InputError
from aura_dist.text.labels import check_classes, check_texts, parse_labels
from aura_dist.text.selection import Sampling, Selection, sample_rows, select, without_mixed_negatives
from aura_dist.text.table import Table
from tests.models import tiny_tokenizer


def table(**columns):
    return Table("d.csv", "", columns)


def labels_of(values, threshold=None):
    return parse_labels(table(y=values), ["y"], threshold)[:, 0].tolist()


# --- labels


@pytest.mark.parametrize(
    ("values", "label"),
    [
        (["1", 1, 1.0, "1.0", True, "true", "True", " TRUE ", np.int8(1), np.float32(1)], 1),
        (["0", 0, 0.0, "0.0", False, "false", "False", "FALSE", np.bool_(False)], 0),
        ([None, "", "  ", float("nan"), -1, "-1", -1.0, "-1.0"], -1),
    ],
)
def test_binary_labels(values, label):
    assert labels_of(values) == [label] * len(values)


@pytest.mark.parametrize("value", ["2", 2, "0.5", 0.5, "yes", "toxic", "nan", -2, [1], {"a": 1}, float("inf")])
def test_labels_that_are_not_binary_are_named(value):
    with pytest.raises(
        InputError, match=r"row 2: expected 0, 1, true or false in 'y', got .*; for scores give --threshold"
    ):
        labels_of(["1", "0", value, "1"])


def test_fault_is_named_by_its_column():
    with pytest.raises(InputError, match="row 1: expected 0, 1, true or false in 'b', got '7'"):
        parse_labels(table(a=["1", "0"], b=["1", "7"]), ["a", "b"])


def test_scores_are_positive_from_the_threshold_on():
    values = ["0.5", 0.5, "0.49999", 0.2, "1e0", -3, True, float("inf"), None, "", float("nan"), "nan"]
    assert labels_of(values, 0.5) == [1, 1, 0, 0, 1, 0, 1, 1, -1, -1, -1, -1]
    assert labels_of(["-1", "0", "-0.5"], 0.0) == [0, 1, 0], "a number is a score, also -1 and a threshold of 0"
    assert labels_of(["-1", "-3"], -2.0) == [1, 0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("threshold", [0.1, 0.7, 0.9, 1 / 3])
def test_scores_are_compared_in_their_own_dtype(dtype, threshold):
    at = dtype(threshold)
    below = np.nextafter(at, dtype(0))
    assert labels_of([at, below, np.nextafter(at, dtype(1)), dtype("nan")], threshold) == [1, 0, 1, -1]
    assert labels_of([dtype("inf"), dtype(1)], 1e300) == [1, 0]


def test_whole_numbers_of_any_size_are_scores():
    assert labels_of([10**400, -(10**400), 2**53 + 1, 2**53 - 1], 2.0**53) == [1, 0, 1, 0]


@pytest.mark.parametrize("value", ["high", "true", [0.5], "0,5"])
def test_scores_that_are_no_numbers_are_named(value):
    with pytest.raises(InputError, match="row 1: expected a number in 'y', got "):
        labels_of(["0.5", value], 0.5)


def test_labels_of_several_columns_stay_in_order():
    labels = parse_labels(table(a=["1", "0", ""], b=["0", "0", "1"], text=["x"] * 3), ["b", "a"])
    assert labels.dtype == np.int8
    assert labels.tolist() == [[0, 1], [0, 0], [1, -1]]


@pytest.mark.parametrize(
    ("column", "counts"),
    [
        ([1, 1, 1], "3 positive and 0 negative"),
        ([0, 0, -1], "0 positive and 2 negative"),
        ([-1, -1, -1], "0 positive and 0 negative"),
    ],
)
def test_one_class_only_is_an_error(column, counts):
    labels = np.array([[1, 0, 1], column], dtype=np.int8).T
    check_classes(labels[:, :1], ["fine"], "d.csv")
    with pytest.raises(InputError, match=f"concept 'lacking': expected rows of both classes, got {counts}"):
        check_classes(labels, ["fine", "lacking"], "d.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a text in 'text', got None"),
        (3, "expected a text in 'text', got 3"),
        (["a"], r"expected a text in 'text', got \['a'\]"),
        ("", "expected a text in 'text', got an empty one"),
        (" \n\t", "expected a text in 'text', got an empty one"),
        ("a\ud800b", r"expected valid Unicode in 'text', got '\\ud800'"),
    ],
)
def test_texts_that_are_none_are_named(text, message):
    with pytest.raises(InputError, match=f"data 'd.csv': row 1: {message}"):
        check_texts(table(text=["fine", text, "fine"]), "text")


def test_texts_are_not_changed():
    texts = [" NA ", "null\n", "é🙂"]
    assert check_texts(table(text=list(texts)), "text") == texts


# --- sampling


def test_jigsaws_rule_leaves_out_negatives_of_other_labels_only():
    toxic = np.array([0, 0, 1, 1, 0, -1, 0], dtype=np.int8)
    others = np.array([[0, 0], [0, 1], [1, 1], [0, 0], [1, 0], [1, 1], [-1, 0]], dtype=np.int8)
    assert without_mixed_negatives(toxic, others).tolist() == [0, 2, 3, 5, 6]


def pool(num_positive=300, num_negative=1200, num_unlabelled=50, seed=0):
    """Labels and token counts in random order; negatives are about twice as long, as Jigsaw's are."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.repeat([1, 0, -1], [num_positive, num_negative, num_unlabelled])).astype(np.int8)
    mean = np.where(label == 1, 3.0, 3.7)
    return label, np.clip(rng.lognormal(mean, 0.7), 1, 128).astype(np.int32)


@pytest.mark.parametrize("clean", [[], ["rude", "toxic"]])
def test_selected_rows_are_in_order_of_length(clean):
    rng = np.random.default_rng(0)
    texts = ["word " * n for n in rng.integers(1, 9, 60)]
    toxic, rude = rng.integers(0, 2, 60).tolist(), rng.integers(0, 2, 60).tolist()
    which = Selection(
        num_positive=10, text_column="text", concepts=["toxic"], clean_negatives=clean, threshold=None, max_tokens=6,
        skip_special_tokens=False,
    )  # fmt: skip
    assert which.columns == ["text", "toxic", *clean[:1]]
    tokenizer = tiny_tokenizer()
    rows, label, tokens = select(table(text=texts, toxic=toxic, rude=rude), which, lambda: tokenizer)
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=6)["input_ids"]]
    assert tokens.num_tokens.tolist() == [lengths[r] for r in rows]
    assert rows.tolist() == sorted(rows, key=lambda r: (lengths[r], r))
    assert label[:, 0].tolist() == [toxic[r] for r in rows]
    assert set(rows[label[:, 0] == 0]) == {r for r in range(60) if not toxic[r] and not (clean and rude[r])}
    assert label.sum() == 10


def test_everything_is_taken_when_nothing_is_asked():
    label, num_tokens = pool()
    assert sample_rows(label, num_tokens, Sampling(seed=3)).tolist() == list(range(len(label)))


@settings(deadline=None)
@given(st.none() | st.integers(1, 30), st.none() | st.integers(1, 90), st.booleans(), st.integers(0, 2**63 - 1))
def test_as_many_rows_of_each_class_as_asked(positives, negatives, match_length, seed):
    label, num_tokens = pool(30, 90, 5)
    num_tokens[:] = 7
    how = Sampling(positives, negatives, match_length, seed)
    rows = sample_rows(label, num_tokens, how)
    assert (np.diff(rows) > 0).all()
    if how == Sampling(seed=seed):
        return
    wanted = 30 if positives is None else positives
    assert (label[rows] == 1).sum() == wanted
    assert (label[rows] == 0).sum() == (negatives or (wanted if match_length else 90))
    assert not (label[rows] == -1).any()


@pytest.mark.parametrize("match_length", [False, True])
def test_sampling_is_the_seeds(match_length):
    label, num_tokens = pool()
    drawn = [sample_rows(label, num_tokens, Sampling(40, 40, match_length, seed)) for seed in (5, 5, 6)]
    assert drawn[0].tolist() == drawn[1].tolist()
    for value in (0, 1):
        a, b = (set(rows[label[rows] == value]) for rows in drawn[1:])
        assert a != b


@pytest.mark.parametrize("match_length", [False, True])
def test_positives_do_not_depend_on_the_negatives(match_length):
    label, num_tokens = pool()
    chosen = [sample_rows(label, num_tokens, Sampling(40, n, match_length, 1)) for n in (10, 100, 300)]
    positives = [rows[label[rows] == 1].tolist() for rows in chosen]
    assert positives[0] == positives[1] == positives[2]


def test_more_are_drawn_by_adding_rows():
    label, num_tokens = pool()
    few, many = (sample_rows(label, num_tokens, Sampling(n, n, seed=1)) for n in (20, 50))
    assert set(few) < set(many)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Sampling(301, 10), "--num-positive: expected at most 300, the number of positive rows, got 301"),
        (Sampling(10, 1201), "--num-negative: expected at most 1200, the number of negative rows, got 1201"),
        (Sampling(10, 1201, match_length=True), "--num-negative: expected at most 1200"),
    ],
)
def test_more_rows_than_there_are(how, message):
    label, num_tokens = pool()
    with pytest.raises(InputError, match=message):
        sample_rows(label, num_tokens, how)


@pytest.mark.parametrize("num_negative", [None, 100, 500])
@pytest.mark.parametrize("seed", range(3))
def test_matched_negatives_have_the_positives_lengths(num_negative, seed):
    label, num_tokens = pool(300, 4000, seed=seed)
    rows = sample_rows(label, num_tokens, Sampling(None, num_negative, match_length=True, seed=seed))
    positive, negative = (num_tokens[rows[label[rows] == value]] for value in (1, 0))
    assert num_tokens[label == 0].mean() > 1.4 * positive.mean(), "else there is nothing to match"
    assert len(negative) == (num_negative or 300)
    assert negative.mean() == pytest.approx(positive.mean(), rel=0.05)
    at = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(negative, at), np.quantile(positive, at), rtol=0.1, atol=1.5)


def test_matching_draws_among_rows_of_one_length_at_random():
    label = np.array([1] * 10 + [0] * 100, dtype=np.int8)
    num_tokens = np.full(110, 9, dtype=np.int32)
    drawn = [set(sample_rows(label, num_tokens, Sampling(match_length=True, seed=s))[10:]) for s in range(40)]
    times = np.array([sum(row in rows for rows in drawn) for row in range(10, 110)])
    assert times.sum() == 400
    assert times.max() <= 15
    assert (times > 0).sum() > 90


@pytest.mark.parametrize(("below", "above", "row"), [(99, 104, 1), (97, 102, 2), (100, 101, 1), (99, 100, 2)])
def test_nearest_length_is_taken(below, above, row):
    label, num_tokens = np.array([1, 0, 0], dtype=np.int8), np.array([100, below, above], dtype=np.int32)
    assert sample_rows(label, num_tokens, Sampling(match_length=True)).tolist() == [0, row]


def test_no_length_is_matched_before_another():
    label = np.array([1, 1, 0, 0, 0], dtype=np.int8)
    num_tokens = np.array([100, 102, 97, 101, 105], dtype=np.int32)
    # whichever of 100 and 102 comes first takes the row of 101
    drawn = {tuple(sample_rows(label, num_tokens, Sampling(match_length=True, seed=s))[2:]) for s in range(20)}
    assert drawn == {(2, 3), (3, 4)}


@pytest.mark.parametrize(("length", "taken"), [(1000, 1001), (995, 993), (940, 960), (1050, 1030)])
def test_matching_takes_the_nearest_length(length, taken):
    there = np.repeat([960, 993, 1001, 1030], 25).astype(np.int32)
    label = np.array([1] * 10 + [0] * 100, dtype=np.int8)
    num_tokens = np.concatenate([np.full(10, length, dtype=np.int32), np.random.default_rng(0).permutation(there)])
    rows = sample_rows(label, num_tokens, Sampling(None, 20, match_length=True))
    assert set(num_tokens[rows[label[rows] == 0]]) == {taken}


@pytest.mark.parametrize("others", [4, 80])
def test_lengths_that_cannot_be_matched(others):
    label = np.array([1] * 20 + [0] * 30, dtype=np.int8)
    num_tokens = np.array([20] * 20 + [others] * 30, dtype=np.int32)
    message = (
        rf"--match-length: expected 20 negatives with the positives' token lengths \(20\.0 on average\), but the "
        rf"nearest of the 30 there are differ by {abs(others - 20)}\.0 tokens on average, .*: 20 wanted, {others} drawn"
    )
    with pytest.raises(InputError, match=message):
        sample_rows(label, num_tokens, Sampling(match_length=True))


def test_equal_means_are_not_equal_lengths():
    label = np.array([1] * 100 + [0] * 200, dtype=np.int8)
    num_tokens = np.array([10] * 50 + [110] * 50 + [60] * 200, dtype=np.int32)
    with pytest.raises(InputError, match=r"differ by 50\.0 tokens .* most at quantile 0\.\d+: 10 wanted, 60 drawn"):
        sample_rows(label, num_tokens, Sampling(match_length=True))
    num_tokens[100:150], num_tokens[150:170] = 10, 110  # too few of the long ones
    with pytest.raises(InputError, match=r"differ by .* most at quantile 0\.\d+: 110 wanted, 60 drawn"):
        sample_rows(label, num_tokens, Sampling(match_length=True))
    num_tokens[170:200] = 110
    rows = sample_rows(label, num_tokens, Sampling(match_length=True))
    assert np.sort(num_tokens[rows[label[rows] == 0]]).tolist() == [10] * 50 + [110] * 50


def test_fewer_negatives_than_positives_without_a_number_asked():
    label, num_tokens = np.array([1, 1, 1, 0, 0], dtype=np.int8), np.full(5, 9, dtype=np.int32)
    message = "^--match-length: expected at least 3 negative rows, as many as positives are drawn, found 2; give"
    with pytest.raises(InputError, match=message):
        sample_rows(label, num_tokens, Sampling(match_length=True))
    assert len(sample_rows(label, num_tokens, Sampling(2, match_length=True))) == 4
