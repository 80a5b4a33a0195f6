"""Compute the vectors of queries and items with the towers of a retrieval model. No Prefect."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressors.contracts import Signature, Split
from compressors.contracts.targets.runtime import Session
from compressors.core.batches import Rows, batches, rows_per_batch
from compressors.core.scores import tower_arguments, tower_vectors
from tasks.bundles.loading import SCORING_ROWS

Array = NDArray[Any]
Tower = Callable[[Mapping[str, Tensor]], Array]
"""A tower as a function: inputs by name -> vectors, float32 ``(rows, dim)``."""


def torch_tower(model: nn.Module, signature: Signature, name: str) -> Tower:
    """Return the tower ``query`` or ``item`` of a torch module."""

    def compute_vectors(inputs: Mapping[str, Tensor]) -> Array:
        with torch.no_grad():
            vectors: Array = tower_vectors(model, inputs, signature, name).numpy()
        return vectors

    return compute_vectors


def graph_tower(session: Session, signature: Signature, name: str) -> Tower:
    """Return the tower ``query`` or ``item`` that an open graph computes."""

    def compute_vectors(inputs: Mapping[str, Tensor]) -> Array:
        arguments = tower_arguments(inputs, signature, name)
        return session.scores({name: tensor.numpy() for name, tensor in arguments.items()})

    return compute_vectors


def encode_queries(
    tower: Tower, signature: Signature, test: Split, rows: NDArray[np.int64]
) -> Array:
    """Compute the query vectors of some rows of a split.

    Args:
        tower: the query tower.
        signature: the signature of the model.
        test: the prepared split, whose columns are stored as tensors.
        rows: the row of each query, int64 ``(queries,)``.

    Returns:
        The vectors, float32 ``(queries, dim)``.
    """
    of_query = signature.of_tower("query")
    test_rows, size = Rows(test, of_query), rows_per_batch(of_query, SCORING_ROWS)
    return np.concatenate(
        [tower(test_rows.take(part).inputs) for part in torch.split(torch.from_numpy(rows), size)]
    )


def encode_catalogue(
    tower: Tower,
    signature: Signature,
    catalogue: Split,
    show_progress: Callable[[int], object] = lambda _: None,
) -> Array:
    """Compute the vectors of all items.

    Args:
        tower: the item tower.
        signature: the signature of the model.
        catalogue: the prepared split ``items``.
        show_progress: called after each batch, with the number of items encoded so far.

    Returns:
        The vectors in the order of the catalogue, float32 ``(items, dim)``.
    """
    vectors: Array = np.empty((catalogue.rows, 0), np.float32)
    done = 0
    for batch in batches(catalogue, signature.of_tower("item"), SCORING_ROWS):
        of_batch = tower(batch.inputs)
        if not done:  # the first batch shows the number of dimensions
            vectors = np.empty((catalogue.rows, of_batch.shape[1]), of_batch.dtype)
        vectors[done : done + len(of_batch)] = of_batch
        done += len(of_batch)
        show_progress(done)
    return vectors
