"""95 % intervals of metrics whose rows belong to groups (users, queries): leave-one-group-out.

Rows of one user are not independent, so the precision of a metric depends on the number of users,
not of rows. Every metric is computed exactly without each group (one pass after one sort, no
resampling). The interval is computed from these values:

- center: the metric minus its jackknife bias. Pairs of rows within a user make the AUC of few users
  differ on average from that of many.
- variance: the sum over groups of the squared change when the group is left out, times one minus
  the group's share of the rows.
- quantile: Student's t with Satterthwaite degrees of freedom. A few large groups among many small
  ones carry as much information as a few groups, which lowers the degrees of freedom.

Sources: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 11 (jackknife);
Obuchowski 1997, https://doi.org/10.2307/2533958 (AUC of clustered data); Bell and McCaffrey 2002,
"Bias reduction in standard errors for linear regression with multi-stage samples", and Imbens and
Kolesar 2016, https://doi.org/10.1162/REST_a_00552 (variance CR2 and degrees of freedom).
Differs: leave-one-out values instead of linearized ones; the working model for the degrees of
freedom (equal correlation within a group) is estimated from the influence of each row.

Coverage on simulated users of 1 to 200 rows: ``benchmarks/interval_coverage.py``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from compressors.metrics.point_estimates import (
    PROBABILITY_FLOOR,
    Floats,
    Ints,
)

MIN_GROUPS = 10
"""Smallest number of groups for an interval; with fewer, the working model would determine it."""

TAIL = 0.025
"""Probability outside a 95 % interval on each side."""

LARGEST_LOSS = float(-np.log(PROBABILITY_FLOOR))
"""The largest log loss of a row, in nats."""


class Groups(NamedTuple):
    """Group of each row, ``ids`` int ``(rows,)``, and group sizes, ``rows`` ``(groups,)``."""

    ids: Ints
    rows: Ints

    def sums(self, values: NDArray[np.generic]) -> Floats:
        """Sum ``values`` ``(rows,)`` by group: float64 ``(groups,)``."""
        return np.bincount(self.ids, weights=values, minlength=self.rows.size).astype(np.float64)


@dataclass(frozen=True)
class GroupedValue:
    """A metric of all rows, and of all rows except those of each group.

    Attributes:
        point: the metric of all rows.
        left_out: for each group, the metric without its rows, float64 ``(groups,)``.
        weight: weight of each group, usually its number of rows, ``(groups,)``.
        influence: influence of each row on the metric, times the number of rows, ``(rows,)``; None
            if the metric has one value per group.
        groups: the groups of the rows; None if the metric has one value per group.
    """

    point: float
    left_out: Floats
    weight: Floats
    influence: Floats | None = None
    groups: Groups | None = None

    def minus(self, other: "GroupedValue") -> "GroupedValue":
        """Return the difference of two models' values on the same rows."""
        influence = None
        if self.influence is not None and other.influence is not None:
            influence = self.influence - other.influence
        return GroupedValue(
            self.point - other.point,
            self.left_out - other.left_out,
            self.weight,
            influence,
            self.groups,
        )


class GroupedPair(NamedTuple):
    """A metric of two models on the same rows.

    Attributes:
        before: value of the baseline.
        after: value of the candidate.
        largest: the metric's largest possible value; the smallest is 0.
        groups: the number of groups that have a value.
        unresolved: the reason why there is no interval, or None.
    """

    before: GroupedValue
    after: GroupedValue
    largest: float
    groups: int
    unresolved: str | None


def interval(value: GroupedValue) -> tuple[float, float]:
    """Compute the 95 % interval of a metric whose groups are independent.

    Returns:
        Its low and high end. Both equal the point if no group changes the metric.
    """
    share = value.weight / value.weight.sum()
    change = value.point - value.left_out
    variance = float((change**2) @ (1 - share))
    if variance == 0:
        return value.point, value.point
    number = share.size
    center = number * value.point - (number - 1) * float(value.left_out.mean())
    freedom = _degrees_of_freedom(value, share)
    reach = float(stdtrit(freedom, 1 - TAIL)) * variance**0.5
    return min(center - reach, value.point), max(center + reach, value.point)


