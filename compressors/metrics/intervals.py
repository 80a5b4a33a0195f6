"""95 % intervals of metrics, of paired differences of two models, and of latency.

Baseline and candidate are evaluated on the same rows, and their difference is paired by row. So
variation that affects both models, such as easy and hard rows, cancels, and the interval of the
difference is many times narrower than that of either model.

An observation in this file is what varies independently: a row, a query or a whole group. Rows
without a group are observations. Their intervals are computed by the percentile bootstrap, in which
every replicate draws the same rows for both models. Source: Efron and Tibshirani 1993, "An
Introduction to the Bootstrap", chapter 13. Rows with a group (users, queries) are not independent:
their intervals are computed by a jackknife of whole groups (``cluster_intervals.py`` in this
folder). Intervals of latencies resample the rounds of the measurement.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compressors.contracts import Estimate, Frozen
from compressors.contracts.metrics.families import find_metric
from compressors.errors.metrics import MetricRefused
from compressors.metrics.cluster_intervals import GroupedPair, interval
from compressors.metrics.point_estimates import (
    Bools,
    Floats,
)

TAIL = 0.025
"""Probability that the true value is outside a 95 % interval on one side."""

MIN_SAMPLES = 100
"""Smallest number of replicates: with fewer, only one or two are beyond each end of an interval."""

MIN_OBSERVATIONS = 10
"""Smallest number of observations, or of rows of each class, for an interval.

With fewer, replicates hardly differ and the interval would be too narrow. With a single one, its
width would be 0, as if the number were exact.
"""

LATENCY_BLOCK_BYTES = 32 * 2**20
"""Bytes of resampled durations in memory at once."""

Counts = NDArray[np.intp]
Statistic = Callable[[Counts], float]
"""Maps how often a bootstrap replicate has each observation to the metric; NaN if undefined."""


class PairedRows(NamedTuple):
    """Rows with the scores of two models: each array is ``(rows,)``."""

    label: ArrayLike
    baseline: ArrayLike
    candidate: ArrayLike
    group: ArrayLike | None = None

    @property
    def scores(self) -> tuple[ArrayLike, ArrayLike]:
        """Scores of the baseline and of the candidate."""
        return self.baseline, self.candidate


class RowStatistics(NamedTuple):
    """The metric of both models as functions of a bootstrap replicate, and the number of rows."""

    rows: int
    before: Statistic
    after: Statistic


class PairedEstimate(Frozen):
    """One metric of two models on the same rows.

    ``difference`` is candidate minus baseline. ``resolves`` is half the width of its interval, in
    the unit of the metric: the smallest loss that this test set can distinguish from 0.
    """

    baseline: Estimate
    candidate: Estimate
    difference: Estimate
    resolves: float


def estimate_pair(
    metric_name: str,
    label: ArrayLike,
    baseline: ArrayLike,
    candidate: ArrayLike,
    group: ArrayLike | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> PairedEstimate:
    """Measure two models on the same rows, with intervals.

    Args:
        metric_name: a metric with an estimator of rows, such as ``auc`` or ``ndcg@10``.
        label: 0 or 1 (metrics at a depth k: relevance >= 0), ``(rows,)``.
        baseline: scores (log loss and entropy: probabilities) of the baseline, ``(rows,)``.
        candidate: scores of the candidate on the same rows, ``(rows,)``.
        group: user or query of each row, ``(rows,)``; needed by ``gauc`` and by metrics at a
            depth k. With it the intervals treat groups as the observations.
        samples: replicates of the bootstrap of rows without a group; at least 100. With 1000, the
            ends vary by about 5 % of the width between seeds.
        seed: seed of this bootstrap; the same seed gives the same intervals. Intervals of rows with
            a group are not random.

    Returns:
        The three estimates; ``rows`` of each is the number of all rows, ``groups`` the number of
        groups that have a value. If fewer than 10 groups determine the precision (for AUC, the
        groups with rows of the rarer class), the interval is the whole range of the metric, and
        ``unresolved`` gives the reason.

    Raises:
        MetricRefused: the metric has no such estimator or is undefined for the rows, the group
            column is missing, ``samples`` is too small, or, without groups, there are fewer than 10
            rows of a class.

    Memory: about ten arrays of ``rows`` entries, independent of ``samples``. Time: a few sorts;
    rows without a group add a term linear in ``rows * samples``.
    """
    _require_samples(samples)
    declared = find_metric(metric_name)
    estimator = None if declared is None else declared.estimator("rows")
    if declared is None or estimator is None:
        raise MetricRefused("interval_metric_unknown", metric=metric_name)
    rows = PairedRows(label, baseline, candidate, group)
    if group is not None:
        return _estimate_paired_groups(estimator.jackknife_groups(rows), np.size(label))
    if declared.needs_group:
        raise MetricRefused("metric_needs_groups", metric=metric_name)
    observations, before, after = estimator.bootstrap_rows(rows)
    return _bootstrap_pair(observations, before, after, np.size(label), samples, seed)


def compare_means(
    baseline: ArrayLike, candidate: ArrayLike, rows: int, samples: int = 1000, seed: int = 0
) -> PairedEstimate:
    """Compare two models' means over queries, with intervals from a bootstrap of queries.

    Args:
        baseline: value of each query, ``(queries,)``, such as its recall.
        candidate: values of the candidate for the same queries.
        rows: number of test rows of the queries, for the estimates.
        samples: replicates; at least 100.
        seed: the same seed gives the same intervals.

    Raises:
        MetricRefused: fewer than 10 queries, unequal lengths, a value that is not finite, or
            too few samples.
    """
    _require_samples(samples)
    before, after = (np.asarray(values, dtype=np.float64) for values in (baseline, candidate))
    if before.ndim != 1 or before.shape != after.shape:
        raise MetricRefused("values_unpaired", baseline=before.shape, candidate=after.shape)
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise MetricRefused("values_not_finite")
    require_observations("queries with a new item", before.size)
    return _bootstrap_pair(
        before.size, mean_statistic(before), mean_statistic(after), rows, samples, seed
    )


def _estimate_paired_groups(pair: GroupedPair, rows: int) -> PairedEstimate:
    """Build the estimates of rows with groups; intervals are clipped to the metric's range."""
    largest = pair.max_value
    change = pair.after.minus(pair.before)
    if pair.unresolved is None:
        ends = [interval(value) for value in (pair.before, pair.after, change)]
    else:
        ends = [(0.0, largest), (0.0, largest), (-largest, largest)]

    def estimate(point: float, low: float, high: float, smallest: float) -> Estimate:
        return Estimate(
            point=point,
            low=max(low, min(smallest, point)),
            high=min(high, max(largest, point)),
            rows=rows,
            groups=pair.groups,
            unresolved=pair.unresolved,
        )

    difference = estimate(change.point, *ends[2], -largest)
    return PairedEstimate(
        baseline=estimate(pair.before.point, *ends[0], 0.0),
        candidate=estimate(pair.after.point, *ends[1], 0.0),
        difference=difference,
        resolves=(difference.high - difference.low) / 2,
    )


