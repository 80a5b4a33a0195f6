"""Rank the whole catalogue for every query of a retrieval model, and find the relevant items.

``estimators/`` computes recall, NDCG and other metrics from the positions of the relevant items.
Negatives are not sampled: every item of the catalogue is ranked, except the *hidden* items of a
query, with which it had a positive interaction before. Scores are computed for a block of queries
at a time, so memory does not grow with the number of queries.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from compressors.contracts import metric
from compressors.errors.metrics import MetricRefused
from compressors.metrics.point_estimates import Floats
from compressors.metrics.top_k import TieBlocks

Ints = NDArray[np.int64]
Float32s = NDArray[np.float32]

DEPTH = 20
"""By default, metrics count this number of first ranks."""

SCORES_AT_ONCE = 2**24
"""Largest number of scores in memory at once: 64 MiB."""


@dataclass(frozen=True)
class Interactions:
    """Interactions of queries with items: ids and labels, arrays ``(rows,)`` each.

    An interaction is positive if its label is above 0.
    """

    query: ArrayLike
    item: ArrayLike
    label: ArrayLike

    def select_positive(self) -> tuple[Ints, Ints]:
        """Return queries and items of the positive rows."""
        positive = np.asarray(self.label) > 0
        return np.asarray(self.query)[positive], np.asarray(self.item)[positive]


@dataclass(frozen=True)
class RankingQueries:
    """The queries of a ranking, with their relevant and their hidden items.

    A pair of a query and an item is encoded as one number: the query's index in ``query`` times
    ``items``, plus the item's index in the catalogue.

    Attributes:
        query: the ids of the queries, int64 ``(queries,)``, sorted.
        row: the first row of each query in the test data, int64 ``(queries,)``.
        relevant: pairs of queries and relevant items, int64 ``(pairs,)``, sorted.
        hidden: pairs of queries and hidden items, sorted; none of them is in ``relevant``.
        items: number of items of the catalogue.
        gain: the label of each relevant pair, float64 ``(pairs,)``; the largest if several rows
            have the pair.
    """

    query: Ints
    row: Ints
    relevant: Ints
    hidden: Ints
    items: int
    gain: Floats


def ranking_queries(
    test: Interactions, earlier: Iterable[Interactions], catalogue: ArrayLike
) -> RankingQueries:
    """Build the queries of the test rows, with their relevant and hidden items.

    Args:
        test: the test interactions.
        earlier: earlier interactions; the items of positive ones are hidden for the same query. If
            such an item is also in a positive test row, it is hidden and not relevant.
        catalogue: the id of every item, ``(items,)``, each once.

    Returns:
        The queries with at least one relevant item that is not hidden.

    Raises:
        MetricRefused: a test item is not in the catalogue, or no query has a relevant item.
    """
    ids = np.asarray(catalogue)
    test_queries, test_items = test.select_positive()
    queries = np.unique(test_queries)
    relevant = _encode_pairs(test_queries, test_items, queries, ids)
    if relevant.size < np.unique(np.stack([test_queries, test_items]), axis=1).shape[1]:
        raise MetricRefused("items_not_in_catalogue")
    hidden = np.unique(
        np.concatenate(
            [np.empty(0, np.int64)]
            + [_encode_pairs(*part.select_positive(), queries, ids) for part in earlier]
        )
    )
    gain = _find_largest_labels(test, relevant, queries, ids)
    is_new = np.isin(relevant, hidden, assume_unique=True, invert=True)
    relevant, gain = relevant[is_new], gain[is_new]
    if not relevant.size:
        raise MetricRefused("new_items_missing")
    # Renumber without the queries that have no relevant item left.
    remaining = np.unique(relevant // ids.size)
    number = np.full(queries.size, -1)
    number[remaining] = np.arange(remaining.size)

    def renumber(pairs: Ints) -> Ints:
        owner = number[pairs // ids.size]
        remaining_pairs: Ints = (owner * ids.size + pairs % ids.size)[owner >= 0]
        return remaining_pairs

    all_queries, first = np.unique(np.asarray(test.query), return_index=True)
    query = queries[remaining]
    row = first[np.searchsorted(all_queries, query)]
    return RankingQueries(query, row, renumber(relevant), renumber(hidden), ids.size, gain)


class RankedVectors(NamedTuple):
    """A model's vectors, float32 ``(queries, dim)`` and ``(items, dim)``, with the queries."""

    query: Float32s
    item: Float32s
    queries: RankingQueries


