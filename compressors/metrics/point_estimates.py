"""Quality metrics (AUC, log loss, NDCG and others) as plain functions of 1-D arrays.

All are exact: equal scores are ties, and sums are float64 or integer. They sort at most a few
times, so millions of rows take seconds. ``intervals.py`` computes their confidence intervals.

A row is an impression, with one entry in ``label``, ``score`` and ``group`` each. A score that is
not a finite number raises an error, because a model that outputs NaN is broken.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compressors.errors.metrics import MetricRefused

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]

PROBABILITY_FLOOR = float(np.finfo(np.float32).eps)
"""Log loss clips probabilities to at least this and at most 1 minus this (1.19e-7).

Served models output float32, where a confident sigmoid is exactly 0 or 1; without a floor one such
row would make the whole loss infinite. The largest loss of a row is 15.943 nats.
"""


def auc(label: ArrayLike, score: ArrayLike) -> float:
    """Compute the area under the ROC curve.

    It is the share of correctly ordered pairs of a positive and a negative row.

    Args:
        label: 0 or 1, ``(rows,)``.
        score: any finite score, ``(rows,)``, higher means more likely positive.

    Returns:
        A float in [0, 1], unitless. A pair with equal scores counts half.

    Raises:
        MetricRefused: all labels are equal, a label is neither 0 nor 1, a score is not finite, or
            lengths differ.

    Source: Hanley and McNeil 1982, https://doi.org/10.1148/radiology.143.1.7063747 (the
    Mann-Whitney form).

    Example:
        >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.8])
        0.875
    """
    positive, scores = check_labels_and_scores(label, score)
    require_both_classes("auc", positive)
    negatives = np.sort(scores[~positive])
    # Sorted queries read the sorted negatives sequentially instead of at random.
    positives = np.sort(scores[positive])
    below = np.searchsorted(negatives, positives, side="left")
    not_above = np.searchsorted(negatives, positives, side="right")
    pairs = positives.size * negatives.size
    return float(below.sum() + not_above.sum()) / (2 * pairs)


def row_logloss(label: ArrayLike, probability: ArrayLike) -> Floats:
    """Compute the negative log likelihood of every row.

    Args:
        label: 0 or 1, ``(rows,)``.
        probability: probability of label 1, in [0, 1], ``(rows,)``. Clipped to at least
            ``PROBABILITY_FLOOR`` and at most ``1 - PROBABILITY_FLOOR``.

    Returns:
        float64 ``(rows,)``, nats, in [0, 15.943].

    Raises:
        MetricRefused: a probability outside [0, 1] (a logit, most likely), a label other
            than 0 and 1, NaN, or unequal lengths.
    """
    positive, chance = check_labels_and_scores(label, probability)
    outside = (chance < 0) | (chance > 1)
    if outside.any():
        first = chance[outside][0]
        raise MetricRefused(
            "probabilities_outside", count=int(outside.sum()), rows=chance.size, first=float(first)
        )
    chance = np.clip(chance, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return -np.log(np.where(positive, chance, 1 - chance))


def logloss(label: ArrayLike, probability: ArrayLike) -> float:
    """Compute the mean negative log likelihood in nats; for arguments see ``row_logloss``.

    Example:
        >>> round(logloss([1, 0], [0.9, 0.2]), 4)
        0.1643
    """
    return float(row_logloss(label, probability).mean())


def normalized_entropy(label: ArrayLike, probability: ArrayLike) -> float:
    """Compute the log loss divided by that of always predicting the share of positives.

    Args:
        label: 0 or 1, ``(rows,)``, both present.
        probability: probability of label 1, in [0, 1], ``(rows,)``, clipped as for ``logloss``.

    Returns:
        A float >= 0, unitless. A perfect model has 0, a model that predicts the base rate 1.

    Raises:
        MetricRefused: labels or scores are not valid, or all labels are equal: their entropy is 0.

    Source: He et al. 2014, https://doi.org/10.1145/2648584.2648589. Differs: nats instead
    of bits in both parts, which cancels.
    """
    losses = row_logloss(label, probability)
    positive = to_booleans(label)
    require_both_classes("normalized_entropy", positive)
    return float(losses.mean()) / float(base_entropy(float(positive.mean())))


def base_entropy(rate: float) -> float:
    """Compute the entropy in nats of a binary label with probability ``rate``, in (0, 1)."""
    return float(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def group_auc(label: ArrayLike, score: ArrayLike, group: ArrayLike) -> tuple[Floats, Ints]:
    """Compute the AUC within every group that has both classes.

    Args:
        label: 0 or 1, ``(rows,)``.
        score: any finite score, ``(rows,)``.
        group: user or query of each row, ``(rows,)``, in any order.

    Returns:
        AUC, float64 ``(groups,)``, and number of rows, ``(groups,)``, of the groups with both
        classes, in sorted order. Both may be empty.

    Raises:
        MetricRefused: a label other than 0 and 1, NaN, or unequal lengths.
    """
    positive, scores = check_labels_and_scores(label, score)
    ids, rows = number_groups(group, positive.size)
    positives = np.bincount(ids, weights=positive, minlength=rows.size)
    has_both_classes = (positives > 0) & (positives < rows)
    won = wins_within_groups(positive, scores, ids, rows)[has_both_classes]
    positives, size = positives[has_both_classes], rows[has_both_classes]
    return won / (positives * (size - positives)), size


def wins_within_groups(positive: Bools, scores: Floats, ids: Ints, rows: Ints) -> Floats:
    """Count the correctly ordered pairs in each group, ties as half: float64 ``(groups,)``.

    Args:
        positive: whether each row is positive, ``(rows,)``.
        scores: score of each row, ``(rows,)``.
        ids: group number of each row, ``(rows,)``.
        rows: number of rows of each group, ``(groups,)``.
    """
    permutation = np.lexsort((scores, ids))
    run = equal_score_runs(ids[permutation], scores[permutation])
    run_size = np.bincount(run)
    run_end = np.cumsum(run_size)
    group_start = np.cumsum(rows) - rows
    # Rows of equal score share the mean of the ranks they occupy; ranks start at 1 in a group.
    rank = (run_end - (run_size - 1) / 2)[run] - group_start[ids[permutation]]
    positives = np.bincount(ids, weights=positive, minlength=rows.size)
    rank_sum = np.bincount(
        ids[permutation], weights=rank * positive[permutation], minlength=rows.size
    )
    won: Floats = rank_sum - positives * (positives + 1) / 2
    return won


def gauc(label: ArrayLike, score: ArrayLike, group: ArrayLike) -> float:
    """Compute the mean AUC within groups, weighted by their impressions.

    Groups of one class have no AUC and are left out; ``gauc_left_out`` is their share of rows.

    Args:
        label: 0 or 1, ``(rows,)``.
        score: any finite score, ``(rows,)``; only its order inside a group matters.
        group: user or query of each row, ``(rows,)``, in any order.

    Returns:
        A float in [0, 1], unitless.

    Raises:
        MetricRefused: no group has both classes, or ``group_auc`` raises it.

    Source: Zhu et al. 2017, https://arxiv.org/abs/1703.02091.

    Example:
        >>> gauc([0, 1, 1, 0, 1], [0.2, 0.1, 0.9, 0.8, 0.3], ["a", "a", "b", "b", "c"])
        0.5
    """
    value, impressions = group_auc(label, score, group)
    if value.size == 0:
        raise MetricRefused("groups_of_one_class")
    return float(value @ impressions / impressions.sum())


def gauc_left_out(label: ArrayLike, group: ArrayLike) -> float:
    """Compute the share of rows, in [0, 1], in groups of one class, which ``gauc`` leaves out."""
    positive = to_booleans(label)
    ids, rows = number_groups(group, positive.size)
    positives = np.bincount(ids, weights=positive, minlength=rows.size)
    has_both_classes = (positives > 0) & (positives < rows)
    return 1 - float(rows[has_both_classes].sum()) / positive.size


def group_ndcg(label: ArrayLike, score: ArrayLike, group: ArrayLike, k: int) -> Floats:
    """Compute the NDCG of the first ``k`` ranks of every group that has a relevant item.

    Args:
        label: relevance >= 0, ``(rows,)``; 0 means irrelevant. A gain is ``2**label - 1``.
        score: any finite score, ``(rows,)``, higher ranks first. Items of equal score share
            the gains of their ranks, which is the mean over all their orders. So the order of rows
            in a file does not affect the result.
        group: the list that each row belongs to, ``(rows,)``, in any order.
        k: number of ranks that count; if a group has fewer rows, all of them count.

    Returns:
        float64 ``(groups,)`` in [0, 1], for groups in sorted order. Groups without a relevant item
        are left out, because their NDCG is undefined.

    Raises:
        MetricRefused: ``k`` below 1, a label that is negative or above 30, NaN, or unequal
            lengths.
    """
    if k < 1:
        raise MetricRefused("depth_below_one", depth=k)
    relevance, scores = check_grades_and_scores(label, score)
    gain = np.exp2(relevance) - 1
    ids, rows = number_groups(group, relevance.size)
    group_start = np.cumsum(rows) - rows

    def discounted(permutation: Ints, gains: Floats) -> NDArray[Any]:
        rank_from_zero = np.arange(permutation.size) - group_start[ids[permutation]]
        discount = np.where(rank_from_zero < k, 1 / np.log2(rank_from_zero + 2), 0.0)
        return np.bincount(ids[permutation], weights=gains * discount, minlength=rows.size)

    best = np.lexsort((-gain, ids))
    ideal_gain = discounted(best, gain[best])
    ranked = np.lexsort((-scores, ids))
    run = equal_score_runs(ids[ranked], scores[ranked])
    shared_gains = (np.bincount(run, weights=gain[ranked]) / np.bincount(run))[run]
    reached_gain = discounted(ranked, shared_gains)
    relevant = ideal_gain > 0
    value: Floats = reached_gain[relevant] / ideal_gain[relevant]
    return value


def ndcg(label: ArrayLike, score: ArrayLike, group: ArrayLike, k: int = 10) -> float:
    """Compute the mean NDCG of the first ``k`` ranks over groups with a relevant item.

    See ``group_ndcg`` for the arguments. Every group has the same weight.

    Returns:
        A float in [0, 1], unitless.

    Raises:
        MetricRefused: no group has a relevant item, or ``group_ndcg`` raises it.

    Source: Burges et al. 2005, https://doi.org/10.1145/1102351.1102363 (gains ``2**rel - 1``,
    discount ``1 / log2(rank + 1)`` with ranks from 1); ties as in McSherry and Najork 2008,
    https://doi.org/10.1007/978-3-540-78646-7_38.

    Example:
        >>> round(ndcg([0, 0, 1], [0.9, 0.1, 0.5], [7, 7, 7], k=2), 4)
        0.6309
    """
    value = group_ndcg(label, score, group, k)
    if value.size == 0:
        raise MetricRefused("relevant_items_missing")
    return float(value.mean())


def to_booleans(label: ArrayLike) -> Bools:
    """Convert labels to booleans ``(rows,)``.

    Raises:
        MetricRefused: a label other than 0 and 1, or no row.
    """
    labels = _to_column("label", label)
    other = (labels != 0) & (labels != 1)
    if other.any():
        raise MetricRefused(
            "labels_not_binary",
            count=int(other.sum()),
            rows=labels.size,
            first=float(labels[other][0]),
        )
    positive: Bools = labels == 1
    return positive


def require_both_classes(metric: str, positive: Bools) -> None:
    """Raise if all labels are of one class, because ``metric`` is then undefined.

    Raises:
        MetricRefused: all labels are equal.
    """
    count = int(positive.sum())
    if count in (0, positive.size):
        raise MetricRefused("one_class_only", metric=metric, positive=count, rows=positive.size)


def _to_column(name: str, values: ArrayLike) -> Floats:
    """Check a column and convert it to float64, which preserves ties of float16 and float32."""
    column = np.asarray(values)
    if column.ndim != 1 or column.size == 0:
        raise MetricRefused("column_shape", column=name, shape=column.shape)
    if column.dtype.kind not in "biuf":
        raise MetricRefused("column_not_numeric", column=name, dtype=str(column.dtype))
    column = column.astype(np.float64, copy=False)
    nonfinite = int(column.size - np.isfinite(column).sum())
    if nonfinite:
        raise MetricRefused("column_not_finite", column=name, count=nonfinite, rows=column.size)
    return column


def _require_same_length(*sizes: int) -> None:
    """Raise ``MetricRefused`` if the sizes differ."""
    if len(set(sizes)) > 1:
        raise MetricRefused("lengths_differ", lengths=sizes)


def check_labels_and_scores(label: ArrayLike, score: ArrayLike) -> tuple[Bools, Floats]:
    """Check labels and scores; return booleans and float64, both ``(rows,)``.

    Raises:
        MetricRefused: a label other than 0 and 1, NaN, no row, or unequal lengths.
    """
    positive, scores = to_booleans(label), _to_column("score", score)
    _require_same_length(positive.size, scores.size)
    return positive, scores


def check_grades_and_scores(label: ArrayLike, score: ArrayLike) -> tuple[Floats, Floats]:
    """Check relevance grades and scores; return both as float64 ``(rows,)``.

    Raises:
        MetricRefused: a label that is negative or above 30, NaN, no row, or unequal lengths.
    """
    grades, scores = _to_column("label", label), _to_column("score", score)
    _require_same_length(grades.size, scores.size)
    if grades.min() < 0 or grades.max() > 30:
        raise MetricRefused(
            "grades_outside", lowest=float(grades.min()), highest=float(grades.max())
        )
    return grades, scores


def number_groups(group: ArrayLike, size: int) -> tuple[Ints, Ints]:
    """Number groups from 0 in sorted order.

    Returns:
        Each row's group number ``(rows,)`` and each group's number of rows ``(groups,)``.

    Raises:
        MetricRefused: unequal lengths, or a group that is not a finite number.
    """
    names = np.asarray(group)
    if names.ndim != 1:
        raise MetricRefused("group_shape", shape=names.shape)
    _require_same_length(size, names.size)
    if names.dtype.kind == "f" and not np.isfinite(names).all():
        raise MetricRefused("group_not_finite")
    _, ids, rows = np.unique(names, return_inverse=True, return_counts=True)
    return ids, rows


def equal_score_runs(ids: Ints, scores: Floats) -> Ints:
    """Number the runs of rows with equal group and score, from 0; rows are sorted by both."""
    new = np.ones(ids.size, dtype=np.intp)
    new[1:] = (ids[1:] != ids[:-1]) | (scores[1:] != scores[:-1])
    return np.cumsum(new) - 1