def _bootstrap_pair(
    observations: int, before: Statistic, after: Statistic, rows: int, samples: int, seed: int
) -> PairedEstimate:
    """Build the estimates of two models by a bootstrap of independent observations.

    ``observations`` is the number of rows or queries that are resampled, ``rows`` the number of
    rows that the estimates report.
    """
    each_once = np.ones(observations, dtype=np.intp)
    point_before, point_after = before(each_once), after(each_once)
    values_before, values_after = _compute_replicates(observations, before, after, samples, seed)
    difference = _estimate(point_after - point_before, values_after - values_before, rows)
    return PairedEstimate(
        baseline=_estimate(point_before, values_before, rows),
        candidate=_estimate(point_after, values_after, rows),
        difference=difference,
        resolves=(difference.high - difference.low) / 2,
    )


def latency(ms: ArrayLike, quantile: float, samples: int = 1000, seed: int = 0) -> Estimate:
    """Estimate a quantile of measured times, with its interval.

    Args:
        ms: one duration per round, in milliseconds, ``(rounds,)``, > 0.
        quantile: in (0, 1): 0.5 for the median, 0.99 for p99.
        samples: bootstrap replicates, at least 100.
        seed: the same seed gives the same interval.

    Returns:
        The quantile (linear between rounds) in milliseconds; ``rows`` is None, because rounds are
        not rows of data. Rounds are assumed independent: if the machine becomes slower or faster
        during the measurement, the interval is too narrow. So measure the models to compare in
        turn.

    Raises:
        MetricRefused: fewer rounds than ``rounds_needed(quantile)``, or a time that is not
            positive and finite.
    """
    times = _check_times("latency", ms, quantile, samples)
    values = _compute_quantiles(times[None], quantile, samples, seed)
    return _estimate(float(np.quantile(times, quantile)), values[0], None)


