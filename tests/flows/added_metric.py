"""The Brier score, a metric that only tests define and register."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from compressors.contracts import Metric
from compressors.contracts.metrics import FAMILIES, register
from compressors.contracts.metrics.families import find_metric
from compressors.contracts.metrics.metric import single_metric
from compressors.metrics.cluster_intervals import GroupedPair, Groups, mean_of_rows, pair_groups
from compressors.metrics.estimators.protocols import ScoredRows, require_groups
from compressors.metrics.intervals import PairedRows, RowStatistics, mean_statistic
from compressors.metrics.point_estimates import number_groups


def squared_errors(label, probability) -> np.ndarray:
    """Return the squared error of each row, float64 ``(rows,)``."""
    return (np.asarray(probability, np.float64) - np.asarray(label, np.float64)) ** 2


@dataclass(frozen=True)
class Brier:
    """Mean squared error of probabilities (Brier 1950): the estimator of the metric.

    A ``PairedRows`` has the scores of two models on the same rows: of the baseline, which is the
    uncompressed model (``before``), and of the candidate (``after``). Intervals are computed by a
    bootstrap of rows or, if the rows have groups, by a jackknife that leaves out one group.
    """

    metric: Metric

    def compute(self, rows: ScoredRows) -> float:
        return float(squared_errors(rows.label, rows.score).mean())

    def bootstrap_rows(self, pair: PairedRows) -> RowStatistics:
        before, after = (squared_errors(pair.label, score) for score in pair.scores)
        return RowStatistics(before.size, mean_statistic(before), mean_statistic(after))

    def jackknife_groups(self, pair: PairedRows) -> GroupedPair:
        group = require_groups(self.metric, pair.group)
        groups = Groups(*number_groups(group, np.size(pair.label)))
        before, after = (
            mean_of_rows(squared_errors(pair.label, score), groups) for score in pair.scores
        )
        # All groups determine the precision of the interval, not only groups of one kind, which
        # ``group_description`` would describe in the message about too few groups.
        return pair_groups(
            before, after, self.metric.high, counted_groups=groups.rows.size, group_description=""
        )


BRIER = Metric(
    name="brier",
    kind="quality",
    label="Brier score",
    labels=("clicks",),  # labels are 0 or 1
    evaluations=("rows",),  # one score per row; not a ranking of the catalogue
    higher_is_better=False,
    compared="difference",  # candidate minus baseline
    # A limit that allows this loss or more is refused. A constant prediction of 0.5 has 0.25.
    loosest_bound=0.2,
    low=0.0,  # smallest and largest possible value
    high=1.0,
    estimators={"rows": Brier},
)


@contextmanager
def registered_metric() -> Iterator[None]:
    """Register the metric within the context."""
    register(single_metric(BRIER))
    try:
        yield
    finally:
        del FAMILIES[BRIER.name]
        find_metric.cache_clear()
