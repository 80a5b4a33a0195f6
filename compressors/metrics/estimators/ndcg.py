"""Estimators of NDCG: of lists of rows, and of a ranking of the catalogue for each query."""

from dataclasses import dataclass

import numpy as np

from compressors.contracts import Metric
from compressors.errors.metrics import MetricRefused
from compressors.metrics.cluster_intervals import GroupedPair, grouped_pair, weighted_mean
from compressors.metrics.estimators.protocols import ScoredRows, require_groups
from compressors.metrics.full_ranking import RelevantPlaces
from compressors.metrics.intervals import PairedRows
from compressors.metrics.point_estimates import Floats, group_ndcg, ndcg


@dataclass(frozen=True)
class NdcgOfRows:
    """Mean NDCG of the lists that the rows form; see ``point_estimates.ndcg``."""

    metric: Metric

    def point(self, rows: ScoredRows) -> float:
        """Compute the mean over groups with a relevant item."""
        group = require_groups(self.metric, rows.group)
        return ndcg(rows.label, rows.score, group, k=_depth(self.metric))

    def of_groups(self, pair: PairedRows) -> GroupedPair:
        """Compute both means with and without each group; all groups have the same weight."""
        group, depth = require_groups(self.metric, pair.group), _depth(self.metric)
        gains = [group_ndcg(pair.label, score, group, depth) for score in pair.scores]
        if not gains[0].size:
            raise MetricRefused("relevant_items_missing")
        before, after = (weighted_mean(value, np.ones(value.size)) for value in gains)
        return grouped_pair(before, after, self.metric.high, gains[0].size, "with a relevant item")


@dataclass(frozen=True)
class NdcgOfQueries:
    """NDCG of a ranking of the catalogue, with gains of 1.

    Source: see ``point_estimates.ndcg``. Items of equal score share the gains of their ranks.
    """

    metric: Metric

    def of_queries(self, places: RelevantPlaces) -> Floats:
        """Compute the NDCG of each query, float64 ``(queries,)`` in [0, 1]."""
        depth = _depth(self.metric)
        # Entry n is the sum of the discounts of the first n ranks.
        discounts = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(depth) + 2))])
        # Items of one score have the ranks above + 1 to above + equal; ranks after depth count 0.
        rank_before = np.minimum(places.above, depth)
        last_rank = np.minimum(places.above + places.equal, depth)
        gains = (discounts[last_rank] - discounts[rank_before]) / places.equal
        value: Floats = places.sums(gains) / discounts[np.minimum(places.relevant, depth)]
        return value


def _depth(metric: Metric) -> int:
    """Return the number of first ranks that count, such as 10 for ``ndcg@10``."""
    if metric.depth is None:
        raise ValueError(f"{metric.name} has no depth")
    return metric.depth
