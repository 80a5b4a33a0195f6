"""95 % intervals of metrics, of paired differences of two models, and of latency.

Baseline and candidate are scored on the same rows, and their difference is paired by row, so
variation that both share (easy rows, hard rows) cancels. The interval of the difference is
therefore many times narrower than that of either model.

Rows without a group are independent units: percentile bootstrap, where every replicate draws the
same rows for both models. Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap",
chapter 13. Rows with a group (users, queries) are not independent: their intervals treat whole
groups as the units (``cluster_intervals.py``). For latency, rounds are resampled.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compressors.contracts import Estimate, Frozen
from compressors.errors.metrics import MetricRefused
from compressors.metrics.cluster_intervals import GroupedPair, grouped_pair, interval
from compressors.metrics.point_estimates import (
    Bools,
    Floats,
    base_entropy,
    binary,
    clicks_and_scores,
    require_both_classes,
    row_logloss,
)

TAIL = 0.025
"""Probability outside a 95 % interval on each side."""

MIN_SAMPLES = 100
"""Fewest replicates: with fewer at most two are beyond each end of the interval."""

MIN_UNITS = 10
"""Fewest rows of a class, or units, for an interval: fewer hardly vary between replicates.

Their interval would be too narrow: a single unit would give an interval of width 0, which reads as
exact.
"""

LATENCY_BLOCK_BYTES = 32 * 2**20

Counts = NDArray[np.intp]
Statistic = Callable[[Counts], float]
"""A metric of a resample: from the count of each unit to the value, NaN if undefined."""


class PairedEstimate(Frozen):
    """One metric of two models on the same rows.

    ``difference`` is candidate minus baseline. ``resolves`` is half the width of its interval, in
    the unit of the metric: the smallest loss that this test set can distinguish from 0.
    """

    baseline: Estimate
    candidate: Estimate
    difference: Estimate
    resolves: float


def paired(
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
        metric_name: ``auc``, ``logloss``, ``normalized_entropy``, ``gauc`` or ``ndcg@<k>``.
        label: 0 or 1 (``ndcg``: relevance >= 0), ``(rows,)``.
        baseline: scores (log loss and entropy: probabilities) of the baseline, ``(rows,)``.
        candidate: scores of the candidate on the same rows, ``(rows,)``.
        group: user or query of each row, ``(rows,)``; needed by ``gauc`` and ``ndcg``. With it the
            intervals treat groups as the units.
        samples: replicates of the bootstrap of rows without a group; at least 100. 1000 puts the
            ends within about 5 % of the width.
        seed: seed of this bootstrap; the same seed gives the same intervals. Intervals of rows with
            a group are not random.

    Returns:
        The three estimates; ``rows`` of each is the number of rows given, ``groups`` the number of
        groups. With fewer than 10 groups that count there is no interval: it is the whole range of
        the metric, and ``unresolved`` says why.

    Raises:
        CompressionError: an unknown metric, a missing group column, fewer than 10 rows of a class
            (without groups), too few samples, and any error of the metric itself.

    Memory: about ten arrays of ``rows`` entries, independent of ``samples``. Time: a few sorts;
    rows without a group add a term linear in ``rows * samples``.
    """
    _require_samples(samples)
    if group is not None:
        pair = grouped_pair(metric_name, label, baseline, candidate, group)
        return _paired_groups(pair, np.size(label))
    units, before, after = _statistics(metric_name, label, baseline, candidate)
    return _paired(units, before, after, np.size(label), samples, seed)


