"""Estimators of NDCG: of lists of rows, and of a ranking of the catalogue for each query."""

import numpy as np
from numpy.typing import ArrayLike

from compressors.metrics.estimators.lists import DepthEstimator, ListEstimator
from compressors.metrics.full_ranking import RelevantPlaces
from compressors.metrics.point_estimates import Floats, group_ndcg


class NdcgOfRows(ListEstimator):
    """Mean NDCG of the lists that the rows form; see ``point_estimates.ndcg``."""

    def of_lists(self, label: ArrayLike, score: ArrayLike, group: ArrayLike) -> Floats:
        """Compute the NDCG of each list with a relevant row, float64 ``(lists,)`` in [0, 1]."""
        return group_ndcg(label, score, group, self.depth)


class NdcgOfQueries(DepthEstimator):
    """NDCG of a ranking of the catalogue, with gains of 1.

    Source: see ``point_estimates.ndcg``. Items of equal score share the gains of their ranks.
    """

    def of_queries(self, places: RelevantPlaces) -> Floats:
        """Compute the NDCG of each query, float64 ``(queries,)`` in [0, 1]."""
        # Entry n is the sum of the discounts of the first n ranks.
        discounts = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(self.depth) + 2))])
        # Items of one score have the ranks above + 1 to above + equal; ranks after depth count 0.
        rank_before = np.minimum(places.above, self.depth)
        last_rank = np.minimum(places.above + places.equal, self.depth)
        gains = (discounts[last_rank] - discounts[rank_before]) / places.equal
        value: Floats = places.sums(gains) / discounts[np.minimum(places.relevant, self.depth)]
        return value
