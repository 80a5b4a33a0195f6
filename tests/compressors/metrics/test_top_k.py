"""MRR, MAP, hits, recall and precision compared with trec_eval and, with ties, with all orders.

*trec_eval* is the program of the TREC conferences that computes metrics of search;
``pytrec_eval`` runs its C code. A tie block is the rows of a list with equal scores.
"""

import itertools
import math

import numpy as np
import pytest
import pytrec_eval
from error_codes import raises_code
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from compressors.contracts import metric as metric_named
from compressors.errors.metrics import MetricRefused
from compressors.metrics import point_estimates, top_k
from compressors.metrics.estimators.protocols import ScoredRows
from compressors.metrics.full_ranking import (
    Interactions,
    RankedVectors,
    ranking_metrics,
    ranking_queries,
)
from compressors.metrics.top_k import TieBlocks, tie_blocks_of_rows

# Sums of at most a few hundred float64 terms below 1 differ by less than this.
EXACT = 1e-12

FUNCTIONS = {
    "mrr": top_k.reciprocal_rank,
    "map": top_k.average_precision,
    "hit": top_k.hit,
    "recall": top_k.recall,
    "precision": top_k.precision,
}
TREC_NAMES = {"map": "map_cut", "hit": "success", "recall": "recall", "precision": "P"}
DEPTHS = (1, 2, 5, 10, 100)


def metrics_of_ranking(relevant, total, k):
    """All metrics of one ranking, from the definitions.

    ``relevant`` says of each rank whether its item is relevant; ``total`` is the number of all
    relevant items.
    """
    ranks = [rank for rank, is_relevant in enumerate(relevant[:k], start=1) if is_relevant]
    precisions = [count / rank for count, rank in enumerate(ranks, start=1)]
    return {
        "mrr": 1 / ranks[0] if ranks else 0.0,
        "map": sum(precisions) / total,
        "hit": float(bool(ranks)),
        "recall": len(ranks) / total,
        "precision": len(ranks) / k,
    }


def mean_over_orders_of_ties(relevant, scores, k):
    """Return all metrics of one list: their means over all orders of rows with equal scores."""
    relevant, scores = np.asarray(relevant), np.asarray(scores)
    tied = [np.flatnonzero(scores == score) for score in sorted(set(scores.tolist()))[::-1]]
    values = [
        metrics_of_ranking(relevant[np.concatenate(orders)].tolist(), relevant.sum(), k)
        for orders in itertools.product(*(list(itertools.permutations(rows)) for rows in tied))
    ]
    return {name: np.mean([value[name] for value in values]) for name in FUNCTIONS}


def lists_without_ties(lists=60, seed=0):
    """Graded labels, different scores, and list names of rows in random order.

    Lists have 1 to 40 rows. Some have no relevant row, and some more than 10.
    """
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(lists), rng.integers(1, 41, lists)))
    share = rng.random(lists) ** 2
    label = rng.integers(1, 5, group.size) * (rng.random(group.size) < share[group])
    # Integers, because trec_eval reads scores as 32-bit floats.
    return label, rng.permutation(group.size).astype(float), group


def trec_values(label, score, group, measures, ranks=None):
    """Return trec_eval's values of the lists with a relevant row, by list and name.

    ``ranks`` is the number of rows of each list that trec_eval receives; None for all.
    """
    judged, ranked = {}, {}
    for name in np.unique(group[label > 0]).tolist():
        rows = np.flatnonzero(group == name)
        judged[str(name)] = {str(row): int(label[row]) for row in rows}
        best = rows[np.argsort(-score[rows])][:ranks]
        ranked[str(name)] = {str(row): float(score[row]) for row in best}
    values = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(ranked)
    return [values[name] for name in judged]


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_rows_without_ties_equal_trec_eval(seed):
    label, score, group = lists_without_ties(seed=seed)
    blocks = tie_blocks_of_rows(label, score, group)
    assert 0 < (blocks.relevant_of_list > 10).sum() < blocks.relevant_of_list.size < 60
    cuts = ",".join(map(str, DEPTHS))
    expected = trec_values(label, score, group, {f"{name}.{cuts}" for name in TREC_NAMES.values()})
    for k in DEPTHS:
        for name, trec_name in TREC_NAMES.items():
            np.testing.assert_allclose(
                FUNCTIONS[name](blocks, k),
                [value[f"{trec_name}_{k}"] for value in expected],
                atol=EXACT,
                err_msg=f"{name}@{k}",
            )
        # trec_eval's reciprocal rank has no depth, so it receives only the first ranks.
        first_ranks = trec_values(label, score, group, {"recip_rank"}, ranks=k)
        np.testing.assert_allclose(
            top_k.reciprocal_rank(blocks, k),
            [value["recip_rank"] for value in first_ranks],
            atol=EXACT,
        )


