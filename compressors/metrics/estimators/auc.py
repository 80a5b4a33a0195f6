"""Estimators of AUC: of all rows, and within groups."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from compressors.contracts import Metric
from compressors.errors.metrics import MetricRefused
from compressors.metrics.cluster_intervals import (
    GroupedPair,
    GroupedValue,
    Groups,
    pair_groups,
    ratio,
    weighted_mean,
)
from compressors.metrics.estimators.protocols import ScoredRows, require_groups
from compressors.metrics.intervals import (
    Counts,
    PairedRows,
    RowStatistics,
    Statistic,
    require_rows_of_both_classes,
)
from compressors.metrics.point_estimates import (
    Bools,
    auc,
    check_labels_and_scores,
    gauc,
    group_auc,
    number_groups,
    require_both_classes,
    to_booleans,
    wins_within_groups,
)


@dataclass(frozen=True)
class Auc:
    """Area under the ROC curve of all rows; see ``point_estimates.auc``."""

    metric: Metric

    def compute(self, rows: ScoredRows) -> float:
        """Compute the AUC of all rows."""
        return auc(rows.label, rows.score)

    def bootstrap_rows(self, pair: PairedRows) -> RowStatistics:
        """Return the AUCs of baseline and candidate as functions of bootstrap counts of rows."""
        positive, before = check_labels_and_scores(pair.label, pair.baseline)
        _, after = check_labels_and_scores(pair.label, pair.candidate)
        require_rows_of_both_classes(positive)
        # The order of rows does not affect the bootstrap. In the order of scores, the counts are
        # read almost sequentially, also for the candidate, whose order is nearly the same.
        permutation = np.lexsort((before, positive))
        positive, before, after = positive[permutation], before[permutation], after[permutation]
        return RowStatistics(
            positive.size, auc_statistic(positive, before), auc_statistic(positive, after)
        )

    def jackknife_groups(self, pair: PairedRows) -> GroupedPair:
        """Compute the AUCs of baseline and candidate, also with each group left out (jackknife)."""
        classes = groups_of_both_classes(self.metric, pair)
        before, after = (
            _compute_without_each_group(pair.label, score, classes.groups) for score in pair.scores
        )
        return pair_groups(
            before,
            after,
            self.metric.high,
            classes.counted_groups,
            classes.group_description,
            classes.groups.rows.size,
        )


@dataclass(frozen=True)
class GroupAuc:
    """Mean AUC of groups, weighted by their number of rows; see ``point_estimates.gauc``."""

    metric: Metric

    def compute(self, rows: ScoredRows) -> float:
        """Compute the weighted mean over groups that have rows of both classes."""
        return gauc(rows.label, rows.score, require_groups(self.metric, rows.group))

    def jackknife_groups(self, pair: PairedRows) -> GroupedPair:
        """Compute the means of baseline and candidate, also with each group left out."""
        group = require_groups(self.metric, pair.group)
        # Of both models: AUC and number of rows of each group with both classes.
        values = [group_auc(pair.label, score, group) for score in pair.scores]
        if not values[0][0].size:
            raise MetricRefused("groups_of_one_class")
        weight = values[0][1].astype(np.float64)
        before, after = (weighted_mean(value, weight) for value, _ in values)
        return pair_groups(before, after, self.metric.high, weight.size, "with both classes")


class BothClasses(NamedTuple):
    """Rows of both classes that belong to groups.

    Attributes:
        positive: whether each row is positive, bool ``(rows,)``.
        groups: the groups of the rows.
        counted_groups: the number of groups with a positive row, or of groups with a negative row
            if that is smaller. It determines the precision of the interval.
        group_description: describes these groups, such as "with a positive row".
    """

    positive: Bools
    groups: Groups
    counted_groups: int
    group_description: str


def groups_of_both_classes(metric: Metric, pair: PairedRows) -> BothClasses:
    """Number the groups of rows, and count the groups with rows of each class.

    Raises:
        MetricRefused: all labels are of one class.
    """
    positive = to_booleans(pair.label)
    groups = Groups(*number_groups(require_groups(metric, pair.group), positive.size))
    require_both_classes(metric.name, positive)
    positives = groups.sum_by_group(positive)
    with_positive, with_negative = int((positives > 0).sum()), int((positives < groups.rows).sum())
    counted_groups = min(with_positive, with_negative)
    rarer_class = "positive" if counted_groups == with_positive else "negative"
    return BothClasses(positive, groups, counted_groups, f"with a {rarer_class} row")


def auc_statistic(label: ArrayLike, score: ArrayLike) -> Statistic:
    """Return the AUC as a function of how often a resample contains each row.

    Rows are sorted once, and a call takes O(rows). A positive is ordered correctly with the
    resampled negatives of lower score. The mean of two cumulative counts, of negatives below and of
    negatives not above, counts ties as half. All sums are integers, so the result equals
    ``point_estimates.auc`` of the resample.
    """
    positive, scores = check_labels_and_scores(label, score)
    require_both_classes("auc", positive)
    positives, negatives = np.flatnonzero(positive), np.flatnonzero(~positive)
    positives = positives[np.argsort(scores[positives], kind="stable")]
    negatives = negatives[np.argsort(scores[negatives], kind="stable")]
    below = np.searchsorted(scores[negatives], scores[positives], side="left")
    not_above = np.searchsorted(scores[negatives], scores[positives], side="right")
    preceding = np.zeros(negatives.size + 1, dtype=np.intp)  # resampled negatives before each one

    def statistic(counts: Counts) -> float:
        np.cumsum(counts[negatives], out=preceding[1:])
        positive_counts = counts[positives]
        pairs = 2.0 * float(positive_counts.sum()) * float(preceding[-1])
        if pairs == 0:
            return math.nan
        return float(positive_counts @ (preceding[below] + preceding[not_above])) / pairs

    return statistic


def _compute_without_each_group(label: ArrayLike, score: ArrayLike, groups: Groups) -> GroupedValue:
    """Compute the AUC, and the AUC without the pairs of each group's rows (jackknife).

    The result also has the influence of each row: the derivative of the AUC with respect to the
    row's weight, times the number of rows.
    """
    positive, scores = check_labels_and_scores(label, score)
    # For each row, the number of rows of the other class with which it is ordered correctly.
    wins = np.empty(scores.size)
    negative_scores, positive_scores = np.sort(scores[~positive]), np.sort(scores[positive])
    for class_rows, others, sign in (
        (positive, negative_scores, 1),  # 1: a row wins against lower scores; -1: against higher
        (~positive, positive_scores, -1),
    ):
        class_scores = scores[class_rows]
        # Sorted queries read the other class sequentially instead of at random.
        permutation = np.argsort(class_scores, kind="stable")
        below = np.searchsorted(others, class_scores[permutation], side="left")
        not_above = np.searchsorted(others, class_scores[permutation], side="right")
        lower = (below + not_above) / 2
        class_wins = np.empty(class_scores.size)
        class_wins[permutation] = lower if sign > 0 else others.size - lower
        wins[class_rows] = class_wins
    positives, rows = groups.sum_by_group(positive), groups.rows.astype(np.float64)
    negatives = rows - positives
    all_positives, all_negatives = float(positives.sum()), float(negatives.sum())
    total = float(wins[positive].sum())
    point = total / (all_positives * all_negatives)
    # A correctly ordered pair inside a group is a win of both of its rows, so count it once.
    lost = groups.sum_by_group(wins) - wins_within_groups(positive, scores, groups.ids, groups.rows)
    left_out = ratio(total - lost, (all_positives - positives) * (all_negatives - negatives))
    influence = np.where(
        positive,
        (wins / all_negatives - point) / all_positives,
        (wins / all_positives - point) / all_negatives,
    )
    return GroupedValue(point, left_out, rows, influence * scores.size, groups)
