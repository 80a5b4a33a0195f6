"""A full ranking against one written out by hand: places, ties, and what must stay hidden."""

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
from compressors.metrics.intervals import paired_means


def recall_and_ndcg(query, item, what, k=20):
    """Both metrics of every query."""
    values = ranking_metrics(RankedVectors(query, item, what), (f"recall@{k}", f"ndcg@{k}"))
    return tuple(values.values())


def rows(*pairs, label=None):
    people, things = zip(*pairs, strict=True) if pairs else ((), ())
    return Interactions(
        np.array(people, np.int64),
        np.array(things, np.int64),
        np.ones(len(pairs)) if label is None else label,
    )


def naive(scores, wanted, hidden, k):
    """Recall and NDCG of one query: the mean over every order of items of equal score.

    ``scores`` by item id. Written out with permutations, so for small catalogues only.
    """
    wanted = wanted - hidden
    shown = sorted((score, item) for item, score in scores.items() if item not in hidden)[::-1]
    runs = [
        [item for _, item in run] for _, run in itertools.groupby(shown, key=lambda pair: pair[0])
    ]
    found = []
    for orders in itertools.product(*(list(itertools.permutations(run)) for run in runs)):
        ranking = [item for run in orders for item in run][:k]
        hits = [place for place, item in enumerate(ranking) if item in wanted]
        gain = sum(1 / math.log2(place + 2) for place in hits)
        found.append((len(hits) / len(wanted), gain))
    best = sum(1 / math.log2(place + 2) for place in range(min(k, len(wanted))))
    recall, gain = np.mean(found, axis=0)
    return recall, gain / best


@st.composite
def rankings(draw):
    """Few items with small whole numbers as vectors: exact scores, and many ties."""
    items = draw(st.integers(2, 6))
    people = draw(st.integers(1, 4))
    ids = draw(st.permutations(range(10, 10 + items)))
    number = st.integers(-1, 1)
    query = draw(st.lists(st.tuples(number, number), min_size=people, max_size=people))
    item = draw(st.lists(st.tuples(number, number), min_size=items, max_size=items))
    pair = st.tuples(st.integers(0, people - 1), st.sampled_from(ids))
    test = draw(st.lists(pair, min_size=1, max_size=8))
    seen = draw(st.lists(pair, max_size=6))
    return ids, np.float32(query), np.float32(item), test, seen, draw(st.integers(1, 7))


@given(rankings(), st.sampled_from([1, 5, 2**24]))
def test_full_ranking_equals_a_naive_ranking_for_every_block_size(drawn, at_once):
    ids, query, item, test, seen, k = drawn
    expected = []
    for person in range(len(query)):
        wanted = {thing for who, thing in test if who == person}
        hidden = {thing for who, thing in seen if who == person}
        if wanted - hidden:
            scores = {name: float(query[person] @ item[at]) for at, name in enumerate(ids)}
            expected.append((person, *naive(scores, wanted, hidden, k)))
    if not expected:
        with raises_code(MetricRefused, "new_items_missing"):
            ranking_queries(rows(*test), [rows(*seen)], ids)
        return
    what = ranking_queries(rows(*test), [rows(*seen)], ids)
    assert what.query.tolist() == [person for person, _, _ in expected]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_ranking, "SCORES_AT_ONCE", at_once)
        recall, ndcg = recall_and_ndcg(query[what.query], item, what, k)
    np.testing.assert_allclose(recall, [value for _, value, _ in expected], atol=1e-12)
    np.testing.assert_allclose(ndcg, [value for _, _, value in expected], atol=1e-12)


def test_seen_items_are_neither_ranked_nor_relevant():
    """A leak would show: the seen item has the best score by far and is in the test rows again."""
    item = np.float32([[9], [2], [1]])
    what = ranking_queries(rows((7, 100), (7, 102)), [rows((7, 100))], [100, 101, 102])
    recall, ndcg = recall_and_ndcg(np.float32([[1]]), item, what, k=1)
    assert (recall[0], ndcg[0]) == (0, 0)  # place 1 is item 101, which is not relevant
    recall, ndcg = recall_and_ndcg(np.float32([[1]]), item, what, k=2)
    assert (recall[0], ndcg[0]) == (1, pytest.approx(1 / math.log2(3)))


def test_what_others_saw_is_not_hidden():
    what = ranking_queries(rows((1, 100), (2, 100)), [rows((2, 100), (3, 100))], [100, 101])
    assert what.query.tolist() == [1]
    recall, _ = recall_and_ndcg(np.float32([[1]]), np.float32([[1], [0]]), what, k=1)
    assert recall.tolist() == [1]


def test_rows_with_label_0_are_neither_wanted_nor_seen():
    seen = rows((1, 101), label=np.array([0.0]))
    what = ranking_queries(rows((1, 100), (1, 101), label=np.array([0.0, 1.0])), [seen], [100, 101])
    assert what.wanted.tolist() == [1]
    assert what.hidden.size == 0


def test_a_row_of_each_query_is_remembered():
    what = ranking_queries(rows((9, 1), (4, 1), (9, 2), (4, 2)), [], [1, 2])
    assert (what.query.tolist(), what.row.tolist()) == ([4, 9], [1, 0])


def test_a_model_that_scores_everything_alike_is_worth_what_chance_is():
    items = 50
    what = ranking_queries(rows((0, 3)), [rows((0, 4))], np.arange(items))
    recall, _ = recall_and_ndcg(np.zeros((1, 2), np.float32), np.ones((items, 2), "f"), what)
    assert recall[0] == pytest.approx(20 / 49)


def test_vectors_that_are_no_numbers_are_refused_with_their_number():
    what = ranking_queries(rows((0, 3)), [], np.arange(4))
    item = np.ones((4, 2), np.float32)
    item[2, 1] = np.nan
    with raises_code(MetricRefused, "vectors_not_finite", side="item", count=1, rows=4, first=2):
        recall_and_ndcg(np.ones((1, 2), np.float32), item, what)
    with raises_code(MetricRefused, "vectors_shape", side="query", expected=1, shape=(2, 2)):
        recall_and_ndcg(np.ones((2, 2), np.float32), np.ones((4, 2), np.float32), what)


def test_a_test_item_outside_the_catalogue_is_refused():
    with raises_code(MetricRefused, "items_not_in_catalogue"):
        ranking_queries(rows((0, 3), (0, 9)), [], np.arange(4))


def test_the_interval_of_a_mean_over_queries_is_the_paired_one():
    draw = np.random.default_rng(0)
    before = draw.random(400)
    found = paired_means(before, before - 0.01, rows=1234)
    assert found.difference.point == pytest.approx(-0.01)
    assert found.resolves < 1e-9  # every query lost the same
    assert found.baseline.rows == 1234
    # The textbook interval of a mean: 1.96 standard errors to either side.
    half = 1.96 * before.std() / math.sqrt(400)
    assert found.baseline.high - found.baseline.low == pytest.approx(2 * half, rel=0.15)
    again = paired_means(before, draw.random(400), rows=1234)
    assert again.baseline == found.baseline  # the same queries are drawn


@pytest.mark.parametrize(
    ("before", "after", "code", "fields"),
    [
        (np.ones(9), np.ones(9), "units_few", {"least": 10, "got": 9}),
        (np.ones(20), np.ones(19), "values_unpaired", {"baseline": (20,), "candidate": (19,)}),
        (np.ones(20), np.full(20, np.nan), "values_not_finite", {}),
    ],
)
def test_paired_means_of_unusable_values_are_refused(before, after, code, fields):
    with raises_code(MetricRefused, code, **fields):
        paired_means(before, after, rows=20)
