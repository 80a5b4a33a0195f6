"""Gradient and curvature of the loss, and sensitivity of the output, for the weights of tables.

Derivatives are taken with respect to the looked-up rows. So for a compressed table they are
derivatives with respect to the decoded weights, not to codes or scales. A *list* is the rows of one
group (such as a query) of a ranking model; its loss is computed for all of its rows together.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressors.contracts import Signature, Split
from compressors.core.batches import Batch, Rows, rows_per_batch
from compressors.core.modules.composed import ComposedTable
from compressors.core.modules.formats import PackedTable
from compressors.core.scores import network_scores, score_columns, training_output
from compressors.distill.training.trainer import Loss
from compressors.task_kinds.loss import hard_loss, shuffled_rows

BATCH, BATCH_OF_TOWERS = 8192, 1024
"""Rows per batch; fewer for two towers, whose loss has a score for each pair of rows."""

SENSITIVITY_ROWS = 65_536
"""Largest number of rows for ``sensitivity``: more do not change the estimate much."""


def loss_gradients(
    module: nn.Module,
    signature: Signature,
    split: Split,
    loss: Loss,
    tables: Mapping[str, nn.Module],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute the gradient and the curvature of the loss for the weights of some tables.

    Args:
        module: the network in evaluation mode; none of its tensors is changed.
        signature: inputs and task of the network.
        split: the data; all rows are read.
        loss: the loss to differentiate, a mean over rows or lists.
        tables: submodules of ``module`` that map ids to rows; the keys may be any names.

    Returns:
        For each name in ``tables``, two float32 ``(rows, dim)``. The first is the gradient of the
        mean loss. The second is the diagonal of the empirical Fisher matrix: the mean, over data
        rows or lists, of the squared gradient of the loss on labels. It is computed on labels even
        if ``loss`` compares with a teacher, because the gradient of such a loss vanishes where the
        network reproduces the teacher's predictions.
    """
    shapes = {name: _table_shape(table) for name, table in tables.items()}
    result = {name: (torch.zeros(shape), torch.zeros(shape)) for name, shape in shapes.items()}
    rows, terms = Rows(split, signature), 0
    with record_lookups(tables) as lookups:
        for row_numbers in shuffled_rows(rows, signature, _batch_rows(signature), seed=0):
            lookups.clear()
            batch = rows.take(row_numbers)
            output = training_output(module, batch.inputs, signature)
            leaves = [leaf for _, _, leaf in lookups]
            batch_terms = _count_losses(signature, batch)
            terms += batch_terms
            summed = loss(output, batch, row_numbers) * batch_terms
            # ``hard``: on labels.
            summed_hard = hard_loss(signature, output, _with_output_weights(batch)) * batch_terms
            gradients = torch.autograd.grad(summed, leaves, retain_graph=True, allow_unused=True)
            hard_gradients = torch.autograd.grad(summed_hard, leaves, allow_unused=True)
            for (name, ids, _), grad, hard in zip(lookups, gradients, hard_gradients, strict=True):
                if grad is None or hard is None:  # the loss does not depend on this lookup
                    continue
                dim = grad.shape[-1]
                result[name][0].index_add_(0, ids, grad.reshape(-1, dim))
                result[name][1].index_add_(0, ids, hard.reshape(-1, dim).square())
    return {name: (grad / terms, squares / terms) for name, (grad, squares) in result.items()}


class Sensitivity(NamedTuple):
    """Sensitivity of a network's output to a table: sums of squared gradients over lookups.

    Attributes:
        columns: float64 ``(dim, dim)``, sum of the outer products of the output's gradients.
        rows: float64 ``(rows,)``, sum of the squared norms of the gradients, by looked-up row.
        lookups: number of lookups that affect the output. The padding of a bag does not. A table
            whose rows are split into tiers looks up every id in each tier; only the row of the
            id's tier affects the output.
    """

    columns: Tensor
    rows: Tensor
    lookups: int