def mean_of_rows(values: Floats, groups: Groups) -> GroupedValue:
    """Compute the mean of ``values`` ``(rows,)`` over all rows, and without each group."""
    total, rows = float(values.sum()), values.size
    point = total / rows
    left_out = ratio(total - groups.sums(values), rows - groups.rows)
    return GroupedValue(point, left_out, groups.rows.astype(float), values - point, groups)


def weighted_mean(values: Floats, weight: Floats) -> GroupedValue:
    """Compute the weighted mean of one value per group, and without each; both ``(groups,)``."""
    total = float(weight.sum())
    point = float(values @ weight) / total
    left_out = ratio(float(values @ weight) - values * weight, total - weight)
    return GroupedValue(point, left_out, weight)


def grouped_pair(
    before: GroupedValue,
    after: GroupedValue,
    largest: float,
    counted: int,
    which: str,
    groups: int | None = None,
) -> GroupedPair:
    """Pair the values of two models, with a reason if there are too few groups for an interval.

    Args:
        before: value of the baseline.
        after: value of the candidate on the same rows.
        largest: the metric's largest possible value.
        counted: number of groups on which the interval depends.
        which: describes these groups in the reason, such as "with a positive row".
        groups: number of all groups that have a value; None: ``counted``.
    """
    unresolved = None
    if counted < MIN_GROUPS:
        noun = "group" if counted == 1 else "groups"
        unresolved = (
            f"{counted} {noun}{f' {which}' if which else ''} in the data; an interval needs at "
            f"least {MIN_GROUPS}"
        )
    return GroupedPair(before, after, largest, counted if groups is None else groups, unresolved)


def ratio(numerator: Floats, denominator: Floats | NDArray[np.intp]) -> Floats:
    """Divide without a warning if the denominator is 0, because one group has all rows.

    Such data have too few groups for an interval, so the NaN or infinity is not used.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: Floats = np.asarray(numerator, dtype=np.float64) / denominator
    return quotient


def _degrees_of_freedom(value: GroupedValue, share: Floats) -> float:
    """Compute Satterthwaite's degrees of freedom of the variance, at least 1.

    Under the working model a group's mean has the variance ``between + within / rows``. The
    variance estimate is a quadratic form of the group means. The degrees of freedom, twice its
    squared expectation over its variance, are computed in O(groups) from the sums below.
    """
    spread = _variance_of_means(value)
    covered = spread * share
    base = float(covered @ share)  # of the weighted mean
    factor = share**2 / (1 - share)
    diagonal = spread - 2 * covered + base
    expected = float(factor @ diagonal)
    total, first, second = factor.sum(), factor @ covered, factor @ covered**2
    every = base**2 * total**2 + 2 * total * second - 4 * base * total * first + 2 * first**2
    same = factor**2 @ (diagonal**2 - (base - 2 * covered) ** 2)
    return max(1.0, expected**2 / float(every + same))


def _variance_of_means(value: GroupedValue) -> Floats:
    """Estimate the variance of each group's mean, up to a common factor, ``(groups,)``."""
    if value.influence is None or value.groups is None:
        return np.ones(value.weight.size)
    rows = value.groups.rows.astype(np.float64)
    sums = value.groups.sums(value.influence)
    spare = value.influence.size - rows.size
    residual = value.influence - (sums / rows)[value.groups.ids]
    within = float(residual @ residual) / spare if spare else 0.0
    between = (float(sums @ sums) - within * float(rows.sum())) / float(rows @ rows)
    spread = max(between, 0.0) + within / rows
    return spread if spread.any() else np.ones(rows.size)