def paired_means(
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
        CompressionError: fewer than 10 queries, unequal lengths, a value that is not finite, or
            too few samples.
    """
    _require_samples(samples)
    before, after = (np.asarray(values, dtype=np.float64) for values in (baseline, candidate))
    if before.ndim != 1 or before.shape != after.shape:
        raise MetricRefused("values_unpaired", baseline=before.shape, candidate=after.shape)
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise MetricRefused("values_not_finite")
    _require_units("queries that ask for something new", before.size)
    return _paired(before.size, _mean(before), _mean(after), rows, samples, seed)


def _paired_groups(pair: GroupedPair, rows: int) -> PairedEstimate:
    largest = pair.largest
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


def _paired(
    units: int, before: Statistic, after: Statistic, rows: int, samples: int, seed: int
) -> PairedEstimate:
    once = np.ones(units, dtype=np.intp)
    point_before, point_after = before(once), after(once)
    values_before, values_after = _replicates(units, before, after, samples, seed)
    difference = _estimate(point_after - point_before, values_after - values_before, rows)
    return PairedEstimate(
        baseline=_estimate(point_before, values_before, rows),
        candidate=_estimate(point_after, values_after, rows),
        difference=difference,
        resolves=(difference.high - difference.low) / 2,
    )


def auc_statistic(label: ArrayLike, score: ArrayLike) -> Statistic:
    """Return the AUC as a function of resample counts: one sort, then O(rows) a call.

    Every positive beats the resampled negatives that precede it in score order; two cumulative
    counts (below, and not above) make ties count half. All sums are integers, so a call equals
    ``metrics.auc`` of the rows repeated by their counts.
    """
    positive, scores = clicks_and_scores(label, score)
    require_both_classes("auc", positive)
    positives, negatives = np.flatnonzero(positive), np.flatnonzero(~positive)
    positives = positives[np.argsort(scores[positives], kind="stable")]
    negatives = negatives[np.argsort(scores[negatives], kind="stable")]
    below = np.searchsorted(scores[negatives], scores[positives], side="left")
    not_above = np.searchsorted(scores[negatives], scores[positives], side="right")
    passed = np.zeros(negatives.size + 1, dtype=np.intp)

    def statistic(counts: Counts) -> float:
        np.cumsum(counts[negatives], out=passed[1:])
        drawn = counts[positives]
        pairs = 2.0 * float(drawn.sum()) * float(passed[-1])
        if pairs == 0:
            return math.nan
        return float(drawn @ (passed[below] + passed[not_above])) / pairs

    return statistic


def latency(ms: ArrayLike, quantile: float, samples: int = 1000, seed: int = 0) -> Estimate:
    """Estimate a quantile of measured times, with its interval.

    Args:
        ms: one duration per round, in milliseconds, ``(rounds,)``, > 0.
        quantile: in (0, 1): 0.5 for the median, 0.99 for p99.
        samples: bootstrap replicates, at least 100.
        seed: the same seed gives the same interval.

    Returns:
        The quantile (linear between rounds) in milliseconds; ``rows`` is None, rounds are not
        rows of data. Rounds are assumed independent: if the machine drifts during measurement,
        the interval is too narrow, so interleave the models to compare.

    Raises:
        CompressionError: fewer rounds than ``rounds_needed(quantile)``, or a time that is not
            positive and finite.
    """
    times = _times("latency", ms, quantile, samples)
    values = _quantiles(times[None], quantile, samples, seed)
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
        candidate_ms: likewise. With as many rounds as the baseline, rounds are assumed interleaved
            (round i of both adjacent in time) and resampled together, so that a slowdown of both
            cancels; otherwise each model is resampled separately.
        quantile: in (0, 1).
        samples: bootstrap replicates, at least 100.
        seed: the same seed gives the same interval.

    Returns:
        The ratio, unitless; below 1 the candidate is faster. ``rows`` is None.

    Raises:
        CompressionError: as ``latency``, for either model.
    """
    before = _times("baseline latency", baseline_ms, quantile, samples)
    after = _times("candidate latency", candidate_ms, quantile, samples)
    if before.size == after.size:
        values = _quantiles(np.stack([before, after]), quantile, samples, seed)
    else:
        seeds = np.random.SeedSequence(seed).spawn(2)
        values = np.concatenate(
            [
                _quantiles(times[None], quantile, samples, model_seed)
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


def _statistics(
    metric: str, label: ArrayLike, baseline: ArrayLike, candidate: ArrayLike
) -> tuple[int, Statistic, Statistic]:
    """Return the number of rows, and each model's metric as a function of their counts."""
    if metric == "auc":
        return _auc_of_rows(label, baseline, candidate)
    if metric in ("logloss", "normalized_entropy"):
        return _losses_of_rows(metric, label, baseline, candidate)
    if metric != "gauc" and not metric.startswith("ndcg@"):
        raise MetricRefused("interval_metric_unknown", metric=metric)
    raise MetricRefused("metric_needs_groups", metric=metric)


def _auc_of_rows(
    label: ArrayLike, baseline: ArrayLike, candidate: ArrayLike
) -> tuple[int, Statistic, Statistic]:
    positive, before = clicks_and_scores(label, baseline)
    _, after = clicks_and_scores(label, candidate)
    _require_both(positive)
    # The order of rows does not affect a bootstrap. In score order the counts are read almost
    # sequentially, also for the candidate, whose order is nearly the same.
    order = np.lexsort((before, positive))
    positive, before, after = positive[order], before[order], after[order]
    return positive.size, auc_statistic(positive, before), auc_statistic(positive, after)


def _losses_of_rows(
    metric: str, label: ArrayLike, baseline: ArrayLike, candidate: ArrayLike
) -> tuple[int, Statistic, Statistic]:
    before, after = row_logloss(label, baseline), row_logloss(label, candidate)
    _require_units("rows", before.size)
    if metric == "logloss":
        return before.size, _mean(before), _mean(after)
    positive = binary(label)
    _require_both(positive)
    return (
        before.size,
        _relative_to_entropy(before, positive),
        _relative_to_entropy(after, positive),
    )


def _mean(values: Floats) -> Statistic:
    return lambda counts: float(counts @ values) / float(counts.sum())


def _relative_to_entropy(losses: Floats, positive: Bools) -> Statistic:
    def statistic(counts: Counts) -> float:
        rows = float(counts.sum())
        rate = float(counts[positive].sum()) / rows
        return float(counts @ losses) / rows / base_entropy(rate) if 0 < rate < 1 else math.nan

    return statistic


def _replicates(
    units: int, before: Statistic, after: Statistic, samples: int, seed: int
) -> tuple[Floats, Floats]:
    """Compute both metrics of ``samples`` resamples, each ``(samples,)``.

    One resample is drawn at a time, so memory does not grow with ``samples``; both models use the
    same counts. A resample of one class has no AUC and is drawn again: with at least ``MIN_UNITS``
    of each class that is fewer than one in ten thousand.
    """
    random = np.random.default_rng(seed)
    values = np.empty((2, samples))
    done = 0
    while done < samples:
        counts = np.bincount(random.integers(0, units, units), minlength=units)
        pair = before(counts), after(counts)
        if not math.isnan(pair[0]):
            values[:, done] = pair
            done += 1
    return values[0], values[1]


def _quantiles(
    times: Floats, quantile: float, samples: int, seed: int | np.random.SeedSequence
) -> Floats:
    """Compute quantiles of ``samples`` resamples of ``(models, rounds)``, drawn together."""
    random = np.random.default_rng(seed)
    models, rounds = times.shape
    block = max(1, LATENCY_BLOCK_BYTES // (8 * models * rounds))
    values = np.empty((models, samples))
    for start in range(0, samples, block):
        stop = min(start + block, samples)
        drawn = random.integers(0, rounds, (stop - start, rounds))
        values[:, start:stop] = np.quantile(times[:, drawn], quantile, axis=2)
    return values


def _estimate(point: float, values: Floats, rows: int | None) -> Estimate:
    low, high = np.quantile(values, [TAIL, 1 - TAIL])
    return Estimate(point=point, low=float(low), high=float(high), rows=rows)


def _require_units(what: str, found: int) -> None:
    if found < MIN_UNITS:
        raise MetricRefused("units_few", least=MIN_UNITS, units=what, got=found)


def _require_both(positive: Bools) -> None:
    _require_units("positive rows", int(positive.sum()))
    _require_units("negative rows", int((~positive).sum()))


def _require_samples(samples: int) -> None:
    if samples < MIN_SAMPLES:
        raise MetricRefused("bootstrap_samples_few", least=MIN_SAMPLES, got=samples)


def _times(what: str, ms: ArrayLike, quantile: float, samples: int) -> Floats:
    """Check durations and return them as float64 ``(rounds,)``."""
    _require_samples(samples)
    if not 0 < quantile < 1:
        raise MetricRefused("quantile_outside", quantile=quantile)
    times = np.asarray(ms, dtype=np.float64)
    if times.ndim != 1 or not (np.isfinite(times) & (times > 0)).all():
        raise MetricRefused(
            "durations_unusable",
            times=what,
            shape=times.shape,
            count=int((~(np.isfinite(times) & (times > 0))).sum()),
        )
    needed = rounds_needed(quantile)
    if times.size < needed:
        raise MetricRefused(
            "rounds_few", times=what, quantile=quantile, least=needed, got=times.size
        )
    return times
