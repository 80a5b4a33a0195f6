"""Gradient and curvature of the loss, and sensitivity of the output, for the weights of tables.

They are computed for looked-up rows, so a table of codes gets them for its decoded weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressors.contracts import Signature, Split
from compressors.core.batches import Batch, Rows
from compressors.core.modules.composed import ComposedTable
from compressors.core.modules.formats import PackedTable
from compressors.distill.training.trainer import Loss
from compressors.task_kinds.loss import hard_loss, shuffled_rows

BATCH = 8192
SENSED = 65_536
"""Rows that sensitivity is taken from, at most: it is a mean, and needs no more."""


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
        tables: modules of ``module`` that map ids to rows, by any name.

    Returns:
        By table two float32 ``(rows, dim)``: the gradient of the mean loss, and the diagonal of the
        empirical Fisher matrix, which is the mean of the squared gradients of the loss of each row
        or list against its label. The second uses labels because gradients against a teacher's
        predictions vanish where the network reproduces them, for any curvature.
    """
    shapes = {name: _shape(table) for name, table in tables.items()}
    result = {name: (torch.zeros(shape), torch.zeros(shape)) for name, shape in shapes.items()}
    rows, terms = Rows(split, signature), 0
    with watched(tables) as seen:
        for numbers in shuffled_rows(rows, signature, BATCH, seed=0):
            seen.clear()
            batch = rows.take(numbers)
            output = module(**batch.inputs)
            leaves = [leaf for _, _, leaf in seen]
            own = _terms(signature, batch)
            terms += own
            first = loss(output, batch, numbers) * own
            second = hard_loss(signature, output, batch) * own
            slope = torch.autograd.grad(first, leaves, retain_graph=True, allow_unused=True)
            single = torch.autograd.grad(second, leaves, allow_unused=True)
            for (name, ids, _), each, one in zip(seen, slope, single, strict=True):
                if each is None or one is None:  # looked up, but the loss does not depend on it
                    continue
                dim = each.shape[-1]
                result[name][0].index_add_(0, ids, each.reshape(-1, dim))
                result[name][1].index_add_(0, ids, one.reshape(-1, dim).square())
    return {name: (slope / terms, squares / terms) for name, (slope, squares) in result.items()}


class Sensitivity(NamedTuple):
    """Sensitivity of a network's output to a table: sums of squared gradients over lookups.

    ``columns`` float64 ``(dim, dim)``: sum of the outer products of the output's gradients.
    ``rows`` float64 ``(rows,)``: sum of the squared norms of the gradients, by looked-up row.
    ``lookups``: number of lookups that affect the output. The padding of a bag does not, and
    neither does the row of the other tier in a table with tiers.
    """

    columns: Tensor
    rows: Tensor
    lookups: int


def sensitivity(
    module: nn.Module,
    signature: Signature,
    split: Split,
    tables: Mapping[str, nn.Module],
    most: int = SENSED,
) -> dict[str, Sensitivity]:
    """Compute the sensitivity of the output to rows of some tables and to pairs of columns.

    Unlike the gradient of the loss, it needs no label and does not vanish for confident
    predictions.

    Args:
        module: the network in evaluation mode; none of its tensors is changed.
        signature: inputs and task of the network.
        split: the data.
        tables: modules of ``module`` that map ids to rows, by any name.
        most: largest number of rows that are drawn from the split.
    """
    columns, by_row, lookups = {}, {}, dict.fromkeys(tables, 0)
    for name, table in tables.items():
        rows, dim = _shape(table)
        columns[name] = torch.zeros(dim, dim, dtype=torch.float64)
        by_row[name] = torch.zeros(rows, dtype=torch.float64)
    data, left = Rows(split, signature), most
    with watched(tables) as seen:
        for numbers in shuffled_rows(data, signature, BATCH, seed=0):
            seen.clear()
            output = module(**data.take(numbers).inputs)
            leaves = [leaf for _, _, leaf in seen]
            grads = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
            for (name, ids, _), grad in zip(seen, grads, strict=True):
                if grad is not None:
                    flat = grad.reshape(-1, grad.shape[-1]).double()
                    each = flat.square().sum(dim=1)
                    columns[name] += flat.T @ flat
                    by_row[name].index_add_(0, ids.long(), each)
                    # Padding of bags and rows of the other tier are looked up but not used.
                    lookups[name] += int((each > 0).sum())
            left -= len(numbers)
            if left <= 0:
                break
    return {name: Sensitivity(columns[name], by_row[name], lookups[name]) for name in tables}


@contextmanager
def watched(tables: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Record the lookups of some tables while the network runs.

    Yields:
        For each lookup the table's name, the ids ``(all,)``, and the rows ``(*ids, dim)``. The rows
        are a leaf from which the rest of the network is computed, so no weight needs a gradient.
    """
    seen: list[tuple[str, Tensor, Tensor]] = []

    def watch(name: str, table: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(
            module: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, Tensor],
            rows: Tensor,
        ) -> Tensor:
            leaf = rows.detach().requires_grad_(True)
            seen.append((name, (args[0] if args else kwargs["input"]).reshape(-1), leaf))
            return leaf

        return table.register_forward_hook(hook, with_kwargs=True)

    handles = [watch(name, table) for name, table in tables.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _shape(table: nn.Module) -> tuple[int, int]:
    """Number of rows and dimensions of a table."""
    if isinstance(table, PackedTable | ComposedTable):
        return table.rows, table.dim
    if isinstance(table, nn.Embedding):
        return table.num_embeddings, table.embedding_dim
    raise TypeError(f"{type(table).__name__} is no table of rows")


def mean_loss(module: nn.Module, signature: Signature, split: Split, loss: Loss) -> float:
    """Mean loss over a split, with equal weight for each row (for ranking, each list)."""
    rows, total, terms = Rows(split, signature), 0.0, 0
    with torch.no_grad():
        for numbers in shuffled_rows(rows, signature, BATCH, seed=0):
            batch = rows.take(numbers)
            own = _terms(signature, batch)
            total += float(loss(module(**batch.inputs), batch, numbers)) * own
            terms += own
    return total / terms


def _terms(signature: Signature, batch: Batch) -> int:
    """Number of losses in the mean over a batch."""
    if signature.has_lists and batch.group is not None:
        return len(torch.unique(batch.group))
    return len(batch.label)
