"""95 % intervals of metrics whose rows belong to groups (users, queries), by the jackknife.

Rows of one user are not independent, so the precision of a metric depends on the number of users,
not on the number of rows. The metric is computed exactly for all rows without each group in turn,
in one pass after one sort and without resampling. The interval is computed from these leave-one-out
values:

- center: the metric minus its jackknife bias. For example, the AUC of few users differs on average
  from the AUC of many, because more of its pairs of rows belong to the same user.
- variance: the sum over groups of the squared change when the group is left out, times one minus
  the group's share of the rows.
- quantile: Student's t with Satterthwaite degrees of freedom. A few large groups determine the
  metric even if there are many small ones, which lowers the degrees of freedom.

Sources: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 11 (jackknife);
Obuchowski 1997, https://doi.org/10.2307/2533958 (AUC of clustered data); Bell and McCaffrey 2002,
"Bias reduction in standard errors for linear regression with multi-stage samples", and Imbens and
Kolesar 2016, https://doi.org/10.1162/REST_a_00552 (variance CR2 and degrees of freedom).
Differs: values are leave-one-out values instead of linearized ones; degrees of freedom are computed
for a working model (all rows of a group have the same correlation), whose variances are estimated
from the influence of each row.

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
"""Smallest number of groups for an interval: with fewer, it would depend on the working model."""

TAIL = 0.025
"""Probability that the true value is outside a 95 % interval on one side."""

LARGEST_LOSS = float(-np.log(PROBABILITY_FLOOR))
"""The largest log loss of a row, in nats."""


class Groups(NamedTuple):
    """The groups of rows.

    Attributes:
        ids: group number of each row, int ``(rows,)``.
        rows: number of rows of each group, int ``(groups,)``.
    """

    ids: Ints
    rows: Ints

    def sum_by_group(self, values: NDArray[np.generic]) -> Floats:
        """Sum ``values`` ``(rows,)`` by group: float64 ``(groups,)``."""
        return np.bincount(self.ids, weights=values, minlength=self.rows.size).astype(np.float64)


@dataclass(frozen=True)
class GroupedValue:
    """A metric of all rows, and of all rows except those of each group.

    Attributes:
        point: the metric of all rows.
        left_out: for each group, the metric without its rows, float64 ``(groups,)``.
        weight: weight of each group, usually its number of rows, ``(groups,)``.
        influence: influence function of the metric at each row, ``(rows,)``: the change of the
            metric if the row's weight increases, times the number of rows. None if the metric has
            one value per group.
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
        max_value: the largest possible value of the metric; the smallest is 0.
        groups: the number of groups that have a value.
        unresolved: why there is no interval, as text, or None if there is one.
    """

    before: GroupedValue
    after: GroupedValue
    max_value: float
    groups: int
    unresolved: str | None


def interval(value: GroupedValue) -> tuple[float, float]:
    """Compute the 95 % interval of a metric whose groups are independent.

    Returns:
        The low and the high end. Both equal the metric if leaving out a group never changes it.
    """
    share = value.weight / value.weight.sum()
    change = value.point - value.left_out
    variance = float((change**2) @ (1 - share))
    if variance == 0:
        return value.point, value.point
    count = share.size
    center = count * value.point - (count - 1) * float(value.left_out.mean())
    freedom = _compute_degrees_of_freedom(value, share)
    half_width = float(stdtrit(freedom, 1 - TAIL)) * variance**0.5
    return min(center - half_width, value.point), max(center + half_width, value.point)


def mean_of_rows(values: Floats, groups: Groups) -> GroupedValue:
    """Compute the mean of ``values`` ``(rows,)``, with and without each group."""
    total, rows = float(values.sum()), values.size
    point = total / rows
    left_out = ratio(total - groups.sum_by_group(values), rows - groups.rows)
    return GroupedValue(point, left_out, groups.rows.astype(float), values - point, groups)


def weighted_mean(values: Floats, weight: Floats) -> GroupedValue:
    """Compute the weighted mean of one value per group, with and without each group.

    ``values`` and ``weight`` are ``(groups,)``.
    """
    total = float(weight.sum())
    point = float(values @ weight) / total
    left_out = ratio(float(values @ weight) - values * weight, total - weight)
    return GroupedValue(point, left_out, weight)


def pair_groups(
    before: GroupedValue,
    after: GroupedValue,
    max_value: float,
    counted_groups: int,
    group_description: str,
    groups: int | None = None,
) -> GroupedPair:
    """Pair the values of two models, with a reason if there are too few groups for an interval.

    Args:
        before: value of the baseline.
        after: value of the candidate on the same rows.
        max_value: the metric's largest possible value.
        counted_groups: number of groups that determine the precision of the interval.
        group_description: describes these groups in the reason, such as "with a positive row".
        groups: number of all groups that have a value; None: ``counted_groups``.
    """
    unresolved = None
    if counted_groups < MIN_GROUPS:
        noun = "group" if counted_groups == 1 else "groups"
        described = f"{noun} {group_description}" if group_description else noun
        unresolved = (
            f"{counted_groups} {described} in the data; an interval needs at least {MIN_GROUPS}"
        )
    groups = counted_groups if groups is None else groups
    return GroupedPair(before, after, max_value, groups, unresolved)


def ratio(numerator: Floats, denominator: Floats | NDArray[np.intp]) -> Floats:
    """Divide without a warning if a denominator is 0.

    This happens if one group has all rows. Then there are too few groups for an interval, so the
    NaN or infinity is not used.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: Floats = np.asarray(numerator, dtype=np.float64) / denominator
    return quotient


