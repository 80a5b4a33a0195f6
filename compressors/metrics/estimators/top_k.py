"""Estimators of MRR, MAP, hits and precision, whose items are relevant or not.

Each of them evaluates lists of rows and rankings of the catalogue; ``metrics/top_k.py`` has the
formulas.
"""

from numpy.typing import ArrayLike

from compressors.metrics import top_k
from compressors.metrics.estimators.lists import ListEstimator
from compressors.metrics.full_ranking import RelevantPlaces
from compressors.metrics.point_estimates import Floats
from compressors.metrics.top_k import TieBlocks


class TopKEstimator(ListEstimator):
    """Base class: a metric of the tie blocks of a list or of a query's ranking."""

    def of_blocks(self, blocks: TieBlocks) -> Floats:
        """Compute the metric of each list, float64 ``(lists,)`` in [0, 1]."""
        raise NotImplementedError

    def of_lists(self, label: ArrayLike, score: ArrayLike, group: ArrayLike) -> Floats:
        """Compute the metric of each list with a relevant row, float64 ``(lists,)``."""
        return self.of_blocks(top_k.tie_blocks_of_rows(label, score, group))

    def of_queries(self, places: RelevantPlaces) -> Floats:
        """Compute the metric of each query, float64 ``(queries,)``."""
        return self.of_blocks(places.tie_blocks())


class ReciprocalRank(TopKEstimator):
    """1 / rank of the first relevant item; the mean over lists is MRR."""

    def of_blocks(self, blocks: TieBlocks) -> Floats:
        """Compute the reciprocal rank of each list."""
        return top_k.reciprocal_rank(blocks, self.depth)


class AveragePrecision(TopKEstimator):
    """Average precision, divided by the number of all relevant items; the mean is MAP."""

    def of_blocks(self, blocks: TieBlocks) -> Floats:
        """Compute the average precision of each list."""
        return top_k.average_precision(blocks, self.depth)


class Hit(TopKEstimator):
    """Whether a relevant item is among the first ranks; the mean is the hit rate."""

    def of_blocks(self, blocks: TieBlocks) -> Floats:
        """Compute the probability of a hit of each list."""
        return top_k.hit(blocks, self.depth)


class Precision(TopKEstimator):
    """The share of the first ranks that have a relevant item."""

    def of_blocks(self, blocks: TieBlocks) -> Floats:
        """Compute the precision of each list."""
        return top_k.precision(blocks, self.depth)
