"""The protocols of estimators of quality metrics, and the data that they receive."""

from typing import NamedTuple, Protocol

from numpy.typing import ArrayLike

from compressors.contracts import Metric
from compressors.errors.metrics import MetricRefused
from compressors.metrics.cluster_intervals import GroupedPair
from compressors.metrics.full_ranking import RelevantRanks
from compressors.metrics.intervals import PairedRows, RowStatistics
from compressors.metrics.point_estimates import Floats


class ScoredRows(NamedTuple):
    """Rows with the scores of one model, arrays ``(rows,)``; for log loss, probabilities."""

    label: ArrayLike
    score: ArrayLike
    group: ArrayLike | None = None


class RowEstimator(Protocol):
    """Computes a metric of models with one score for each row.

    The constructor's argument is the declaration of the metric, a ``Metric``.
    """

    def compute(self, rows: ScoredRows) -> float:
        """Compute the metric of one model, without an interval.

        Raises:
            MetricRefused: the metric is undefined for these rows.
        """

    def jackknife_groups(self, pair: PairedRows) -> GroupedPair:
        """Compute leave-one-group-out values of baseline and candidate for a jackknife.

        These are the metric of all rows and, for each group, the metric without the group's rows.

        Raises:
            MetricRefused: the metric is undefined for these rows.
        """


class UngroupedEstimator(RowEstimator, Protocol):
    """Computes a metric that is also defined for rows without groups.

    Its interval without groups is computed by a bootstrap of rows.
    """

    def bootstrap_rows(self, pair: PairedRows) -> RowStatistics:
        """Return both models' metrics as functions of how often a bootstrap sample has each row.

        Raises:
            MetricRefused: the metric is undefined for these rows.
        """


class QueryEstimator(Protocol):
    """Computes a metric of retrieval models, which rank the whole catalogue for each query."""

    def compute_per_query(self, ranks: RelevantRanks) -> Floats:
        """Compute the metric of each query, float64 ``(queries,)``, from its relevant items."""


def require_groups(metric: Metric, group: ArrayLike | None) -> ArrayLike:
    """Return the groups of the rows, or raise if there are none.

    Raises:
        MetricRefused: there are no groups, but the metric needs them.
    """
    if group is None:
        raise MetricRefused("metric_needs_groups", metric=metric.name)
    return group