def _compute_degrees_of_freedom(value: GroupedValue, share: Floats) -> float:
    """Compute Satterthwaite's degrees of freedom of the variance, at least 1.

    In the working model, the mean of a group has the variance ``between + within / rows``. The
    variance estimate is a quadratic form of the group means. Its degrees of freedom are twice its
    squared expectation divided by its variance. Both are computed in O(groups) from sums.
    """
    variance = _estimate_variance_of_means(value)
    # ``shared[i]`` is the covariance of group i's mean and the weighted mean of all groups. The
    # deviation of group i is the first minus the second. Deviations of groups i and j have the
    # covariance ``base - shared[i] - shared[j]``, and ``diagonal[i]`` is the variance of one. The
    # variance estimate is the sum of squared deviations times ``factor``: leaving out a group
    # changes the mean by its deviation times share / (1 - share); ``interval`` multiplies the
    # square of this change by 1 - share.
    shared = variance * share
    base = float(shared @ share)  # variance of the weighted mean
    factor = share**2 / (1 - share)
    diagonal = variance - 2 * shared + base
    expected = float(factor @ diagonal)
    # Sums of ``factor`` times the powers 0, 1 and 2 of ``shared``.
    total, first, second = factor.sum(), factor @ shared, factor @ shared**2
    # Sum of squared covariances over all pairs (i, j), times the factors of both groups. For i = j
    # the formula of the covariance is wrong, which the second term corrects.
    all_pairs = base**2 * total**2 + 2 * total * second - 4 * base * total * first + 2 * first**2
    correction = factor**2 @ (diagonal**2 - (base - 2 * shared) ** 2)
    return max(1.0, expected**2 / float(all_pairs + correction))


def _estimate_variance_of_means(value: GroupedValue) -> Floats:
    """Estimate the variance of each group's mean, up to a common factor, ``(groups,)``."""
    if value.influence is None or value.groups is None:
        return np.ones(value.weight.size)
    rows = value.groups.rows.astype(np.float64)
    sums = value.groups.sum_by_group(value.influence)
    freedom_within = value.influence.size - rows.size
    residual = value.influence - (sums / rows)[value.groups.ids]
    within = float(residual @ residual) / freedom_within if freedom_within else 0.0
    between = (float(sums @ sums) - within * float(rows.sum())) / float(rows @ rows)
    variance = max(between, 0.0) + within / rows
    return variance if variance.any() else np.ones(rows.size)
