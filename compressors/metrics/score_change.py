"""Score changes: how much a candidate's scores differ from the baseline's on the same rows.

A metric such as AUC can stay the same, or even rise, although single scores change much. The
metrics here compare the scores themselves and need no labels.

- ``score_correlation``: Pearson correlation of both models' scores.
- ``mean_score_change``, ``max_score_change``: mean and largest absolute change. The unit is
  probability or, for models without probabilities, the standard deviation of the baseline's scores.
- ``changed_top1``: share of groups (users, queries) whose row or item with the highest score is
  another one.
- ``top20_overlap``: only for retrieval, the share of the first 20 items that are also among the
  baseline's first 20.

Intervals treat groups as the independent observations, or rows if there are no groups
(``cluster_intervals.py``). ``changed_top1`` has Wilson's interval (1927), whose width is not 0 even
if no group changes. The largest change has no interval, because it describes only the measured
rows: other rows may change more.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import ndtri

from compressors.contracts import Estimate, ScoreUnit
from compressors.errors.metrics import MetricRefused
from compressors.metrics.cluster_intervals import (
    MIN_GROUPS,
    TAIL,
    GroupedValue,
    Groups,
    interval,
    mean_of_rows,
    weighted_mean,
)
from compressors.metrics.full_ranking import DEPTH, SCORES_AT_ONCE, RankedVectors
from compressors.metrics.point_estimates import Floats, Ints, number_groups


@dataclass(frozen=True)
class _Sums:
    """Sums by group for a correlation: of ``x``, ``d = y - x``, and their products.

    ``x`` and ``y`` are the scores of the two models. The sums contain ``d`` instead of ``y``, so
    that a correlation close to 1 is precise.
    """

    rows: Floats
    x: Floats
    d: Floats
    xx: Floats
    dd: Floats
    xd: Floats

    def correlation(self) -> GroupedValue:
        """Compute the correlation with and without each group; 0 if ``x`` or ``y`` is constant."""
        parts = (self.rows, self.x, self.d, self.xx, self.dd, self.xd)
        totals = [float(part.sum()) for part in parts]
        point = float(_compute_correlation(*(np.array([total]) for total in totals))[0])
        left_out = _compute_correlation(
            *(total - part for total, part in zip(totals, parts, strict=True))
        )
        return GroupedValue(point, left_out, self.rows)


def change_of_rows(
    baseline: ArrayLike, candidate: ArrayLike, group: ArrayLike | None, unit: ScoreUnit
) -> dict[str, Estimate]:
    """Compare two models' scores of the same rows.

    Args:
        baseline: finite scores of the baseline, ``(rows,)``.
        candidate: scores of the candidate, ``(rows,)``.
        group: user or query of each row, ``(rows,)``, or None.
        unit: ``probability``, or ``spread`` for changes in standard deviations of ``baseline``.

    Returns:
        The estimate of every metric, by name; ``changed_top1`` only if a group has two rows or
        more.

    Raises:
        MetricRefused: unequal lengths, no rows, or a score that is not finite.
    """
    before, after = (np.asarray(score, dtype=np.float64) for score in (baseline, candidate))
    if before.ndim != 1 or before.shape != after.shape or not before.size:
        raise MetricRefused("scores_unpaired", baseline=before.shape, candidate=after.shape)
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise MetricRefused("scores_not_finite")
    rows = before.size
    groups = Groups(np.arange(rows), np.ones(rows, dtype=np.intp))
    if group is not None:
        groups = Groups(*number_groups(group, rows))
    spread = float(before.std()) if unit == "spread" else 1.0
    change = np.abs(after - before) / (spread or 1.0)
    # If all scores are equal, subtracting the rounded mean would leave a variance above 0.
    x = before - (before.mean() if np.ptp(before) else before[0])
    d = after - before
    sums = _Sums(
        groups.rows.astype(float), *(groups.sum_by_group(v) for v in (x, d, x * x, d * d, x * d))
    )
    size = rows, groups.rows.size if group is not None else None
    estimates = _estimate_changes(
        sums.correlation(),
        mean_of_rows(change, groups),
        float(change.max()),
        unit,
        size,
        unchanged=not d.any(),
    )
    if group is not None and int(groups.rows.max()) > 1:
        estimates["changed_top1"] = _estimate_share(
            _compute_changed_best(before, after, groups), rows
        )
    return estimates


def change_of_rankings(
    baseline: RankedVectors, candidate: RankedVectors, rows: int, depth: int = DEPTH
) -> dict[str, Estimate]:
    """Compare two retrieval models' scores of all items for every query.

    Items that are hidden for a query are ignored. All items with the highest score count as best.
    If items with equal scores compete for the first ``depth`` ranks of the candidate, the selection
    is arbitrary, as in serving.

    Args:
        baseline: vectors of the baseline.
        candidate: vectors of the candidate, for the same queries and items.
        rows: number of test rows, for the estimates.
        depth: number of first items that are compared for ``top20_overlap``.

    Returns:
        The estimate of every metric. Changes are in standard deviations of the baseline's scores.

    Memory: a few float32 and float64 arrays of ``SCORES_AT_ONCE / 4`` scores, or of the scores of
    one query if these are more.
    """
    ranking = baseline.queries
    item_columns = [torch.from_numpy(np.ascontiguousarray(m.item.T)) for m in (baseline, candidate)]
    queries = ranking.query.size
    sums = np.zeros((5, queries))
    absolute, largest, ranked_items, changed, overlap = (np.zeros(queries) for _ in range(5))
    shift: float | None = None
    block_size = max(1, SCORES_AT_ONCE // 4 // ranking.items)
    for begin in range(0, queries, block_size):
        end = min(begin + block_size, queries)
        before, after = (
            torch.from_numpy(model.query[begin:end]) @ items
            for model, items in zip((baseline, candidate), item_columns, strict=True)
        )
        edges = np.array([begin, end]) * ranking.items
        hidden = torch.from_numpy(
            ranking.hidden[slice(*np.searchsorted(ranking.hidden, edges))] - edges[0]
        )
        is_ranked = torch.ones_like(before, dtype=torch.bool)
        is_ranked.view(-1)[hidden] = False
        block = slice(begin, end)
        ranked_items[block] = is_ranked.sum(dim=1).numpy()
        changed[block], overlap[block] = _compare_rankings(before, after, is_ranked, depth)
        x, y = before.double(), after.double()
        # Nearly the mean score: sums of squares around it do not lose precision by cancellation.
        if shift is None:
            shift = float(x[is_ranked].mean())
        d = (y - x) * is_ranked
        x = (x - shift) * is_ranked
        for index, product in enumerate((x, d, x * x, d * d, x * d)):
            sums[index, block] = product.sum(dim=1).numpy()
        absolute[block] = d.abs().sum(dim=1).numpy()
        largest[block] = d.abs().amax(dim=1).numpy()
    pairs = float(ranked_items.sum())
    # ``sums[2]`` are of x * x, ``sums[0]`` of x: the mean square minus the squared mean.
    spread = math.sqrt(max(float(sums[2].sum()) / pairs - (float(sums[0].sum()) / pairs) ** 2, 0))
    spread = spread or 1.0
    estimates = _estimate_changes(
        _Sums(ranked_items, *sums).correlation(),
        weighted_mean(absolute / ranked_items.clip(min=1) / spread, ranked_items),
        float(largest.max()) / spread,
        "spread",
        (rows, queries),
        unchanged=not largest.any(),
    )
    estimates["changed_top1"] = _estimate_share(changed, rows)
    estimates["top20_overlap"] = _clip_to_range(
        weighted_mean(overlap, np.ones(queries)), (rows, queries), largest=1
    )
    return estimates


def _estimate_changes(
    correlation: GroupedValue,
    mean: GroupedValue,
    largest: float,
    unit: ScoreUnit,
    size: tuple[int, int | None],
    *,
    unchanged: bool,
) -> dict[str, Estimate]:
    """Build the estimates of the three metrics that need no ranking.

    Args:
        correlation: the correlation of scores, with and without each group.
        mean: the mean absolute change, with and without each group.
        largest: the largest absolute change.
        unit: unit of the changes.
        size: number of rows, and number of groups or None.
        unchanged: whether all scores are equal in both models.
    """
    rows, groups = size
    if unchanged:
        correlation_estimate = Estimate(point=1.0, low=1.0, high=1.0, rows=rows, groups=groups)
    else:
        correlation_estimate = _clip_to_range(correlation, size, largest=1, smallest=-1)
    # A mean change is at most 1 in probabilities; in any unit, at most the largest change.
    return {
        "score_correlation": correlation_estimate,
        "mean_score_change": _clip_to_range(mean, size, 1 if unit == "probability" else largest),
        "max_score_change": Estimate(
            point=largest, low=largest, high=largest, rows=rows, groups=groups
        ),
    }


def _clip_to_range(
    value: GroupedValue, size: tuple[int, int | None], largest: float, smallest: float = 0
) -> Estimate:
    """Build an estimate whose interval is clipped to the metric's range.

    The range is from ``smallest`` to ``largest``; if ``largest`` is 0, no score changed, and the
    interval ends at the point. ``size`` is the number of rows, and the number of groups or None.
    """
    rows, groups = size
    count = value.weight.size
    unresolved = None
    if count >= MIN_GROUPS:
        low, high = interval(value)
    else:
        low, high = smallest, largest
        noun = "rows" if groups is None else "groups"
        unresolved = f"{count} {noun} in the data; an interval needs at least {MIN_GROUPS}"
    point = min(max(value.point, smallest), max(largest, smallest))
    return Estimate(
        point=point,
        low=min(max(low, smallest), point),
        high=max(min(high, largest), point) if largest else point,
        rows=rows,
        groups=groups,
        unresolved=unresolved,
    )


def _estimate_share(values: Floats, rows: int) -> Estimate:
    """Estimate the mean of values in [0, 1], one per group, with Wilson's interval."""
    number, share = values.size, float(values.mean())
    squared_quantile = float(ndtri(1 - TAIL)) ** 2
    center = (share + squared_quantile / (2 * number)) / (1 + squared_quantile / number)
    half_width = math.sqrt(
        squared_quantile * share * (1 - share) / number + (squared_quantile / (2 * number)) ** 2
    )
    half_width /= 1 + squared_quantile / number
    low, high = max(0.0, center - half_width), min(1.0, center + half_width)
    return Estimate(
        point=share, low=min(low, share), high=max(high, share), rows=rows, groups=number
    )