@dataclass(frozen=True)
class RelevantRanks:
    """The positions of all relevant items in the rankings of their queries.

    Attributes:
        query: index of the query of each relevant item, int64 ``(pairs,)``.
        above: number of items with a higher score, int64 ``(pairs,)``.
        equal: number of items with the same score, including the item, int64 ``(pairs,)``.
        relevant: number of relevant items of each query, int64 ``(queries,)``.
        depth: number of ranks for which the counts are exact. For an item after these ranks,
            ``above`` is ``depth`` and ``equal`` is 1.
        gain: the label of each relevant item, float64 ``(pairs,)``.
    """

    query: Ints
    above: Ints
    equal: Ints
    relevant: Ints
    depth: int
    gain: Floats

    def sum_ideal_gains(self, discounts: Floats) -> Floats:
        """Sum gains times discounts by query in the best ranking: float64 ``(queries,)``.

        Args:
            discounts: the discount of each rank, best first, float64 ``(depth,)``.
        """
        best = np.lexsort((-self.gain, self.query))  # queries are sorted and stay in place
        first = np.cumsum(self.relevant) - self.relevant  # of each query
        rank = np.arange(self.query.size) - first[self.query]
        padded = np.append(discounts, 0.0)[np.minimum(rank, discounts.size)]
        return self.sum_by_query(self.gain[best] * padded)

    def sum_by_query(self, values: Floats) -> Floats:
        """Sum values of relevant items ``(pairs,)`` by query: float64 ``(queries,)``."""
        total = np.bincount(self.query, weights=values, minlength=self.relevant.size)
        return total.astype(np.float64, copy=False)

    def group_ties(self) -> TieBlocks:
        """Group the relevant items of the first ``depth`` ranks by query and score."""
        counted = self.above < self.depth
        query_and_rank = self.query[counted] * self.depth + self.above[counted]
        first_rank, pair, relevant = np.unique(
            query_and_rank, return_index=True, return_counts=True
        )
        return TieBlocks(
            first_rank // self.depth,
            first_rank % self.depth,
            self.equal[counted][pair],
            relevant.astype(np.int64),
            self.relevant,
        )


