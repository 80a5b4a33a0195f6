"""Evaluate a model with two towers on validation data, for steps that compare candidates."""

import numpy as np
import torch
from torch import Tensor, nn

from compressors.contracts import Signature
from compressors.core.batches import JoinedRows, Rows, rows_per_batch
from compressors.core.placement import find_device, to_device
from compressors.core.scores import tower_vectors
from compressors.errors.metrics import MetricRefused
from compressors.metrics.full_ranking import (
    Float32s,
    Interactions,
    Ints,
    RankedVectors,
    ranking_metrics,
    ranking_queries,
)

MAX_QUERIES = 5_000
"""Largest number of queries that are ranked, so that an evaluation takes seconds."""

ROWS_AT_ONCE = 8192
"""Largest number of rows in one forward pass."""


@torch.no_grad()
def ranking_quality(
    module: nn.Module, signature: Signature, validation: Rows, train: Rows | JoinedRows | None
) -> float:
    """Rank the items of the training and validation rows for the validation queries.

    The items of a query's training rows are not ranked for it.

    Args:
        module: the network, in evaluation mode.
        signature: signature of a ``retrieval`` model.
        validation: the validation rows.
        train: the training rows, or None. ``JoinedRows``, which contain traffic, count as None.

    Returns:
        The mean of the signature's metric over up to ``MAX_QUERIES`` queries with a positive row,
        which are evenly spaced in the order of their ids.

    Raises:
        MetricRefused: the rows have no groups, which are the queries; or no query has a relevant
            item that is not in its training rows.
    """
    parts = [train, validation] if isinstance(train, Rows) else [validation]
    # Of each part: the ids of its items, and the first row of each item.
    items_of_parts = [(rows, *_find_first_rows(rows)) for rows in parts]
    catalogue = np.unique(np.concatenate([ids for _, ids, _ in items_of_parts]))
    vectors: Float32s | None = None
    for rows, ids, first in items_of_parts:
        part_vectors = _compute_vectors(module, signature, "item", rows, first)
        if vectors is None:
            vectors = np.empty((catalogue.size, part_vectors.shape[1]), np.float32)
        vectors[np.searchsorted(catalogue, ids)] = part_vectors
    assert vectors is not None  # noqa: S101 - there is at least one part
    group = _require_ids(validation, validation.group)
    positive = np.unique(group[validation.label.numpy() > 0])
    if not positive.size:
        raise MetricRefused("new_items_missing")
    selected = np.flatnonzero(np.isin(group, _select_evenly_spaced(positive)))
    earlier = map(interactions, parts[:-1])  # the training rows, if there are any
    queries = ranking_queries(interactions(validation, selected), earlier, catalogue)
    query_vectors = _compute_vectors(module, signature, "query", validation, selected[queries.row])
    metric = signature.single_output.metric
    values = ranking_metrics(RankedVectors(query_vectors, vectors, queries), [metric])
    return float(values[metric].mean())


def _select_evenly_spaced(queries: Ints) -> Ints:
    """Return at most ``MAX_QUERIES`` of the sorted queries."""
    positions = np.linspace(0, queries.size - 1, min(MAX_QUERIES, queries.size)).astype(np.int64)
    return queries[positions]


def _find_first_rows(rows: Rows) -> tuple[Ints, Ints]:
    """Return the ids of all items, and the first row of each."""
    ids, first = np.unique(_require_ids(rows, rows.item), return_index=True)
    return ids, first


def interactions(rows: Rows, selected: Ints | None = None) -> Interactions:
    """Return queries, items and labels of the selected rows, by default of all.

    Raises:
        MetricRefused: the rows have no groups, which are the queries.
    """
    columns = (_require_ids(rows, rows.group), _require_ids(rows, rows.item), rows.label.numpy())
    group, item, label = (values if selected is None else values[selected] for values in columns)
    return Interactions(group, item, label)


def _require_ids(rows: Rows, values: Tensor | None) -> Ints:
    """Return the queries or items of all rows.

    Raises:
        MetricRefused: the rows have none.
    """
    if values is None:
        raise MetricRefused("retrieval_needs_groups")
    ids: Ints = values.numpy()
    return ids


def _compute_vectors(
    module: nn.Module, signature: Signature, tower: str, rows: Rows, numbers: Ints
) -> Float32s:
    """Return the vectors of one tower for the rows with these numbers, float32 ``(rows, dim)``."""
    device, size = find_device(module), rows_per_batch(signature.of_tower(tower), ROWS_AT_ONCE)
    pieces = [
        tower_vectors(module, to_device(rows.take(chunk), device).inputs, signature, tower)
        .float()
        .cpu()
        for chunk in torch.split(torch.from_numpy(numbers), size)
    ]
    vectors: Float32s = torch.cat(pieces).numpy()
    return vectors
