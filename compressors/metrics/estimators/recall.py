"""The estimator of recall in a ranking of the catalogue for each query.

Recall of lists of rows is in ``top_k.py``.
"""

import numpy as np

from compressors.metrics.estimators.lists import DepthEstimator
from compressors.metrics.full_ranking import RelevantRanks
from compressors.metrics.point_estimates import Floats


class RecallOfQueries(DepthEstimator):
    """The share of a query's relevant items that are among the first ``depth`` ranks.

    For items of equal score, the result is the mean over all their orders.
    """

    def compute_per_query(self, ranks: RelevantRanks) -> Floats:
        """Compute the recall of each query, float64 ``(queries,)`` in [0, 1]."""
        # Items of one score have the ranks above + 1 to above + equal.
        last_rank = np.minimum(ranks.above + ranks.equal, self.depth)
        hits = np.maximum(last_rank - ranks.above, 0) / ranks.equal
        value: Floats = ranks.sum_by_query(hits) / ranks.relevant
        return value
