"""Compare the quality of two models at a time on the same test rows. No Prefect.

Models of the tasks ``ctr`` and ``ranking`` are compared by one score per row and output.
``retrieval`` models rank the whole catalogue for every query, and are compared by the metrics of
these rankings.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compressors.contracts import ITEMS, Estimate, Output, Signature, Split
from compressors.contracts import metric as declared_metric
from compressors.contracts.metrics.metric import metric_name_of_output
from compressors.core.batches import Rows
from compressors.metrics import intervals
from compressors.metrics.estimators import builtin as builtin  # so that the code digest covers it
from compressors.metrics.full_ranking import (
    RankedVectors,
    RankingQueries,
    ranking_metrics,
    ranking_queries,
)
from compressors.metrics.intervals import PairedEstimate
from compressors.metrics.score_change import change_of_rankings, change_of_rows
from compressors.metrics.validation_ranking import interactions
from tasks.bundles.loading import fetch_split
from tasks.orchestration.documents import Ranking
from tasks.retrieval.towers import Tower, encode_catalogue, encode_queries

Array = NDArray[Any]


class Quality(Protocol):
    """The results of several models on the same rows; models are identified by name."""

    def paired(self, metric: str, baseline: str, candidate: str) -> PairedEstimate:
        """Estimate one metric of two models, and its difference with a paired interval."""

    def score_change(self, baseline: str, candidate: str) -> Mapping[str, Estimate]:
        """Measure how much the scores of two models differ; returns estimates by metric.

        Args:
            baseline: name of the model to compare with.
            candidate: name of the compared model.
        """


@dataclass(frozen=True)
class RowQuality:
    """The quality of models whose outputs are one score per row.

    Attributes:
        outputs: the outputs of the models.
        label: labels ``(rows,)``, or ``(rows, outputs)`` for several outputs; NaN where a row has
            none, which then does not count for the metrics of this output.
        group: group ids ``(rows,)``; None if the signature has no groups.
        scores: scores of each model, in the shape of the labels.
        seed: seed of the bootstrap.
    """

    outputs: tuple[Output, ...]
    label: Array
    group: Array | None
    scores: Mapping[str, Array]
    seed: int

    def score_change(self, baseline: str, candidate: str) -> Mapping[str, Estimate]:
        """Measure how much the scores of two models differ, row by row.

        Mean and largest changes are in the unit of the output's task kind (``score_unit``).
        """
        changes: dict[str, Estimate] = {}
        for index, output in enumerate(self.outputs):
            before, after = (
                self._select_column(self.scores[model], index) for model in (baseline, candidate)
            )
            unit = output.task_kind.score_unit
            for name, estimate in change_of_rows(before, after, self.group, unit).items():
                changes[name if self._is_single else metric_name_of_output(name, output.name)] = (
                    estimate
                )
        return changes

    def paired(self, metric: str, baseline: str, candidate: str) -> PairedEstimate:
        """Estimate one metric of two models, and its difference with a paired interval."""
        of_output = declared_metric(metric).output
        index = 0 if self._is_single else [item.name for item in self.outputs].index(str(of_output))
        label = self._select_column(self.label, index)
        is_used = ~np.isnan(label)
        before, after = (
            self._select_column(self.scores[model], index)[is_used]
            for model in (baseline, candidate)
        )
        group = None if self.group is None else self.group[is_used]
        return intervals.estimate_pair(metric, label[is_used], before, after, group, seed=self.seed)

    @property
    def _is_single(self) -> bool:
        return len(self.outputs) == 1

    def _select_column(self, values: Array, index: int) -> Array:
        """Return the values of one output, ``(rows,)``."""
        return values if self._is_single else values[:, index]


@dataclass(frozen=True)
class QueryQuality:
    """The quality of retrieval models.

    Attributes:
        values: for each model, each metric of every query ``(queries,)``.
        rows: number of test rows.
        seed: seed of the bootstrap.
        vectors: query and item vectors of each model; needed only for ``score_change``.
    """

    values: Mapping[str, Mapping[str, Array]]
    rows: int
    seed: int
    vectors: Mapping[str, RankedVectors] = field(default_factory=dict)

    def score_change(self, baseline: str, candidate: str) -> Mapping[str, Estimate]:
        """Measure how much the scores of all items differ, query by query.

        The unit is the standard deviation of the query's scores.
        """
        return change_of_rankings(self.vectors[baseline], self.vectors[candidate], self.rows)

    def paired(self, metric: str, baseline: str, candidate: str) -> PairedEstimate:
        """Estimate one metric of two models, and its difference with a paired interval."""
        before, after = self.values[baseline][metric], self.values[candidate][metric]
        return intervals.compare_means(before, after, self.rows, seed=self.seed)


def row_quality(
    signature: Signature, split: Split, scores: Mapping[str, Array], seed: int
) -> RowQuality:
    """Combine the scores of the rows of a split with their labels and groups.

    Args:
        signature: the signature of the models.
        split: the prepared rows, whose columns are stored as tensors.
        scores: scores of each model, ``(rows,)`` or ``(rows, outputs)``, in the order of the rows.
        seed: seed of the bootstrap.
    """
    rows = Rows(split, signature)
    group = None if rows.group is None else rows.group.numpy()
    return RowQuality(signature.outputs, rows.label.numpy(), group, scores, seed)


def query_quality(
    towers: Mapping[str, Tower],
    signature: Signature,
    test: Split,
    ranking: Ranking,
    names: Iterable[str],
) -> dict[str, Array]:
    """Rank the whole catalogue for every test query and return the metrics of each query.

    Args:
        towers: the towers ``query`` and ``item``.
        signature: the bundle's signature.
        test: the prepared test rows.
        ranking: the catalogue, and the earlier interactions whose items are not ranked again.
        names: names of the metrics.

    Returns:
        Each metric, float64 ``(queries,)``.

    Raises:
        CompressionError: a vector is not finite, or all relevant items are earlier interactions.
    """
    queries = queries_of(signature, test, ranking)
    catalogue = fetch_split(ranking.items.artifact, ranking.items.rows)
    vectors = RankedVectors(
        encode_queries(towers["query"], signature, test, queries.row),
        encode_catalogue(towers["item"], signature, catalogue),
        queries,
    )
    return ranking_metrics(vectors, names)


def queries_of(signature: Signature, test: Split, ranking: Ranking) -> RankingQueries:
    """Return the test queries, their relevant items, and the items that are not ranked.

    Arguments as in ``query_quality``.

    Raises:
        MetricRefused: all relevant items are earlier interactions, or rows have no groups.
    """
    catalogue = fetch_split(ranking.items.artifact, ranking.items.rows)
    ids = Rows(catalogue, signature.of_split(ITEMS)).column(str(signature.item)).numpy()
    earlier = [
        interactions(Rows(fetch_split(split.artifact, split.rows), signature))
        for split in ranking.seen
    ]
    return ranking_queries(interactions(Rows(test, signature)), earlier, ids)
