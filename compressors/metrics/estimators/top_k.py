"""Estimators of MRR, MAP, hits, recall and precision, whose items are relevant or not.

Each of them evaluates lists of rows and rankings of the catalogue; ``metrics/top_k.py`` has the
formulas. A tie block is the items of one list that have the same score.
"""

from typing import ClassVar, Protocol

from numpy.typing import ArrayLike

from compressors.metrics import top_k
from compressors.metrics.estimators.lists import ListEstimator
from compressors.metrics.full_ranking import RelevantRanks
from compressors.metrics.point_estimates import Floats
from compressors.metrics.top_k import TieBlocks


class Formula(Protocol):
    """A metric of the first ``k`` ranks of each list, float64 ``(lists,)`` in [0, 1]."""

    def __call__(self, blocks: TieBlocks, k: int) -> Floats:
        """Compute the metric from the tie blocks of the lists."""


class TopKEstimator(ListEstimator):
    """Base class: a metric of the tie blocks of a list or of a query's ranking.

    Subclasses set ``formula``.
    """

    formula: ClassVar[Formula]

    def compute_per_list(self, label: ArrayLike, score: ArrayLike, group: ArrayLike) -> Floats:
        """Compute the metric of each list with a relevant row, float64 ``(lists,)``."""
        return self.formula(top_k.tie_blocks_of_rows(label, score, group), self.depth)

    def compute_per_query(self, ranks: RelevantRanks) -> Floats:
        """Compute the metric of each query, float64 ``(queries,)``."""
        return self.formula(ranks.group_ties(), self.depth)


class ReciprocalRank(TopKEstimator):
    """1 / rank of the first relevant item; the mean over lists is MRR."""

    formula = staticmethod(top_k.reciprocal_rank)


class AveragePrecision(TopKEstimator):
    """Average precision, divided by the number of all relevant items; the mean is MAP."""

    formula = staticmethod(top_k.average_precision)


class Hit(TopKEstimator):
    """Whether a relevant item is among the first ranks; the mean is the hit rate."""

    formula = staticmethod(top_k.hit)


class RecallOfRows(TopKEstimator):
    """The share of a list's relevant rows that are among the first ``depth`` ranks."""

    formula = staticmethod(top_k.recall)


class Precision(TopKEstimator):
    """The share of the first ranks that have a relevant item."""

    formula = staticmethod(top_k.precision)
