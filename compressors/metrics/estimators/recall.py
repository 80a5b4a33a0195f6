"""Estimators of recall: in lists of rows, and in a ranking of the catalogue for each query."""

import numpy as np

from compressors.metrics import top_k
from compressors.metrics.estimators.lists import DepthEstimator
from compressors.metrics.estimators.top_k import TopKEstimator
from compressors.metrics.full_ranking import RelevantPlaces
from compressors.metrics.point_estimates import Floats
from compressors.metrics.top_k import TieBlocks


class RecallOfRows(TopKEstimator):
    """The share of a list's relevant rows that are among the first ``depth`` ranks."""

    def of_blocks(self, blocks: TieBlocks) -> Floats:
        """Compute the recall of each list."""
        return top_k.recall(blocks, self.depth)


class RecallOfQueries(DepthEstimator):
    """The share of a query's relevant items that are among the first ``depth`` ranks.

    For items of equal score, the result is the mean over all their orders.
    """

    def of_queries(self, places: RelevantPlaces) -> Floats:
        """Compute the recall of each query, float64 ``(queries,)`` in [0, 1]."""
        # Items of one score have the ranks above + 1 to above + equal.
        last_rank = np.minimum(places.above + places.equal, self.depth)
        hits = np.maximum(last_rank - places.above, 0) / places.equal
        value: Floats = places.sums(hits) / places.relevant
        return value