def sensitivity(
    module: nn.Module,
    signature: Signature,
    split: Split,
    tables: Mapping[str, nn.Module],
    max_rows: int = SENSITIVITY_ROWS,
) -> dict[str, Sensitivity]:
    """Compute the sensitivity of the output to the rows and the pairs of columns of some tables.

    Unlike the gradient of the loss, it needs no label and does not vanish for confident
    predictions.

    Args:
        module: the network in evaluation mode; none of its tensors is changed.
        signature: inputs and task of the network.
        split: the data.
        tables: submodules of ``module`` that map ids to rows; the keys may be any names.
        max_rows: number of rows after which no further batch is read.

    Returns:
        The sensitivity, by the names of ``tables``.
    """
    columns, by_row, lookups = {}, {}, dict.fromkeys(tables, 0)
    for name, table in tables.items():
        rows, dim = _table_shape(table)
        columns[name] = torch.zeros(dim, dim, dtype=torch.float64)
        by_row[name] = torch.zeros(rows, dtype=torch.float64)
    data, remaining = Rows(split, signature), max_rows
    with record_lookups(tables) as recorded_lookups:
        for row_numbers in shuffled_rows(data, signature, BATCH, seed=0):
            recorded_lookups.clear()
            output = network_scores(module, data.take(row_numbers).inputs, signature)
            leaves = [leaf for _, _, leaf in recorded_lookups]
            grads = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
            for (name, ids, _), grad in zip(recorded_lookups, grads, strict=True):
                if grad is not None:
                    flat = grad.reshape(-1, grad.shape[-1]).double()
                    squared_norms = flat.square().sum(dim=1)
                    columns[name] += flat.T @ flat
                    by_row[name].index_add_(0, ids.long(), squared_norms)
                    # Lookups of padding and of other tiers have no gradient.
                    lookups[name] += int((squared_norms > 0).sum())
            remaining -= len(row_numbers)
            if remaining <= 0:
                break
    return {name: Sensitivity(columns[name], by_row[name], lookups[name]) for name in tables}


@contextmanager
def record_lookups(tables: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Record the lookups of some tables while the returned context is active.

    Yields:
        A list to which each lookup is appended: the table's name, the ids ``(lookups,)``, and the
        rows ``(*ids, dim)``. The rows are leaves of the autograd graph of the rest of the network,
        so no weight needs a gradient.
    """
    lookups: list[tuple[str, Tensor, Tensor]] = []

    def add_hook(name: str, table: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(
            module: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, Tensor],
            rows: Tensor,
        ) -> Tensor:
            leaf = rows.detach().requires_grad_(True)
            lookups.append((name, (args[0] if args else kwargs["input"]).reshape(-1), leaf))
            return leaf

        return table.register_forward_hook(hook, with_kwargs=True)

    handles = [add_hook(name, table) for name, table in tables.items()]
    try:
        yield lookups
    finally:
        for handle in handles:
            handle.remove()


def _with_output_weights(batch: Batch) -> Batch:
    """Return the batch with weights of the outputs for sums of squared gradients of rows.

    The loss of an output is the mean over its labelled rows. If these are a share ``p`` of all
    rows, each of them counts ``1 / p`` times in a mean over all rows. Its squared gradient counts
    ``1 / p ** 2`` times, so the mean over all rows of the squares is ``1 / p`` times too large. The
    weight ``sqrt(p)`` corrects this.
    """
    shares = [float((~label.isnan()).float().mean()) for label in score_columns(batch.label)]
    if min(shares) == 1:
        return batch
    return replace(batch, output_weights=tuple(math.sqrt(share) for share in shares))


def _table_shape(table: nn.Module) -> tuple[int, int]:
    """Return the number of rows and dimensions of a table."""
    if isinstance(table, PackedTable | ComposedTable):
        return table.rows, table.dim
    if isinstance(table, nn.Embedding):
        return table.num_embeddings, table.embedding_dim
    raise TypeError(f"Expected a table of rows, got {type(table).__name__}.")


def mean_loss(module: nn.Module, signature: Signature, split: Split, loss: Loss) -> float:
    """Return the mean loss over a split, with equal weight for each row or, for ranking, list."""
    rows, total, terms = Rows(split, signature), 0.0, 0
    with torch.no_grad():
        for row_numbers in shuffled_rows(rows, signature, _batch_rows(signature), seed=0):
            batch = rows.take(row_numbers)
            batch_terms = _count_losses(signature, batch)
            output = training_output(module, batch.inputs, signature)
            total += float(loss(output, batch, row_numbers)) * batch_terms
            terms += batch_terms
    return total / terms


def _batch_rows(signature: Signature) -> int:
    return rows_per_batch(signature, BATCH if signature.scores_rows else BATCH_OF_TOWERS)


def _count_losses(signature: Signature, batch: Batch) -> int:
    """Return the number of losses in the mean over a batch: its rows or, for ranking, lists."""
    if signature.has_lists and batch.group is not None:
        return len(torch.unique(batch.group))
    return len(batch.label)
