"""Recall and NDCG over the full catalogue: ties, seen items, and the intervals of means.

``naive_recall_and_ndcg`` is a reference that tries every order of items with equal scores.

Items that a user has seen in earlier rows are *hidden*: they are not ranked. ``resolves`` is half
the width of the interval of a difference. In the fields of errors, ``least`` is the smallest
accepted count, ``got`` the count, and ``first`` the number of the first invalid row.
"""

import itertools
import math

import numpy as np
import pytest
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st

from compressors.errors.metrics import MetricRefused
from compressors.metrics import full_ranking
from compressors.metrics.full_ranking import (
    Interactions,
    RankedVectors,
    ranking_metrics,
    ranking_queries,
)
from compressors.metrics.intervals import compare_means


def recall_and_ndcg(query, item, queries, k=20):
    """Recall and NDCG of every query."""
    values = ranking_metrics(RankedVectors(query, item, queries), (f"recall@{k}", f"ndcg@{k}"))
    return tuple(values.values())


def interactions(*pairs, label=None):
    """Interactions from pairs of a user and an item id, by default with the label 1."""
    users, item_ids = zip(*pairs, strict=True) if pairs else ((), ())
    return Interactions(
        np.array(users, np.int64),
        np.array(item_ids, np.int64),
        np.ones(len(pairs)) if label is None else label,
    )


def naive_recall_and_ndcg(scores, relevant, hidden, k):
    """Recall and NDCG of one query: the mean over all orders of items of equal score.

    ``scores`` has the score of each item id. The function tries all permutations, so it is only for
    small catalogues.
    """
    relevant = relevant - hidden
    ranked = sorted((score, item) for item, score in scores.items() if item not in hidden)[::-1]
    tied_items = [
        [item for _, item in tied]
        for _, tied in itertools.groupby(ranked, key=lambda pair: pair[0])
    ]
    values = []
    for orders_of_ties in itertools.product(
        *(list(itertools.permutations(tied)) for tied in tied_items)
    ):
        ranking = [item for tied in orders_of_ties for item in tied][:k]
        hits = [rank for rank, item in enumerate(ranking) if item in relevant]
        gain = sum(1 / math.log2(rank + 2) for rank in hits)
        values.append((len(hits) / len(relevant), gain))
    best_gain = sum(1 / math.log2(rank + 2) for rank in range(min(k, len(relevant))))
    recall, gain = np.mean(values, axis=0)
    return recall, gain / best_gain


@st.composite
def rankings(draw):
    """Small catalogues with vectors of small integers, so scores are exact and often equal."""
    items = draw(st.integers(2, 6))
    users = draw(st.integers(1, 4))
    ids = draw(st.permutations(range(10, 10 + items)))
    number = st.integers(-1, 1)
    query = draw(st.lists(st.tuples(number, number), min_size=users, max_size=users))
    item = draw(st.lists(st.tuples(number, number), min_size=items, max_size=items))
    pair = st.tuples(st.integers(0, users - 1), st.sampled_from(ids))
    test = draw(st.lists(pair, min_size=1, max_size=8))
    earlier = draw(st.lists(pair, max_size=6))
    return ids, np.float32(query), np.float32(item), test, earlier, draw(st.integers(1, 7))


@given(rankings(), st.sampled_from([1, 5, 2**24]))
def test_full_ranking_equals_a_naive_ranking_for_every_block_size(case, scores_at_once):
    ids, query, item, test, earlier, k = case
    expected = []
    for user in range(len(query)):
        relevant = {item_id for user_of_pair, item_id in test if user_of_pair == user}
        hidden = {item_id for user_of_pair, item_id in earlier if user_of_pair == user}
        if relevant - hidden:
            scores = {name: float(query[user] @ item[index]) for index, name in enumerate(ids)}
            expected.append((user, *naive_recall_and_ndcg(scores, relevant, hidden, k)))
    if not expected:
        with raises_code(MetricRefused, "new_items_missing"):
            ranking_queries(interactions(*test), [interactions(*earlier)], ids)
        return
    queries = ranking_queries(interactions(*test), [interactions(*earlier)], ids)
    assert queries.query.tolist() == [user for user, _, _ in expected]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_ranking, "SCORES_AT_ONCE", scores_at_once)
        recall, ndcg = recall_and_ndcg(query[queries.query], item, queries, k)
    np.testing.assert_allclose(recall, [value for _, value, _ in expected], atol=1e-12)
    np.testing.assert_allclose(ndcg, [value for _, _, value in expected], atol=1e-12)


