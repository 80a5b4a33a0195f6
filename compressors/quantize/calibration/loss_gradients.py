"""Slope and curvature of the loss by every weight of tables.

Taken where rows are looked up, so that a table of codes has them for the weights it stands for.
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
    """What the loss would do if the weights of some tables moved.

    Args:
        module: in evaluation mode; none of its tensors is touched.
        signature: its inputs and task.
        split: the rows that are looked at, all of them.
        loss: whose slope is taken, a mean over rows or lists.
        tables: of ``module``, by any name; each from ids to rows.

    Returns:
        By table two float32 ``(rows, dim)``: the gradient of the mean loss, and the mean of the
        squared gradients of each row's or list's own loss against its label, the diagonal of the
        empirical Fisher matrix. The teacher's answers are of no use for the latter: where they
        are met, their gradients vanish, whatever the curvature.
    """
    shapes = {name: _shape(table) for name, table in tables.items()}
    found = {name: (torch.zeros(shape), torch.zeros(shape)) for name, shape in shapes.items()}
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
                if each is None or one is None:  # looked up, and of no consequence
                    continue
                dim = each.shape[-1]
                found[name][0].index_add_(0, ids, each.reshape(-1, dim))
                found[name][1].index_add_(0, ids, one.reshape(-1, dim).square())
    return {name: (slope / terms, squares / terms) for name, (slope, squares) in found.items()}


class Sensitivity(NamedTuple):
    """How much a network's output depends on a table: sums over lookups of squared slopes.

    ``columns`` float64 ``(dim, dim)``: the outer product of the gradient of the row's output with
    itself. ``rows`` float64 ``(rows,)``: the gradient's squared length, by the row looked up.
    ``lookups`` is how many there were that the output depends on: a bag finds its padding and a
    table in tiers a row of each, and neither is read.
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
    """How much the output depends on the rows of some tables, and on pairs of their columns.

    Unlike the loss's slope this needs no label, and does not vanish where the network is sure.

    Args:
        module: in evaluation mode; none of its tensors is touched.
        signature: its inputs and task.
        split: the rows that are looked at.
        tables: of ``module``, by any name; each from ids to rows.
        most: how many rows of the split are drawn, at most.
    """
    columns, by_row, lookups = {}, {}, dict.fromkeys(tables, 0)
    for name, table in tables.items():
        rows, dim = _shape(table)
        columns[name] = torch.zeros(dim, dim, dtype=torch.float64)
        by_row[name] = torch.zeros(rows, dtype=torch.float64)
    held, left = Rows(split, signature), most
    with watched(tables) as seen:
        for numbers in shuffled_rows(held, signature, BATCH, seed=0):
            seen.clear()
            output = module(**held.take(numbers).inputs)
            leaves = [leaf for _, _, leaf in seen]
            grads = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
            for (name, ids, _), grad in zip(seen, grads, strict=True):
                if grad is not None:
                    flat = grad.reshape(-1, grad.shape[-1]).double()
                    each = flat.square().sum(dim=1)
                    columns[name] += flat.T @ flat
                    by_row[name].index_add_(0, ids.long(), each)
                    # Padding of bags, and rows of the other tier, are found and not read.
                    lookups[name] += int((each > 0).sum())
            left -= len(numbers)
            if left <= 0:
                break
    return {name: Sensitivity(columns[name], by_row[name], lookups[name]) for name in tables}


@contextmanager
def watched(tables: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Lookups of some tables, noted while the network runs.

    Yields:
        Of each lookup the table's name, the ids ``(all,)``, and what was found ``(*ids, dim)``: a
        leaf that the rest of the network is computed from, so that no weight needs a gradient.
    """
    seen: list[tuple[str, Tensor, Tensor]] = []

    def watch(name: str, table: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(
            module: nn.Module,  # noqa: ARG001
            args: tuple[Tensor, ...],
            kwargs: dict[str, Tensor],
            found: Tensor,
        ) -> Tensor:
            leaf = found.detach().requires_grad_(True)
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
    """Rows and width of a table."""
    if isinstance(table, PackedTable | ComposedTable):
        return table.rows, table.dim
    if isinstance(table, nn.Embedding):
        return table.num_embeddings, table.embedding_dim
    raise TypeError(f"{type(table).__name__} is no table of rows")


def mean_loss(module: nn.Module, signature: Signature, split: Split, loss: Loss) -> float:
    """A loss over all rows of a split; each row, or for ranking each list, counts alike."""
    rows, total, terms = Rows(split, signature), 0.0, 0
    with torch.no_grad():
        for numbers in shuffled_rows(rows, signature, BATCH, seed=0):
            batch = rows.take(numbers)
            own = _terms(signature, batch)
            total += float(loss(module(**batch.inputs), batch, numbers)) * own
            terms += own
    return total / terms


def _terms(signature: Signature, batch: Batch) -> int:
    """How many losses a batch's mean is over."""
    if signature.task == "ranking" and batch.group is not None:
        return len(torch.unique(batch.group))
    return len(batch.label)
