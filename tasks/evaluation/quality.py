"""Compare the quality of two models at a time on the same test rows. No Prefect.

Models of the tasks ``ctr`` and ``ranking`` are compared by one score per row and output.
``retrieval`` models rank the whole catalogue for every query, and are compared by the metrics of
these rankings.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressors.contracts import ITEMS, Estimate, Output, Signature, Split
from compressors.contracts import metric as declared_metric
from compressors.contracts.metrics.metric import metric_name_of_output
from compressors.core.batches import Rows, batches, rows_per_batch
from compressors.core.scores import tower_vectors
from compressors.lower.serving_wrapper import served_graphs
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
from tasks.bundles.loading import SCORING_ROWS, fetch_split
from tasks.orchestration.documents import Ranking

Array = NDArray[Any]
Vectors = Callable[[Mapping[str, Tensor]], Array]
"""A tower as a function: inputs by name -> vectors, float32 ``(rows, dim)``."""


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
        split: the prepared rows.
        scores: scores of each model, ``(rows,)`` or ``(rows, outputs)``, in the order of the rows.
        seed: seed of the bootstrap.
    """
    rows = Rows(split, signature)
    group = None if rows.group is None else rows.group.numpy()
    return RowQuality(signature.outputs, rows.label.numpy(), group, scores, seed)


def query_quality(
    towers: Mapping[str, Vectors],
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
    return ranking_metrics(compute_ranked_vectors(towers, signature, test, ranking), names)


def compute_ranked_vectors(
    towers: Mapping[str, Vectors], signature: Signature, test: Split, ranking: Ranking
) -> RankedVectors:
    """Compute the vectors of every test query and item; arguments as for ``query_quality``."""
    catalogue = fetch_split(ranking.items.artifact, ranking.items.rows)
    query, item = signature.of_tower("query"), signature.of_tower("item")
    item_batches = list(batches(catalogue, item, SCORING_ROWS))
    ids = Rows(catalogue, signature.of_split(ITEMS)).column(str(signature.item)).numpy()
    earlier = [
        interactions(Rows(fetch_split(split.artifact, split.rows), signature))
        for split in ranking.seen
    ]
    queries = ranking_queries(interactions(Rows(test, signature)), earlier, ids)
    return RankedVectors(
        _query_vectors(towers["query"], queries, Rows(test, query)),
        np.concatenate([towers["item"](batch.inputs) for batch in item_batches]),
        queries,
    )


def torch_towers(model: nn.Module, signature: Signature) -> dict[str, Vectors]:
    """Return the towers of a torch module, by name."""

    def tower(name: str) -> Vectors:
        def compute_vectors(inputs: Mapping[str, Tensor]) -> Array:
            with torch.no_grad():
                vectors: Array = tower_vectors(model, inputs, signature, name).numpy()
            return vectors

        return compute_vectors

    return {name: tower(name) for graph in served_graphs(signature) for name in graph.towers}


def _query_vectors(tower: Vectors, queries: RankingQueries, test: Rows) -> Array:
    """Return the vectors ``(queries, dim)``; each query is the row that ``queries.row`` names."""
    rows, size = torch.from_numpy(queries.row), rows_per_batch(test.signature, SCORING_ROWS)
    return np.concatenate([tower(test.take(part).inputs) for part in torch.split(rows, size)])
