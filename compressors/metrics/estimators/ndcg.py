"""Estimators of NDCG: of lists of rows, and of a ranking of the catalogue for each query."""

import numpy as np
from numpy.typing import ArrayLike

from compressors.metrics.estimators.lists import DepthEstimator, ListEstimator
from compressors.metrics.full_ranking import RelevantRanks
from compressors.metrics.point_estimates import Floats, group_ndcg


class NdcgOfRows(ListEstimator):
    """Mean NDCG of the lists that the rows form; see ``point_estimates.ndcg``."""

    def compute_per_list(self, label: ArrayLike, score: ArrayLike, group: ArrayLike) -> Floats:
        """Compute the NDCG of each list with a relevant row, float64 ``(lists,)`` in [0, 1]."""
        return group_ndcg(label, score, group, self.depth)


class NdcgOfQueries(DepthEstimator):
    """NDCG of a ranking of the catalogue, as trec_eval and BEIR compute it: gains are the labels.

    Source: Järvelin and Kekäläinen 2002, https://doi.org/10.1145/582415.582418, with the discount
    ``1 / log2(rank + 1)`` from rank 1. Items of equal score share the discounts of their ranks.
    """

    def compute_per_query(self, ranks: RelevantRanks) -> Floats:
        """Compute the NDCG of each query, float64 ``(queries,)`` in [0, 1]."""
        of_rank = 1 / np.log2(np.arange(self.depth) + 2)
        # Entry n is the sum of the discounts of the first n ranks.
        discounts = np.concatenate([[0.0], np.cumsum(of_rank)])
        # Items of one score have the ranks above + 1 to above + equal; ranks after depth count 0.
        rank_before = np.minimum(ranks.above, self.depth)
        last_rank = np.minimum(ranks.above + ranks.equal, self.depth)
        discount = (discounts[last_rank] - discounts[rank_before]) / ranks.equal
        value: Floats = ranks.sum_by_query(ranks.gain * discount) / ranks.sum_ideal_gains(of_rank)
        return value
