"""Point estimates of metrics compared with scikit-learn, and their errors for invalid input."""

import doctest

import numpy as np
import pytest
from error_codes import raises_code
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score

from compressors.errors.metrics import MetricRefused
from compressors.metrics import point_estimates

# Sums of at most a few hundred float64 terms near 1 differ by less than this.
EXACT = 1e-12


@st.composite
def clicks(draw, max_rows=60, graded=False):
    """Labels, scores with many ties, and groups, of equal length."""
    rows = draw(st.integers(2, max_rows))
    labels = st.integers(0, 4 if graded else 1)
    # Few distinct scores, as a heavily quantized model has, so most rows have ties.
    scores = st.sampled_from([-3.0, -0.5, 0.0, 0.1, 0.1000001, 2.0])
    draw_column = lambda values: np.array(draw(st.lists(values, min_size=rows, max_size=rows)))  # noqa: E731
    return draw_column(labels), draw_column(scores), draw_column(st.integers(0, 5))


def has_both_classes(label):
    return 0 < label.sum() < label.size


@given(clicks())
def test_auc_equals_scikit_learn_with_ties(data):
    label, score, _ = data
    assume(has_both_classes(label))
    assert point_estimates.auc(label, score) == pytest.approx(
        roc_auc_score(label, score), abs=EXACT
    )


@given(clicks())
def test_auc_is_invariant_to_increasing_maps_and_one_minus_auc_for_negated_scores(data):
    label, score, _ = data
    assume(has_both_classes(label))
    assert point_estimates.auc(label, np.arctan(score)) == point_estimates.auc(label, score)
    assert point_estimates.auc(label, -score) == pytest.approx(
        1 - point_estimates.auc(label, score), abs=EXACT
    )


def test_auc_of_equal_scores_is_a_half():
    assert point_estimates.auc([0, 1, 1], [7.0, 7.0, 7.0]) == 0.5


def test_auc_of_float16_scores_counts_their_ties():
    score = np.array([0.1, 0.1, 0.2], dtype=np.float16)
    assert point_estimates.auc([0, 1, 1], score) == 0.75


@given(clicks())
def test_gauc_is_the_impression_weighted_mean_of_scikit_learns_auc(data):
    label, score, group = data
    total = weight = 0.0
    for name in np.unique(group):
        rows = group == name
        if has_both_classes(label[rows]):
            total += rows.sum() * roc_auc_score(label[rows], score[rows])
            weight += rows.sum()
    assume(weight > 0)
    assert point_estimates.gauc(label, score, group) == pytest.approx(total / weight, abs=EXACT)
    left_out = point_estimates.gauc_left_out(label, group)
    assert left_out == pytest.approx(1 - weight / label.size, abs=EXACT)


def test_gauc_does_not_depend_on_names_or_order_of_groups():
    label = np.array([0, 1, 1, 0, 1, 0])
    score = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    by_number = point_estimates.gauc(label, score, np.array([9, 9, 3, 3, 9, 3]))
    by_name = point_estimates.gauc(
        label, score, np.array(["u", "u", "v", "v", "u", "v"], dtype=object)
    )
    assert by_number == by_name


@given(clicks(graded=True), st.integers(1, 12))
def test_ndcg_equals_scikit_learn_with_exponential_gains_and_averaged_ties(data, k):
    label, score, group = data
    expected = []
    for name in np.unique(group):
        rows = group == name
        # scikit-learn raises for a list of one item, whose NDCG is 1 if the item is relevant.
        if label[rows].max() > 0:
            gain = np.exp2(label[rows]) - 1.0
            is_single_row = rows.sum() == 1
            expected.append(1.0 if is_single_row else ndcg_score([gain], [score[rows]], k=k))
    assume(expected)
    assert point_estimates.ndcg(label, score, group, k) == pytest.approx(
        np.mean(expected), abs=EXACT
    )


@given(clicks(graded=True), st.randoms(use_true_random=False))
def test_no_metric_depends_on_the_order_of_rows(data, random):
    label, score, group = data
    order = list(range(label.size))
    random.shuffle(order)
    clicked = label > 0
    shuffled = label[order], score[order], group[order]
    if clicked.any():
        value = point_estimates.ndcg(label, score, group, 3)
        assert point_estimates.ndcg(*shuffled, 3) == pytest.approx(value, abs=EXACT)
    if has_both_classes(clicked):
        assert point_estimates.auc(clicked[order], score[order]) == point_estimates.auc(
            clicked, score
        )


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=40), st.data())
def test_logloss_equals_scikit_learns_with_float32_clipping(probability, data):
    size = len(probability)
    label = np.array(data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)))
    float32_probability = np.array(probability, dtype=np.float32)
    # scikit-learn clips by the eps of the array's dtype and computes in float32, with a relative
    # error of 1e-6 of at most 16 nats.
    expected = log_loss(label, float32_probability, labels=[0, 1])
    assert point_estimates.logloss(label, float32_probability) == pytest.approx(expected, abs=2e-5)