def _compute_changed_best(before: Floats, after: Floats, groups: Groups) -> Floats:
    """Return, for each group of two rows or more, the probability that the best row changes.

    All rows with the highest score are best rows. The probability is that a random best row of the
    candidate is not a best row of the baseline.
    """
    best = [score == _find_largest_scores(score, groups)[groups.ids] for score in (before, after)]
    shared = groups.sum_by_group(best[0] & best[1]) / groups.sum_by_group(best[1])
    changed: Floats = (1 - shared)[groups.rows > 1]
    return changed


def _find_largest_scores(score: Floats, groups: Groups) -> Floats:
    """Return the largest score of each group, ``(groups,)``."""
    permutation: Ints = np.lexsort((score, groups.ids))
    largest: Floats = score[permutation[np.cumsum(groups.rows) - 1]]
    return largest


def _compare_rankings(
    before: torch.Tensor, after: torch.Tensor, is_ranked: torch.Tensor, depth: int
) -> tuple[Floats, Floats]:
    """Compare two rankings of items, from scores ``(queries, items)`` of a block of queries.

    Returns:
        For each query, the probability that a random best item of the candidate is not a best item
        of the baseline, and the share of the first ``depth`` items that are the same.
    """
    before, after = (scores.masked_fill(~is_ranked, -torch.inf) for scores in (before, after))
    count = min(depth, before.shape[1])
    top_after = after.topk(count, dim=1).indices  # (queries, count)
    lowest_top_score = before.topk(count, dim=1).values[:, -1:]  # (queries, 1)
    overlap = (before.gather(1, top_after) >= lowest_top_score).double().mean(dim=1)
    best = [scores == scores.amax(dim=1, keepdim=True) for scores in (before, after)]
    changed = 1 - (best[0] & best[1]).sum(dim=1).double() / best[1].sum(dim=1)
    return changed.numpy(), overlap.numpy()


def _compute_correlation(
    rows: Floats, x: Floats, d: Floats, xx: Floats, dd: Floats, xd: Floats
) -> Floats:
    """Compute Pearson's correlation of ``x`` and ``x + d`` from sums; 0 if one is constant."""
    with np.errstate(divide="ignore", invalid="ignore"):
        variance, other, joint = xx - x * x / rows, dd - d * d / rows, xd - x * d / rows
        candidate = variance + 2 * joint + other
        ratio = (variance + joint) / np.sqrt(variance * candidate)
    # A constant candidate has a tiny variance from rounding.
    varies = np.isfinite(ratio) & (variance > 0) & (candidate > 1e-12 * variance)
    value: Floats = np.where(varies, ratio, 0.0).clip(-1, 1)
    return value
