"""Estimators of log loss and normalized entropy of all rows."""

import math
from dataclasses import dataclass

import numpy as np

from compressors.contracts import Metric
from compressors.metrics.cluster_intervals import (
    LARGEST_LOSS,
    GroupedPair,
    GroupedValue,
    Groups,
    mean_of_rows,
    pair_groups,
    ratio,
)
from compressors.metrics.estimators.auc import groups_of_both_classes
from compressors.metrics.estimators.protocols import ScoredRows, require_groups
from compressors.metrics.intervals import (
    Counts,
    PairedRows,
    RowStatistics,
    Statistic,
    mean_statistic,
    require_observations,
    require_rows_of_both_classes,
)
from compressors.metrics.point_estimates import (
    Bools,
    Floats,
    base_entropy,
    logloss,
    normalized_entropy,
    number_groups,
    row_logloss,
    to_booleans,
)


@dataclass(frozen=True)
class LogLoss:
    """Mean negative log likelihood; see ``point_estimates.logloss``. Scores are probabilities."""

    metric: Metric

    def compute(self, rows: ScoredRows) -> float:
        """Compute the mean of all rows in nats."""
        return logloss(rows.label, rows.score)

    def bootstrap_rows(self, pair: PairedRows) -> RowStatistics:
        """Return both models' means as functions of how often a resample contains each row."""
        before, after = (row_logloss(pair.label, score) for score in pair.scores)
        require_observations("rows", before.size)
        return RowStatistics(before.size, mean_statistic(before), mean_statistic(after))

    def jackknife_groups(self, pair: PairedRows) -> GroupedPair:
        """Compute the means of baseline and candidate, also with each group left out."""
        group = require_groups(self.metric, pair.group)
        groups = Groups(*number_groups(group, np.size(pair.label)))
        before, after = (
            mean_of_rows(row_logloss(pair.label, score), groups) for score in pair.scores
        )
        return pair_groups(before, after, LARGEST_LOSS, groups.rows.size, group_description="")


@dataclass(frozen=True)
class NormalizedEntropy:
    """Log loss divided by that of the base rate; see ``point_estimates.normalized_entropy``."""

    metric: Metric

    def compute(self, rows: ScoredRows) -> float:
        """Compute the quotient of all rows."""
        return normalized_entropy(rows.label, rows.score)

    def bootstrap_rows(self, pair: PairedRows) -> RowStatistics:
        """Return both models' quotients as functions of how often a resample has each row."""
        before, after = (row_logloss(pair.label, score) for score in pair.scores)
        require_observations("rows", before.size)
        positive = to_booleans(pair.label)
        require_rows_of_both_classes(positive)
        return RowStatistics(
            before.size,
            _build_relative_loss_statistic(before, positive),
            _build_relative_loss_statistic(after, positive),
        )

    def jackknife_groups(self, pair: PairedRows) -> GroupedPair:
        """Compute the quotients of baseline and candidate, also with each group left out."""
        classes = groups_of_both_classes(self.metric, pair)
        before, after = (
            _jackknife_relative_loss(
                row_logloss(pair.label, score), classes.positive, classes.groups
            )
            for score in pair.scores
        )
        largest = LARGEST_LOSS / base_entropy(float(classes.positive.mean()))
        return pair_groups(
            before,
            after,
            largest,
            classes.counted_groups,
            classes.group_description,
            classes.groups.rows.size,
        )


def _build_relative_loss_statistic(losses: Floats, positive: Bools) -> Statistic:
    """Return mean loss divided by the entropy of the base rate, as a function of a resample."""

    def statistic(counts: Counts) -> float:
        rows = float(counts.sum())
        rate = float(counts[positive].sum()) / rows
        return float(counts @ losses) / rows / base_entropy(rate) if 0 < rate < 1 else math.nan

    return statistic


def _jackknife_relative_loss(losses: Floats, positive: Bools, groups: Groups) -> GroupedValue:
    """Compute mean loss divided by the entropy of the base rate, with and without each group."""
    rate, mean = float(positive.mean()), float(losses.mean())
    entropy = float(base_entropy(rate))
    rows = losses.size - groups.rows
    rates = ratio(float(positive.sum()) - groups.sum_by_group(positive), rows)
    losses_left = ratio(float(losses.sum()) - groups.sum_by_group(losses), rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropies = -(rates * np.log(rates) + (1 - rates) * np.log1p(-rates))
    slope = np.log((1 - rate) / rate)  # derivative of the entropy
    # The derivative of mean / entropy, with the change of both by each row.
    influence = (losses - mean) / entropy - mean / entropy**2 * slope * (positive - rate)
    return GroupedValue(
        mean / entropy,
        ratio(losses_left, entropies),
        groups.rows.astype(np.float64),
        influence,
        groups,
    )
