"""Score changes: how much a candidate's scores differ from the baseline's on the same rows.

A metric such as AUC can be unchanged or even rise although single scores change much. The metrics
here compare the scores themselves and need no label.

- ``score_correlation``: Pearson correlation of both models' scores.
- ``mean_score_change``, ``max_score_change``: mean and largest absolute change, of the probability
  or, for scores without a scale, in standard deviations of the baseline's scores.
- ``changed_top1``: share of groups (users, queries) whose best row or item changes.
- ``top20_overlap``: retrieval only, share of the first 20 items that remain among the first 20.

Intervals treat groups as the independent units, or rows if there are no groups
(``cluster_intervals.py``). ``changed_top1`` has Wilson's interval (1927), which has a width even if
no group changes. The largest change has no interval: it describes only the measured rows, and other
rows can change more.
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

    With ``d`` instead of ``y`` a correlation close to 1 loses no precision.
    """

    rows: Floats
    x: Floats
    d: Floats
    xx: Floats
    dd: Floats
    xd: Floats

    def correlation(self) -> GroupedValue:
        """Compute Pearson correlation with and without each group; 0 if one side is constant."""
        parts = (self.rows, self.x, self.d, self.xx, self.dd, self.xd)
        totals = [float(part.sum()) for part in parts]
        point = float(_correlation(*(np.array([total]) for total in totals))[0])
        left_out = _correlation(*(total - part for total, part in zip(totals, parts, strict=True)))
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
        The estimate of every metric; ``changed_top1`` only if a group has two rows or more.

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
    # Subtracting a rounded mean would give equal scores a variance.
    x = before - (before.mean() if np.ptp(before) else before[0])
    d = after - before
    sums = _Sums(groups.rows.astype(float), *(groups.sums(v) for v in (x, d, x * x, d * d, x * d)))
    size = rows, groups.rows.size if group is not None else None
    estimates = _changes(
        sums.correlation(),
        mean_of_rows(change, groups),
        float(change.max()),
        unit,
        size,
        unchanged=not d.any(),
    )
    if group is not None and int(groups.rows.max()) > 1:
        estimates["changed_top1"] = _share(_changed_best(before, after, groups), rows)
    return estimates


