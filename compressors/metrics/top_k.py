"""Metrics of the first k ranks for items that are relevant or not: MRR, MAP, hits and others.

Items of one list with equal scores are a *tie block*. Their order is random, so each metric is its
mean over all orders within the blocks, as NDCG in ``point_estimates.py``. The means are exact. Most
have a closed form; the rank of the first relevant item needs a loop over the positions of a block.

``tie_blocks_of_rows`` builds the blocks of lists of rows. ``full_ranking.py`` builds the blocks of
rankings of a catalogue.

Source: the formulas for ties are those of McSherry and Najork 2008,
https://doi.org/10.1007/978-3-540-78646-7_38. Depths and denominators are those of trec_eval,
https://github.com/usnistgov/trec_eval (``recip_rank``, ``map_cut``, ``success``, ``recall``,
``P``).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compressors.errors.metrics import MetricRefused
from compressors.metrics.point_estimates import (
    Floats,
    check_grades_and_scores,
    equal_score_runs,
    number_groups,
)

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class TieBlocks:
    """The tie blocks with a relevant item, of lists that all have a relevant item.

    Blocks are sorted by list and, within a list, by rank. Blocks after the last rank that counts
    may be missing.

    Attributes:
        owner: index of the list of each block, int64 ``(blocks,)``.
        above: number of items of the list with a higher score, int64 ``(blocks,)``.
        size: number of items of each block, int64 ``(blocks,)``.
        relevant: number of relevant items of each block, int64 ``(blocks,)``, at least 1.
        relevant_of_list: number of relevant items of each list, int64 ``(lists,)``.
    """

    owner: Counts
    above: Counts
    size: Counts
    relevant: Counts
    relevant_of_list: Counts

    def relevant_above(self) -> Counts:
        """Count the relevant items of the list with a higher score: int64 ``(blocks,)``."""
        before = np.cumsum(self.relevant) - self.relevant
        first_block = np.searchsorted(self.owner, self.owner, side="left")
        result: Counts = before - before[first_block]
        return result

    def positions(self, k: int) -> Counts:
        """Count the positions of each block that are among the first ``k`` ranks."""
        return np.clip(k - self.above, 0, self.size)

    def sum_by_list(self, values: Floats) -> Floats:
        """Sum values of blocks ``(blocks,)`` by list: float64 ``(lists,)``."""
        total = np.bincount(self.owner, weights=values, minlength=self.relevant_of_list.size)
        return total.astype(np.float64, copy=False)


def tie_blocks_of_rows(label: ArrayLike, score: ArrayLike, group: ArrayLike) -> TieBlocks:
    """Build the tie blocks of the lists that rows form.

    Args:
        label: relevance in [0, 30], ``(rows,)``. A row is relevant if its label is above 0.
        score: any finite score, ``(rows,)``, higher ranks first.
        group: the list that each row belongs to, ``(rows,)``, in any order.

    Returns:
        The blocks. Lists are in sorted order of their names; those without a relevant row are left
        out.

    Raises:
        MetricRefused: a label outside [0, 30], NaN, or unequal lengths.
    """
    grades, scores = check_grades_and_scores(label, score)
    ids, rows = number_groups(group, grades.size)
    relevant_of_list = np.bincount(ids, weights=grades > 0, minlength=rows.size).astype(np.int64)
    ranked = np.lexsort((-scores, ids))
    run = equal_score_runs(ids[ranked], scores[ranked])
    size = np.bincount(run)
    relevant = np.bincount(run, weights=grades[ranked] > 0).astype(np.int64)
    start = np.cumsum(size) - size
    list_of_run = ids[ranked[start]]
    above = start - (np.cumsum(rows) - rows)[list_of_run]
    number = np.cumsum(relevant_of_list > 0) - 1  # of each list, without those left out
    blocks = relevant > 0
    return TieBlocks(
        number[list_of_run[blocks]],
        above[blocks],
        size[blocks],
        relevant[blocks],
        relevant_of_list[relevant_of_list > 0],
    )


def reciprocal_rank(blocks: TieBlocks, k: int) -> Floats:
    """Compute 1 / rank of the first relevant item, or 0 if that rank is above ``k``.

    Args:
        blocks: the tie blocks of the lists.
        k: number of ranks that count, at least 1.

    Returns:
        float64 ``(lists,)`` in [0, 1].

    Raises:
        MetricRefused: ``k`` is below 1.
    """
    first = _find_first_blocks(blocks, k)
    # ``none_yet``: probability that no earlier position of the block has a relevant item.
    value, none_yet = np.zeros(first.owner.size), np.ones(first.owner.size)
    for position, at in _iterate_positions(first, k):
        # Given that the positions before it have no relevant item, this one has one with
        # probability ``relevant / left``.
        left, relevant = first.size[at] - position, first.relevant[at]
        value[at] += none_yet[at] * (relevant / left) / (first.above[at] + position + 1)
        none_yet[at] *= (left - relevant) / left
    return first.sum_by_list(value)


def hit(blocks: TieBlocks, k: int) -> Floats:
    """Compute the probability that a relevant item is among the first ``k`` ranks.

    It is 0 or 1 unless ties cross rank ``k``. For arguments and result see ``reciprocal_rank``.
    """
    first = _find_first_blocks(blocks, k)
    none_yet = np.ones(first.owner.size)  # as in ``reciprocal_rank``
    for position, at in _iterate_positions(first, k):
        left = first.size[at] - position
        none_yet[at] *= (left - first.relevant[at]) / left
    return first.sum_by_list(1 - none_yet)


def average_precision(blocks: TieBlocks, k: int) -> Floats:
    """Compute the average precision of the first ``k`` ranks.

    It is the sum of the precisions at the ranks of the relevant items up to ``k``, divided by the
    number of all relevant items of the list. So it is below 1 for every ranking of a list with more
    than ``k`` relevant items. Another convention divides by the smaller of that number and ``k``.

    For arguments and result see ``reciprocal_rank``.
    """
    _require_depth(k)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, k + 1))])
    positions = blocks.positions(k)
    begin = np.minimum(blocks.above, k)
    # Rank p of a block is relevant with probability ``relevant / size``. Then the expected number
    # of relevant items up to p is ``relevant_above + 1 + (p - above - 1) * others``, where
    # ``others`` is the share of relevant items among the other items of the block. The sum of its
    # quotients by p contains the sum of 1 / p, a difference of harmonic numbers.
    others = (blocks.relevant - 1) / np.maximum(blocks.size - 1, 1)
    constant = blocks.relevant_above() + 1 - (blocks.above + 1) * others
    precisions = constant * (harmonic[begin + positions] - harmonic[begin]) + others * positions
    total = blocks.sum_by_list(blocks.relevant / blocks.size * precisions)
    # Rounding can give 1 + 2e-16.
    value: Floats = np.minimum(total / blocks.relevant_of_list, 1.0)
    return value


def recall(blocks: TieBlocks, k: int) -> Floats:
    """Compute the share of a list's relevant items that are among the first ``k`` ranks.

    For arguments and result see ``reciprocal_rank``.
    """
    value: Floats = _count_relevant_in_top(blocks, k) / blocks.relevant_of_list
    return value


def precision(blocks: TieBlocks, k: int) -> Floats:
    """Compute the number of relevant items among the first ``k`` ranks, divided by ``k``.

    The divisor is ``k`` for lists with fewer items, too. For arguments and result see
    ``reciprocal_rank``.
    """
    return _count_relevant_in_top(blocks, k) / k


def _count_relevant_in_top(blocks: TieBlocks, k: int) -> Floats:
    """Compute the expected number of relevant items among the first ``k`` ranks, ``(lists,)``."""
    _require_depth(k)
    return blocks.sum_by_list(blocks.relevant * (blocks.positions(k) / blocks.size))


def _find_first_blocks(blocks: TieBlocks, k: int) -> TieBlocks:
    """Return the first block of each list, if it begins within the first ``k`` ranks."""
    _require_depth(k)
    first = (blocks.relevant_above() == 0) & (blocks.above < k)
    return TieBlocks(
        blocks.owner[first],
        blocks.above[first],
        blocks.size[first],
        blocks.relevant[first],
        blocks.relevant_of_list,
    )


def _iterate_positions(blocks: TieBlocks, k: int) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yield each position in a block, from 0, with the indices of the blocks that have it.

    Positions after rank ``k`` are omitted, and those that cannot have a block's first relevant
    item.
    """
    last = np.minimum(blocks.positions(k), blocks.size - blocks.relevant + 1)
    position, at = 0, np.flatnonzero(last > 0)
    while at.size:
        yield position, at
        position += 1
        at = at[last[at] > position]


def _require_depth(k: int) -> None:
    if k < 1:
        raise MetricRefused("depth_below_one", depth=k)