@pytest.mark.parametrize("k", DEPTHS)
def test_ndcg_of_rows_without_ties_equals_trec_eval(k):
    label, score, group = lists_without_ties()
    # The gains of trec_eval are the labels, ours are 2**label - 1.
    expected = trec_values(2**label - 1, score, group, {f"ndcg_cut.{k}"})
    np.testing.assert_allclose(
        point_estimates.group_ndcg(label, score, group, k),
        [value[f"ndcg_cut_{k}"] for value in expected],
        atol=EXACT,
    )


def test_metrics_of_a_full_ranking_without_ties_equal_trec_eval():
    rng, users, items = np.random.default_rng(0), 30, 200
    query, item = rng.normal(size=(users, 8)), rng.normal(size=(items, 8))
    query, item = query.astype(np.float32), item.astype(np.float32)
    is_relevant = rng.random((users, items)) < 0.08
    is_relevant[:, 0] = True
    user, clicked = np.nonzero(is_relevant)
    queries = ranking_queries(Interactions(user, clicked, np.ones(user.size)), [], np.arange(items))
    names = [f"{name}@{k}" for name in FUNCTIONS for k in DEPTHS]
    values = ranking_metrics(RankedVectors(query, item, queries), names)
    score = np.argsort(np.argsort((query @ item.T), axis=1), axis=1)  # ranks: no ties
    columns = is_relevant.astype(int).ravel(), score.ravel(), np.repeat(np.arange(users), items)
    for k in DEPTHS:
        measures = {f"{name}.{k}" for name in TREC_NAMES.values()} | {"recip_rank"}
        expected = trec_values(*columns, measures, ranks=k)
        for name, trec_name in {**TREC_NAMES, "mrr": "recip_rank"}.items():
            key = trec_name if name == "mrr" else f"{trec_name}_{k}"
            np.testing.assert_allclose(
                values[f"{name}@{k}"], [value[key] for value in expected], atol=EXACT
            )


@pytest.mark.parametrize("k", DEPTHS)
def test_graded_ndcg_of_a_full_ranking_without_ties_equals_trec_eval(k):
    """Gains are the labels, also of a pair that several rows have: its largest label counts."""
    rng, users, items = np.random.default_rng(1), 20, 60
    query, item = rng.normal(size=(users, 8)), rng.normal(size=(items, 8))
    query, item = query.astype(np.float32), item.astype(np.float32)
    label = rng.integers(1, 4, (users, items)) * (rng.random((users, items)) < 0.3)
    label[:, 0] = 2
    user, judged = np.nonzero(label)
    repeated_pairs = np.concatenate([user, user]), np.concatenate([judged, judged])
    grades = np.concatenate([np.ones(user.size), label[user, judged]])  # 1, then the label
    queries = ranking_queries(Interactions(*repeated_pairs, grades), [], np.arange(items))
    value = ranking_metrics(RankedVectors(query, item, queries), [f"ndcg@{k}"])[f"ndcg@{k}"]
    score = np.argsort(np.argsort(query @ item.T, axis=1), axis=1)  # ranks: no ties
    columns = label.ravel(), score.ravel(), np.repeat(np.arange(users), items)
    expected = trec_values(*columns, {f"ndcg_cut.{k}"})
    np.testing.assert_allclose(value, [row[f"ndcg_cut_{k}"] for row in expected], atol=EXACT)