def latency_ratio(
    baseline_ms: ArrayLike,
    candidate_ms: ArrayLike,
    quantile: float,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Estimate the ratio of a quantile of the candidate's times to that of the baseline's.

    Args:
        baseline_ms: one duration per round, in milliseconds, ``(rounds,)``, > 0.
        candidate_ms: the same for the candidate. If both have equally many rounds, round i of both
            models is assumed to be measured one directly after the other. Then the same rounds are
            resampled for both, so that a slowdown of both cancels. Otherwise each model is
            resampled separately.
        quantile: in (0, 1).
        samples: bootstrap replicates, at least 100.
        seed: the same seed gives the same interval.

    Returns:
        The ratio, unitless; below 1 the candidate is faster. ``rows`` is None.

    Raises:
        MetricRefused: for either model, there are fewer rounds than ``rounds_needed(quantile)``, or
            a time is not positive and finite.
    """
    before = _check_times("baseline latency", baseline_ms, quantile, samples)
    after = _check_times("candidate latency", candidate_ms, quantile, samples)
    if before.size == after.size:
        values = _compute_quantiles(np.stack([before, after]), quantile, samples, seed)
    else:
        seeds = np.random.SeedSequence(seed).spawn(2)
        values = np.concatenate(
            [
                _compute_quantiles(times[None], quantile, samples, model_seed)
                for times, model_seed in zip((before, after), seeds, strict=True)
            ]
        )
    point = float(np.quantile(after, quantile) / np.quantile(before, quantile))
    return _estimate(point, values[1] / values[0], None)


def rounds_needed(quantile: float) -> int:
    """Return the fewest rounds for a 95 % interval of a quantile: 6 for p50, 368 for p99.

    With fewer, the probability that the true quantile is beyond the slowest (or fastest) round is
    above 2.5 %, and no interval between measured times can contain it. Source: the order-statistic
    bound, David and Nagaraja 2003, "Order Statistics", section 7.1.
    """
    return math.ceil(math.log(TAIL) / math.log(max(quantile, 1 - quantile)))


def mean_statistic(values: Floats) -> Statistic:
    """Return the mean of ``values`` as a function of how often each one is drawn."""
    return lambda counts: float(counts @ values) / float(counts.sum())


def _compute_replicates(
    observations: int, before: Statistic, after: Statistic, samples: int, seed: int
) -> tuple[Floats, Floats]:
    """Compute both metrics of ``samples`` bootstrap replicates, each ``(samples,)``.

    One replicate is drawn at a time, so memory does not grow with ``samples``; both models use the
    same replicate. A replicate with rows of only one class has no AUC and is drawn again. With at
    least ``MIN_OBSERVATIONS`` rows of each class, this happens for fewer than one in ten thousand.
    """
    rng = np.random.default_rng(seed)
    values = np.empty((2, samples))
    done = 0
    while done < samples:
        counts = np.bincount(rng.integers(0, observations, observations), minlength=observations)
        pair = before(counts), after(counts)
        if not math.isnan(pair[0]):
            values[:, done] = pair
            done += 1
    return values[0], values[1]


def _compute_quantiles(
    times: Floats, quantile: float, samples: int, seed: int | np.random.SeedSequence
) -> Floats:
    """Compute quantiles of ``samples`` bootstrap replicates of times ``(models, rounds)``.

    A replicate has the same rounds for all models.
    """
    rng = np.random.default_rng(seed)
    models, rounds = times.shape
    block = max(1, LATENCY_BLOCK_BYTES // (8 * models * rounds))
    values = np.empty((models, samples))
    for start in range(0, samples, block):
        stop = min(start + block, samples)
        drawn = rng.integers(0, rounds, (stop - start, rounds))
        values[:, start:stop] = np.quantile(times[:, drawn], quantile, axis=2)
    return values


def _estimate(point: float, values: Floats, rows: int | None) -> Estimate:
    """Build an estimate whose interval contains 95 % of the replicates ``values``."""
    low, high = np.quantile(values, [TAIL, 1 - TAIL])
    return Estimate(point=point, low=float(low), high=float(high), rows=rows)


def require_observations(name: str, count: int) -> None:
    """Raise if there are fewer observations than an interval needs; ``name`` describes them.

    Raises:
        MetricRefused: ``count`` is below ``MIN_OBSERVATIONS``.
    """
    if count < MIN_OBSERVATIONS:
        raise MetricRefused("units_few", least=MIN_OBSERVATIONS, units=name, got=count)


def require_rows_of_both_classes(positive: Bools) -> None:
    """Raise if there are fewer positive or negative rows than an interval needs.

    Raises:
        MetricRefused: a class has fewer than ``MIN_OBSERVATIONS`` rows.
    """
    require_observations("positive rows", int(positive.sum()))
    require_observations("negative rows", int((~positive).sum()))


def _require_samples(samples: int) -> None:
    if samples < MIN_SAMPLES:
        raise MetricRefused("bootstrap_samples_few", least=MIN_SAMPLES, got=samples)


def _check_times(name: str, ms: ArrayLike, quantile: float, samples: int) -> Floats:
    """Check durations and return them as float64 ``(rounds,)``."""
    _require_samples(samples)
    if not 0 < quantile < 1:
        raise MetricRefused("quantile_outside", quantile=quantile)
    times = np.asarray(ms, dtype=np.float64)
    if times.ndim != 1 or not (np.isfinite(times) & (times > 0)).all():
        raise MetricRefused(
            "durations_unusable",
            times=name,
            shape=times.shape,
            count=int((~(np.isfinite(times) & (times > 0))).sum()),
        )
    needed = rounds_needed(quantile)
    if times.size < needed:
        raise MetricRefused(
            "rounds_few", times=name, quantile=quantile, least=needed, got=times.size
        )
    return times
