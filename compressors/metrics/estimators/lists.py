"""Base classes of estimators of metrics of the first ranks of a list of rows or of a ranking."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from compressors.contracts import Metric
from compressors.errors.metrics import MetricRefused
from compressors.metrics.cluster_intervals import GroupedPair, pair_groups, weighted_mean
from compressors.metrics.estimators.protocols import ScoredRows, require_groups
from compressors.metrics.intervals import PairedRows
from compressors.metrics.point_estimates import Floats


@dataclass(frozen=True)
class DepthEstimator:
    """A metric of the first ``depth`` ranks."""

    metric: Metric

    @property
    def depth(self) -> int:
        """The number of ranks that count."""
        if self.metric.depth is None:
            raise ValueError(f"{self.metric.name} has no depth")
        return self.metric.depth


class ListEstimator(DepthEstimator, ABC):
    """A metric that is the mean over the lists with a relevant row; all have the same weight."""

    @abstractmethod
    def compute_per_list(self, label: ArrayLike, score: ArrayLike, group: ArrayLike) -> Floats:
        """Compute the metric of each list with a relevant row, float64 ``(lists,)``.

        Args:
            label: relevance of each row, ``(rows,)``.
            score: score of each row, ``(rows,)``.
            group: the list that each row belongs to, ``(rows,)``.
        """

    def compute(self, rows: ScoredRows) -> float:
        """Compute the mean over lists with a relevant row."""
        group = require_groups(self.metric, rows.group)
        return float(_require_values(self.compute_per_list(rows.label, rows.score, group)).mean())

    def jackknife_groups(self, pair: PairedRows) -> GroupedPair:
        """Compute the means of baseline and candidate, also with each list left out."""
        group = require_groups(self.metric, pair.group)
        values = [
            _require_values(self.compute_per_list(pair.label, score, group))
            for score in pair.scores
        ]
        before, after = (weighted_mean(value, np.ones(value.size)) for value in values)
        return pair_groups(before, after, self.metric.high, values[0].size, "with a relevant item")


def _require_values(values: Floats) -> Floats:
    """Return values of lists ``(lists,)``; raise ``MetricRefused`` if there is none."""
    if not values.size:
        raise MetricRefused("relevant_items_missing")
    return values