def change_of_rankings(
    baseline: RankedVectors, candidate: RankedVectors, rows: int, depth: int = DEPTH
) -> dict[str, Estimate]:
    """Compare two retrieval models' scores of all items for every query.

    Items hidden from a query are left out. All items of the highest score count as best; which
    items of equal score are among the first ``depth`` is arbitrary in the candidate's ranking, as
    in serving.

    Args:
        baseline: vectors of the baseline.
        candidate: vectors of the candidate, for the same queries and items.
        rows: number of test rows, for the estimates.
        depth: number of first items that are compared for ``top20_overlap``.

    Returns:
        The estimate of every metric. Changes are in standard deviations of the baseline's scores.

    Memory: as ``full_ranking.relevant_places``.
    """
    ranking = baseline.queries
    item_columns = [torch.from_numpy(np.ascontiguousarray(m.item.T)) for m in (baseline, candidate)]
    queries = ranking.query.size
    sums = np.zeros((5, queries))
    absolute, largest, counted, changed, overlap = (np.zeros(queries) for _ in range(5))
    shift: float | None = None
    step = max(1, SCORES_AT_ONCE // 4 // ranking.items)
    for begin in range(0, queries, step):
        end = min(begin + step, queries)
        before, after = (
            torch.from_numpy(model.query[begin:end]) @ items
            for model, items in zip((baseline, candidate), item_columns, strict=True)
        )
        edges = np.array([begin, end]) * ranking.items
        hidden = torch.from_numpy(
            ranking.hidden[slice(*np.searchsorted(ranking.hidden, edges))] - edges[0]
        )
        shown = torch.ones_like(before, dtype=torch.bool)
        shown.view(-1)[hidden] = False
        block = slice(begin, end)
        counted[block] = shown.sum(dim=1).numpy()
        changed[block], overlap[block] = _ranked(before, after, shown, depth)
        x, y = before.double(), after.double()
        if shift is None:
            shift = float(x[shown].mean())
        d = (y - x) * shown
        x = (x - shift) * shown
        for place, product in enumerate((x, d, x * x, d * d, x * d)):
            sums[place, block] = product.sum(dim=1).numpy()
        absolute[block] = d.abs().sum(dim=1).numpy()
        largest[block] = d.abs().amax(dim=1).numpy()
    pairs = float(counted.sum())
    spread = math.sqrt(max(float(sums[2].sum()) / pairs - (float(sums[0].sum()) / pairs) ** 2, 0))
    spread = spread or 1.0
    estimates = _changes(
        _Sums(counted, *sums).correlation(),
        weighted_mean(absolute / counted.clip(min=1) / spread, counted),
        float(largest.max()) / spread,
        "spread",
        (rows, queries),
        unchanged=not largest.any(),
    )
    estimates["changed_top1"] = _share(changed, rows)
    estimates["top20_overlap"] = _bounded(
        weighted_mean(overlap, np.ones(queries)), (rows, queries), 1
    )
    return estimates


def _changes(
    correlation: GroupedValue,
    mean: GroupedValue,
    largest: float,
    unit: ScoreUnit,
    size: tuple[int, int | None],
    *,
    unchanged: bool,
) -> dict[str, Estimate]:
    """Estimate the three metrics that need no ranking.

    ``size`` is the number of rows and that of groups, None without groups.
    """
    rows, groups = size
    if unchanged:
        same = Estimate(point=1.0, low=1.0, high=1.0, rows=rows, groups=groups)
    else:
        same = _bounded(correlation, size, 1, smallest=-1)
    return {
        "score_correlation": same,
        "mean_score_change": _bounded(mean, size, 1 if unit == "probability" else largest),
        "max_score_change": Estimate(
            point=largest, low=largest, high=largest, rows=rows, groups=groups
        ),
    }


def _bounded(
    value: GroupedValue, size: tuple[int, int | None], largest: float, smallest: float = 0
) -> Estimate:
    """Build an estimate whose interval is clipped to the range of the metric."""
    rows, groups = size
    units = value.weight.size
    unresolved = None
    if units >= MIN_GROUPS:
        low, high = interval(value)
    else:
        low, high = smallest, largest
        noun = "rows" if groups is None else "groups"
        unresolved = f"{units} {noun} in the data; an interval needs at least {MIN_GROUPS}"
    point = min(max(value.point, smallest), max(largest, smallest))
    return Estimate(
        point=point,
        low=min(max(low, smallest), point),
        high=max(min(high, largest), point) if largest else point,
        rows=rows,
        groups=groups,
        unresolved=unresolved,
    )


def _share(values: Floats, rows: int) -> Estimate:
    """Estimate the mean of values in [0, 1], one per group, with Wilson's interval."""
    number, share = values.size, float(values.mean())
    squared = float(ndtri(1 - TAIL)) ** 2
    center = (share + squared / (2 * number)) / (1 + squared / number)
    reach = math.sqrt(squared * share * (1 - share) / number + (squared / (2 * number)) ** 2)
    reach /= 1 + squared / number
    low, high = max(0.0, center - reach), min(1.0, center + reach)
    return Estimate(
        point=share, low=min(low, share), high=max(high, share), rows=rows, groups=number
    )


def _changed_best(before: Floats, after: Floats, groups: Groups) -> Floats:
    """Probability that the candidate's best row is not among the baseline's best, by group.

    Only groups of at least two rows count. All rows of the highest score are best, and one of the
    candidate's best rows is drawn.
    """
    best = [score == _largest(score, groups)[groups.ids] for score in (before, after)]
    shared = groups.sums(best[0] & best[1]) / groups.sums(best[1])
    changed: Floats = (1 - shared)[groups.rows > 1]
    return changed


def _largest(score: Floats, groups: Groups) -> Floats:
    """Return the largest score of each group, ``(groups,)``."""
    order: Ints = np.lexsort((score, groups.ids))
    largest: Floats = score[order[np.cumsum(groups.rows) - 1]]
    return largest


def _ranked(
    before: torch.Tensor, after: torch.Tensor, shown: torch.Tensor, depth: int
) -> tuple[Floats, Floats]:
    """Probability of another best item, and share of the first ``depth`` items kept, by query."""
    before, after = (scores.masked_fill(~shown, -torch.inf) for scores in (before, after))
    places = min(depth, before.shape[1])
    first = after.topk(places, dim=1).indices
    least = before.topk(places, dim=1).values[:, -1:]
    overlap = (before.gather(1, first) >= least).double().mean(dim=1)
    best = [scores == scores.amax(dim=1, keepdim=True) for scores in (before, after)]
    changed = 1 - (best[0] & best[1]).sum(dim=1).double() / best[1].sum(dim=1)
    return changed.numpy(), overlap.numpy()


def _correlation(rows: Floats, x: Floats, d: Floats, xx: Floats, dd: Floats, xd: Floats) -> Floats:
    """Compute Pearson correlation of ``x`` and ``x + d`` from sums; 0 if one is constant."""
    with np.errstate(divide="ignore", invalid="ignore"):
        variance, other, joint = xx - x * x / rows, dd - d * d / rows, xd - x * d / rows
        candidate = variance + 2 * joint + other
        ratio = (variance + joint) / np.sqrt(variance * candidate)
    # A constant candidate has a tiny variance from rounding.
    varies = np.isfinite(ratio) & (variance > 0) & (candidate > 1e-12 * variance)
    value: Floats = np.where(varies, ratio, 0.0).clip(-1, 1)
    return value