def test_logloss_of_a_wrong_probability_of_one_is_the_float32_clip():
    loss = point_estimates.row_logloss([1, 0], [0.0, 1.0])
    np.testing.assert_allclose(loss, -np.log(np.finfo(np.float32).eps), rtol=1e-6)


@given(st.integers(1, 50), st.integers(1, 50))
def test_normalized_entropy_of_the_base_rate_is_one(positives, negatives):
    label = np.repeat([1, 0], [positives, negatives])
    base_rate = np.full(label.size, positives / label.size)
    # Probabilities are at least 1/51, so they are not clipped, and the difference is only rounding.
    assert point_estimates.normalized_entropy(label, base_rate) == pytest.approx(1, abs=1e-9)


def test_examples_in_docstrings_run():
    assert doctest.testmod(point_estimates).failed == 0
    assert doctest.testmod(point_estimates).attempted >= 4


@pytest.mark.parametrize("invalid", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "metric",
    [
        lambda y, s, g: point_estimates.auc(y, s),
        lambda y, s, g: point_estimates.logloss(y, s),
        lambda y, s, g: point_estimates.normalized_entropy(y, s),
        lambda y, s, g: point_estimates.gauc(y, s, g),
        lambda y, s, g: point_estimates.ndcg(y, s, g, 10),
    ],
    ids=["auc", "logloss", "normalized_entropy", "gauc", "ndcg"],
)
def test_a_nan_or_infinite_score_raises_metric_refused(metric, invalid):
    with raises_code(MetricRefused, "column_not_finite", column="score", count=1, rows=4):
        metric(np.array([0, 1, 0, 1]), np.array([0.1, invalid, 0.3, 0.2]), np.zeros(4, int))


@pytest.mark.parametrize(
    ("call", "code", "fields"),
    [
        (
            lambda: point_estimates.auc([1, 1], [0.1, 0.2]),
            "one_class_only",
            {"metric": "auc", "positive": 2, "rows": 2},
        ),
        (
            lambda: point_estimates.normalized_entropy([0, 0], [0.1, 0.2]),
            "one_class_only",
            {"metric": "normalized_entropy", "positive": 0, "rows": 2},
        ),
        (
            lambda: point_estimates.auc([1, 4], [0.1, 0.2]),
            "labels_not_binary",
            {"count": 1, "rows": 2, "first": 4.0},
        ),
        (
            lambda: point_estimates.auc([1, np.nan], [0.1, 0.2]),
            "column_not_finite",
            {"column": "label", "count": 1, "rows": 2},
        ),
        (
            lambda: point_estimates.auc([0, 1], [0.1, 0.2, 0.3]),
            "lengths_differ",
            {"lengths": (2, 3)},
        ),
        (
            lambda: point_estimates.auc([0, 1], [[0.1], [0.2]]),
            "column_shape",
            {"column": "score", "shape": (2, 1)},
        ),
        (lambda: point_estimates.auc([], []), "column_shape", {"column": "label", "shape": (0,)}),
        (
            lambda: point_estimates.auc([0, 1], ["a", "b"]),
            "column_not_numeric",
            {"column": "score"},
        ),
        (
            lambda: point_estimates.logloss([0, 1], [0.5, 1.5]),
            "probabilities_outside",
            {"count": 1, "rows": 2, "first": 1.5},
        ),
        (lambda: point_estimates.gauc([0, 1], [0.1, 0.2], [1, 2]), "groups_of_one_class", {}),
        (lambda: point_estimates.gauc([0, 1], [0.1, 0.2], [1.0, np.nan]), "group_not_finite", {}),
        (lambda: point_estimates.ndcg([0, 0], [0.1, 0.2], [1, 1], 3), "relevant_items_missing", {}),
        (
            lambda: point_estimates.ndcg([0, -1], [0.1, 0.2], [1, 1], 3),
            "grades_outside",
            {"lowest": -1.0, "highest": 0.0},
        ),
        (
            lambda: point_estimates.ndcg([0, 1], [0.1, 0.2], [1, 1], 0),
            "depth_below_one",
            {"depth": 0},
        ),
    ],
)
def test_metrics_without_a_value_raise_metric_refused(call, code, fields):
    with raises_code(MetricRefused, code, **fields):
        call()