@st.composite
def tied_lists(draw):
    """Up to three lists of at most six rows each, with few distinct scores."""
    rows = draw(st.integers(1, 12))
    column = lambda values: np.array(draw(st.lists(values, min_size=rows, max_size=rows)))  # noqa: E731
    group = column(st.integers(0, 2))
    assume(np.bincount(group).max() <= 6)
    return column(st.integers(0, 3)), column(st.sampled_from([-1.0, -0.0, 0.0, 0.5])), group


ALL_TIED = np.array([0, 1, 0, 2, 1, 0]), np.zeros(6), np.zeros(6, int)


@given(tied_lists(), st.integers(1, 8))
@example(ALL_TIED, 3)
@example(ALL_TIED, 6)
def test_with_ties_each_metric_is_the_mean_over_all_orders_of_tied_rows(data, k):
    label, score, group = data
    expected = [
        mean_over_orders_of_ties(label[group == name] > 0, score[group == name], k)
        for name in np.unique(group[label > 0])
    ]
    blocks = tie_blocks_of_rows(label, score, group)
    for name, function in FUNCTIONS.items():
        np.testing.assert_allclose(
            function(blocks, k), [value[name] for value in expected], atol=EXACT, err_msg=name
        )


@given(tied_lists(), st.integers(1, 8))
def test_every_estimator_returns_the_mean_over_lists_with_a_relevant_row(data, k):
    label, score, group = data
    blocks = tie_blocks_of_rows(label, score, group)
    for name, function in FUNCTIONS.items():
        estimator = metric_named(f"{name}@{k}").estimator("rows")
        if label.any():
            point = estimator.compute(ScoredRows(label, score, group))
            assert point == pytest.approx(function(blocks, k).mean(), abs=EXACT)
        else:
            with raises_code(MetricRefused, "relevant_items_missing"):
                estimator.compute(ScoredRows(label, score, group))


@given(tied_lists(), st.integers(1, 8), st.randoms(use_true_random=False))
def test_metrics_are_in_their_range_and_do_not_depend_on_the_order_of_rows(data, k, rng):
    order = list(range(data[0].size))
    rng.shuffle(order)
    blocks = tie_blocks_of_rows(*data)
    shuffled = tie_blocks_of_rows(*(column[order] for column in data))
    for name, function in FUNCTIONS.items():
        values = function(blocks, k)
        assert ((values >= 0) & (values <= 1)).all(), name
        assert (function(shuffled, k) == values).all(), name


@given(st.data())
def test_metrics_of_a_full_ranking_with_ties_are_means_over_all_orders(data):
    """Vectors are small integers, so that scores are exact and often equal."""
    items, users = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 4))
    number = st.integers(-1, 1)
    vectors = lambda size: np.float32(  # noqa: E731
        data.draw(st.lists(st.tuples(number, number), min_size=size, max_size=size))
    )
    query, item = vectors(users), vectors(items)
    is_relevant = np.array(
        data.draw(st.lists(st.booleans(), min_size=users * items, max_size=users * items))
    ).reshape(users, items)
    assume(is_relevant.any())
    user, clicked = np.nonzero(is_relevant)
    queries = ranking_queries(Interactions(user, clicked, np.ones(user.size)), [], np.arange(items))
    k, other_k = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    # The catalogue is ranked once, to the largest depth of all metrics.
    names = [f"{name}@{k}" for name in FUNCTIONS] + [f"ndcg@{other_k}"]
    values = ranking_metrics(RankedVectors(query[queries.query], item, queries), names)
    for index, name in enumerate(queries.query):
        expected = mean_over_orders_of_ties(is_relevant[name], item @ query[name], k)
        for metric, value in expected.items():
            assert values[f"{metric}@{k}"][index] == pytest.approx(value, abs=EXACT), metric


