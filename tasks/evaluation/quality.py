"""Compare the quality of models in pairs on the same test rows. No Prefect.

``ctr`` and ``ranking`` models are compared by one score per row, ``retrieval`` models by the
metrics of a full ranking of the catalogue for every query.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressors.contracts import Estimate, ScoreUnit, Signature, Split
from compressors.core.batches import Batch, Rows, batches
from compressors.errors.metrics import MetricRefused
from compressors.lower.serving_wrapper import input_names, served_graphs
from compressors.metrics import intervals
from compressors.metrics.estimators import builtin as builtin
from compressors.metrics.full_ranking import (
    Interactions,
    RankedVectors,
    RankingQueries,
    ranking_metrics,
    ranking_queries,
)
from compressors.metrics.intervals import PairedEstimate
from compressors.metrics.score_change import change_of_rankings, change_of_rows
from tasks.bundles.loading import SCORING_ROWS, split_of
from tasks.orchestration.documents import PreparedRows, Ranking

Array = NDArray[Any]
Vectors = Callable[[Mapping[str, Tensor]], Array]
"""A tower: named inputs -> float32 ``(rows, dim)``."""


class Quality(Protocol):
    """Models by name, each measured on the same rows."""

    def paired(self, metric: str, baseline: str, candidate: str) -> PairedEstimate:
        """One metric of two of them."""

    def score_change(
        self, baseline: str, candidate: str, unit: ScoreUnit
    ) -> Mapping[str, Estimate]:
        """How much the scores of two of them differ."""


@dataclass(frozen=True)
class ByRow:
    """One score per test row of each model, ``(rows,)``."""

    label: Array
    group: Array | None
    scores: Mapping[str, Array]
    seed: int

    def score_change(
        self, baseline: str, candidate: str, unit: ScoreUnit
    ) -> Mapping[str, Estimate]:
        """Measure how much the scores of two models differ, row by row."""
        return change_of_rows(self.scores[baseline], self.scores[candidate], self.group, unit)

    def paired(self, metric: str, baseline: str, candidate: str) -> PairedEstimate:
        """One metric of two of them."""
        before, after = self.scores[baseline], self.scores[candidate]
        return intervals.paired(metric, self.label, before, after, self.group, seed=self.seed)


@dataclass(frozen=True)
class ByQuery:
    """Each model's metrics of every query, ``(queries,)``; ``rows`` is of the test data.

    ``vectors`` of the models are needed only for score changes.
    """

    values: Mapping[str, Mapping[str, Array]]
    rows: int
    seed: int
    vectors: Mapping[str, RankedVectors] = field(default_factory=dict)

    def score_change(
        self,
        baseline: str,
        candidate: str,
        unit: ScoreUnit,
    ) -> Mapping[str, Estimate]:
        """Measure how much the scores of all items differ, query by query; always in spreads."""
        return change_of_rankings(self.vectors[baseline], self.vectors[candidate], self.rows)

    def paired(self, metric: str, baseline: str, candidate: str) -> PairedEstimate:
        """One metric of two of them."""
        before, after = self.values[baseline][metric], self.values[candidate][metric]
        return intervals.paired_means(before, after, self.rows, seed=self.seed)


def row_quality(rows: list[Batch], scores: Mapping[str, Array], seed: int) -> ByRow:
    """Combine scores of test rows with their labels and groups."""
    label = np.concatenate([batch.label.numpy() for batch in rows])
    groups = [batch.group.numpy() for batch in rows if batch.group is not None]
    return ByRow(label, np.concatenate(groups) if groups else None, scores, seed)


def query_quality(
    towers: Mapping[str, Vectors],
    signature: Signature,
    test: Split,
    ranking: Ranking,
    names: Iterable[str],
) -> dict[str, Array]:
    """Rank the whole catalogue for every test query.

    Args:
        towers: the functions that return vectors: ``query`` and ``item``.
        signature: the bundle's signature.
        test: the prepared test rows.
        ranking: the catalogue and the hidden items.
        names: the metrics.

    Returns:
        Metric -> float64 ``(queries,)``.

    Raises:
        CompressionError: a vector is not finite, or no query has a new item.
    """
    return ranking_metrics(ranked_vectors(towers, signature, test, ranking), names)


def ranked_vectors(
    towers: Mapping[str, Vectors], signature: Signature, test: Split, ranking: Ranking
) -> RankedVectors:
    """Compute the vectors of every test query and item; arguments as for ``query_quality``."""
    catalogue = split_of(ranking.items.artifact, ranking.items.rows)
    query, item = (form.signature for form in served_graphs(signature))
    listed = list(batches(catalogue, item, SCORING_ROWS))
    ids = np.concatenate([batch.inputs[str(signature.item)].numpy() for batch in listed])
    what = ranking_queries(
        _interactions(test, signature), [_seen(p, signature) for p in ranking.seen], ids
    )
    return RankedVectors(
        _query_vectors(towers["query"], what, Rows(test, query)),
        np.concatenate([towers["item"](batch.inputs) for batch in listed]),
        what,
    )


def torch_towers(model: nn.Module, signature: Signature) -> dict[str, Vectors]:
    """Return the towers of a module, evaluated in torch instead of as graphs."""

    def vectors(part: nn.Module, names: tuple[str, ...]) -> Vectors:
        def of(inputs: Mapping[str, Tensor]) -> Array:
            with torch.no_grad():
                found: Array = part(**{name: inputs[name] for name in names}).numpy()
            return found

        return of

    return {
        form.name: vectors(form.part(model), input_names(form.signature))
        for form in served_graphs(signature)
    }


def _query_vectors(tower: Vectors, what: RankingQueries, test: Rows) -> Array:
    rows = torch.from_numpy(what.row)
    return np.concatenate(
        [tower(test.take(part).inputs) for part in torch.split(rows, SCORING_ROWS)]
    )


def _seen(part: PreparedRows, signature: Signature) -> Interactions:
    return _interactions(split_of(part.artifact, part.rows), signature)


def _interactions(split: Split, signature: Signature) -> Interactions:
    held = Rows(split, signature.only([str(signature.item)]))
    item = held.take(torch.arange(len(held))).inputs[str(signature.item)]
    if held.group is None:
        raise MetricRefused("retrieval_needs_groups")
    return Interactions(held.group.numpy(), item.numpy(), held.label.numpy())
