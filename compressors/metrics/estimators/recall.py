"""Estimator of recall in a ranking of the catalogue for each query."""

from dataclasses import dataclass

import numpy as np

from compressors.contracts import Metric
from compressors.metrics.full_ranking import RelevantPlaces
from compressors.metrics.point_estimates import Floats


@dataclass(frozen=True)
class Recall:
    """The share of a query's relevant items that are among the first ``depth`` ranks.

    For items of equal score, the result is the mean over all their orders.
    """

    metric: Metric

    def of_queries(self, places: RelevantPlaces) -> Floats:
        """Compute the recall of each query, float64 ``(queries,)`` in [0, 1]."""
        # Items of one score have the ranks above + 1 to above + equal.
        last_rank = np.minimum(places.above + places.equal, self.metric.depth or places.depth)
        hits = np.maximum(last_rank - places.above, 0) / places.equal
        value: Floats = places.sums(hits) / places.relevant
        return value