def one_block(size, relevant, above=0):
    """Return a list with one block of tied items, after ``above`` irrelevant items."""
    # List of the block, items above it, its items, its relevant items, and those of the list.
    columns = ([0], [above], [size], [relevant], [relevant])
    return TieBlocks(*(np.array(column, np.int64) for column in columns))


@pytest.mark.parametrize(
    ("size", "relevant"), [(10_000, 1), (10_000, 9_999), (10_000, 300), (50, 50), (1, 1)]
)
@pytest.mark.parametrize("k", [1, 20, 5_000, 10_000])
def test_equal_scores_of_all_items_have_the_metrics_of_a_random_ranking(size, relevant, k):
    blocks = one_block(size, relevant)
    count = min(k, size)
    # The first relevant item is at rank i if i - 1 drawn items are irrelevant and the next is not.
    ranks = np.arange(1, count + 1)
    none_before = hypergeom.pmf(0, size, relevant, ranks - 1)
    at_rank = none_before * relevant / (size - ranks + 1)
    others = (relevant - 1) / max(size - 1, 1)
    precisions = [(1 + (rank - 1) * others) / rank for rank in ranks]
    expected = {
        "mrr": math.fsum(at_rank / ranks),
        "map": relevant / size * math.fsum(precisions) / relevant,
        "hit": 1 - hypergeom.pmf(0, size, relevant, count),
        "recall": count / size,
        "precision": relevant * count / size / k,
    }
    for name, function in FUNCTIONS.items():
        # scipy computes binomial coefficients from logarithms.
        assert function(blocks, k)[0] == pytest.approx(expected[name], abs=1e-9), name


def test_map_is_divided_by_all_relevant_items_as_in_trec_eval():
    """With the other convention, division by at most k, this best ranking would have a MAP of 1."""
    blocks = tie_blocks_of_rows([1, 2, 1, 1, 0], [5, 4, 3, 2, 1], np.zeros(5))
    assert top_k.average_precision(blocks, 2).tolist() == [0.5]
    assert top_k.average_precision(blocks, 4)[0] == pytest.approx(1, abs=EXACT)


def test_precision_of_a_list_shorter_than_k_is_divided_by_k():
    blocks = tie_blocks_of_rows([1, 0], [2, 1], [3, 3])
    assert top_k.precision(blocks, 4).tolist() == [0.25]


def test_block_that_crosses_rank_k_counts_the_probability_of_a_relevant_item():
    """Ranks 2 to 4 are tied and one of their items is relevant; k is 2."""
    blocks = tie_blocks_of_rows([0, 0, 1, 0], [9, 5, 5, 5], np.zeros(4))
    values = {name: function(blocks, 2)[0] for name, function in FUNCTIONS.items()}
    third = pytest.approx(1 / 3)
    sixth = pytest.approx(1 / 6)
    assert values == {"mrr": sixth, "map": sixth, "hit": third, "recall": third, "precision": sixth}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_depth_zero_is_refused(name):
    with raises_code(MetricRefused, "depth_below_one", depth=0):
        FUNCTIONS[name](one_block(3, 1), 0)


@pytest.mark.parametrize(
    ("columns", "code"),
    [
        (([0, -1], [0.1, 0.2], [1, 1]), "grades_outside"),
        (([0, 31], [0.1, 0.2], [1, 1]), "grades_outside"),  # the largest allowed grade is 30
        (([0, 1], [0.1, np.nan], [1, 1]), "column_not_finite"),
        (([0, 1], [0.1, 0.2], [1]), "lengths_differ"),
        (([0, 1], [0.1, 0.2], [1, np.nan]), "group_not_finite"),
    ],
)
def test_invalid_rows_are_refused(columns, code):
    with raises_code(MetricRefused, code):
        tie_blocks_of_rows(*columns)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_without_a_group_are_refused(name):
    estimator = metric_named(f"{name}@3").estimator("rows")
    with raises_code(MetricRefused, "metric_needs_groups", metric=f"{name}@3"):
        estimator.compute(ScoredRows([0, 1], [0.1, 0.2]))