def rank_relevant_items(
    query: Float32s, item: Float32s, queries: RankingQueries, depth: int = DEPTH
) -> RelevantRanks:
    """Rank the catalogue for every query, and find the positions of its relevant items.

    Args:
        query: query vectors, float32 ``(queries, dim)``, in the order of ``queries``.
        item: item vectors, float32 ``(items, dim)``, in the order of the catalogue.
        queries: the queries with relevant and hidden pairs.
        depth: number of ranks that count.

    Raises:
        MetricRefused: ``depth`` is below 1, shapes do not match, or a number is not finite.

    Memory: 64 MiB of scores, or the scores of one query if that is more.
    """
    _require_valid_vectors(query, item, queries, depth)
    pairs = queries.relevant.size
    above, equal = np.empty(pairs, dtype=np.int64), np.empty(pairs, dtype=np.int64)
    item_columns = torch.from_numpy(np.ascontiguousarray(item.T))  # (dim, items)
    block_size = max(1, SCORES_AT_ONCE // queries.items)
    for begin in range(0, queries.query.size, block_size):
        end = min(begin + block_size, queries.query.size)
        scores = torch.from_numpy(query[begin:end]) @ item_columns  # (block, items)
        flat = scores.view(-1)
        edges = np.array([begin, end]) * queries.items
        hidden = queries.hidden[slice(*np.searchsorted(queries.hidden, edges))] - edges[0]
        flat[torch.from_numpy(hidden)] = -torch.inf
        block = slice(*np.searchsorted(queries.relevant, edges))
        above[block], equal[block] = _count_above_and_equal(
            scores, queries.relevant[block] - edges[0], depth
        )
    owner = queries.relevant // queries.items
    relevant = np.bincount(owner, minlength=queries.query.size)
    return RelevantRanks(owner, above, equal, relevant, depth, queries.gain)


def ranking_metrics(vectors: RankedVectors, names: Iterable[str]) -> dict[str, Floats]:
    """Compute metrics of a full ranking for every query.

    Args:
        vectors: a model's vectors and queries.
        names: metrics with an estimator of queries, such as ``recall@20``.

    Returns:
        By metric name, the value of each query, float64 ``(queries,)``.

    Raises:
        MetricRefused: a vector is not finite or has another length, or a metric has no such
            estimator.
    """
    declared = [metric(name) for name in names]
    depth = max((item.depth for item in declared if item.depth is not None), default=DEPTH)
    ranks = rank_relevant_items(*vectors, depth)
    values = {}
    for item in declared:
        estimator = item.estimator("queries")
        if estimator is None:
            raise MetricRefused("interval_metric_unknown", metric=item.name)
        values[item.name] = estimator.compute_per_query(ranks)
    return values


def _count_above_and_equal(scores: torch.Tensor, relevant: Ints, k: int) -> tuple[Ints, Ints]:
    """Count, for each relevant item, the items above it and the items of equal score.

    The second number includes the item itself. For an item after rank ``k``, the counts are ``k``
    and 1.
    """
    items = scores.shape[1]
    top = scores.topk(min(k, items), dim=1).values  # (queries, k), best first
    lowest_score = top[:, -1:]  # (queries, 1)
    ties = (scores == lowest_score).sum(dim=1)  # (queries,)
    pair = torch.from_numpy(relevant)
    owner, score = pair // items, scores.view(-1)[pair].unsqueeze(1)  # (pairs, 1)
    best = top[owner]  # (pairs, k)
    above, equal = (best > score).sum(dim=1), (best == score).sum(dim=1)
    # Items of the lowest score among the first ``k`` can also follow rank ``k``.
    has_lowest_score = (score == lowest_score[owner]).squeeze(1)
    equal = torch.where(has_lowest_score, ties[owner], equal)
    beyond = (score < lowest_score[owner]).squeeze(1)
    above, equal = above.masked_fill(beyond, k), equal.masked_fill(beyond, 1)
    return above.numpy(), equal.numpy()


def _encode_pairs(
    interaction_queries: Ints, interaction_items: Ints, queries: Ints, catalogue: Ints
) -> Ints:
    """Encode pairs of a query and an item as single numbers, unique and sorted.

    Pairs whose query or item is unknown are omitted.
    """
    permutation = np.argsort(catalogue)
    item_index = permutation[
        np.searchsorted(catalogue, interaction_items, sorter=permutation).clip(
            max=catalogue.size - 1
        )
    ]
    number = np.searchsorted(queries, interaction_queries).clip(max=queries.size - 1)
    known = (catalogue[item_index] == interaction_items) & (queries[number] == interaction_queries)
    pairs: Ints = np.unique(number[known].astype(np.int64) * catalogue.size + item_index[known])
    return pairs


def _find_largest_labels(test: Interactions, pairs: Ints, queries: Ints, catalogue: Ints) -> Floats:
    """Return the largest label of the test rows of each pair, float64 ``(pairs,)``.

    Args:
        test: the test interactions; all items of positive ones are in the catalogue.
        pairs: the pairs of the positive rows, sorted.
        queries: the ids of the queries of these rows, sorted.
        catalogue: the id of every item.
    """
    labels = np.asarray(test.label, np.float64)
    permutation = np.argsort(catalogue)
    query, item = test.select_positive()
    item_index = permutation[np.searchsorted(catalogue, item, sorter=permutation)]
    pair = np.searchsorted(queries, query) * catalogue.size + item_index
    gain: Floats = np.zeros(pairs.size)
    np.maximum.at(gain, np.searchsorted(pairs, pair), labels[labels > 0])
    return gain


def _require_valid_vectors(
    query: Float32s, item: Float32s, queries: RankingQueries, k: int
) -> None:
    """Raise ``MetricRefused`` if the arguments of ``rank_relevant_items`` are not valid."""
    if k < 1:
        raise MetricRefused("depth_below_one", depth=k)
    shapes: Sequence[tuple[str, Float32s, int]] = (
        ("query", query, queries.query.size),
        ("item", item, queries.items),
    )
    for name, vectors, count in shapes:
        if vectors.ndim != 2 or len(vectors) != count or vectors.shape[1] != item.shape[1]:
            raise MetricRefused("vectors_shape", side=name, expected=count, shape=vectors.shape)
        broken = ~np.isfinite(vectors).all(axis=1)
        if broken.any():
            raise MetricRefused(
                "vectors_not_finite",
                side=name,
                count=int(broken.sum()),
                rows=count,
                first=int(np.flatnonzero(broken)[0]),
            )