def test_items_that_the_user_has_seen_are_neither_ranked_nor_relevant():
    """The seen item has the best score and is in the test rows, so ranking it would show."""
    item = np.float32([[9], [2], [1]])
    queries = ranking_queries(
        interactions((7, 100), (7, 102)), [interactions((7, 100))], [100, 101, 102]
    )
    recall, ndcg = recall_and_ndcg(np.float32([[1]]), item, queries, k=1)
    assert (recall[0], ndcg[0]) == (0, 0)  # item 101 is ranked first and not relevant
    recall, ndcg = recall_and_ndcg(np.float32([[1]]), item, queries, k=2)
    assert (recall[0], ndcg[0]) == (1, pytest.approx(1 / math.log2(3)))


def test_items_that_only_other_users_have_seen_are_ranked():
    queries = ranking_queries(
        interactions((1, 100), (2, 100)), [interactions((2, 100), (3, 100))], [100, 101]
    )
    assert queries.query.tolist() == [1]
    recall, _ = recall_and_ndcg(np.float32([[1]]), np.float32([[1], [0]]), queries, k=1)
    assert recall.tolist() == [1]


def test_rows_with_label_0_are_neither_relevant_nor_seen():
    earlier = interactions((1, 101), label=np.array([0.0]))
    queries = ranking_queries(
        interactions((1, 100), (1, 101), label=np.array([0.0, 1.0])), [earlier], [100, 101]
    )
    assert queries.relevant.tolist() == [1]
    assert queries.hidden.size == 0


def test_queries_have_the_first_row_of_each_user():
    queries = ranking_queries(interactions((9, 1), (4, 1), (9, 2), (4, 2)), [], [1, 2])
    assert (queries.query.tolist(), queries.row.tolist()) == ([4, 9], [1, 0])


def test_recall_of_equal_scores_equals_the_recall_of_a_random_ranking():
    items = 50
    queries = ranking_queries(interactions((0, 3)), [interactions((0, 4))], np.arange(items))
    recall, _ = recall_and_ndcg(np.zeros((1, 2), np.float32), np.ones((items, 2), "f"), queries)
    assert recall[0] == pytest.approx(20 / 49)  # the best 20 of all items but the seen one


def test_vectors_with_nan_or_a_wrong_shape_raise_metric_refused():
    queries = ranking_queries(interactions((0, 3)), [], np.arange(4))
    item = np.ones((4, 2), np.float32)
    item[2, 1] = np.nan
    with raises_code(MetricRefused, "vectors_not_finite", side="item", count=1, rows=4, first=2):
        recall_and_ndcg(np.ones((1, 2), np.float32), item, queries)
    with raises_code(MetricRefused, "vectors_shape", side="query", expected=1, shape=(2, 2)):
        recall_and_ndcg(np.ones((2, 2), np.float32), np.ones((4, 2), np.float32), queries)


def test_a_test_item_outside_the_catalogue_raises_metric_refused():
    with raises_code(MetricRefused, "items_not_in_catalogue"):
        ranking_queries(interactions((0, 3), (0, 9)), [], np.arange(4))


def test_compare_means_resamples_the_same_queries_for_both_models():
    rng = np.random.default_rng(0)
    before = rng.random(400)
    # ``rows`` is only reported: the number of data rows from which the queries are.
    means = compare_means(before, before - 0.01, rows=1234)
    assert means.difference.point == pytest.approx(-0.01)
    assert means.resolves < 1e-9  # each query has the same difference
    assert means.baseline.rows == 1234
    # The mean of 400 values is nearly normal, so its interval has a half-width of 1.96 standard
    # errors. The width from 1,000 replicates has a standard error of 4 %; over three are allowed.
    half_width = 1.96 * before.std() / math.sqrt(400)
    assert means.baseline.high - means.baseline.low == pytest.approx(2 * half_width, rel=0.15)
    with_other_candidate = compare_means(before, rng.random(400), rows=1234)
    assert with_other_candidate.baseline == means.baseline  # the same queries are resampled


@pytest.mark.parametrize(
    ("before", "after", "code", "fields"),
    [
        (np.ones(9), np.ones(9), "units_few", {"least": 10, "got": 9}),
        (np.ones(20), np.ones(19), "values_unpaired", {"baseline": (20,), "candidate": (19,)}),
        (np.ones(20), np.full(20, np.nan), "values_not_finite", {}),
    ],
)
def test_compare_means_of_unusable_values_raise_metric_refused(before, after, code, fields):
    with raises_code(MetricRefused, code, **fields):
        compare_means(before, after, rows=20)
