"""What a network reads of its tables: how often each row, and how much the loss depends on it.

Rows are counted where they are looked up, by a hook on each table's module, so that whatever
stands before a lookup (a map of rows, a default for unknown ids, padding) is taken into account.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from compressors.batches import Batch, batches
from compressors.contracts import Bench
from compressors.errors import CompressionError
from compressors.formats import Bag
from compressors.loss import hard_loss
from compressors.model import Model
from compressors.slopes import Sensitivity, sensitivity, slopes
from compressors.units import Unit, plain_bag, swap

BATCH = 8192


def lookups(model: Model, bench: Bench, tables: Collection[str]) -> dict[str, Tensor]:
    """How often the training rows look up each row of some tables.

    Args:
        model: its tables may be compressed already.
        bench: with ``train`` rows.
        tables: names of units.

    Returns:
        Float64 ``(rows,)`` by table. Padding of bags does not count.

    Raises:
        CompressionError: the bench has no training rows.
    """
    if bench.train is None:
        raise CompressionError("Counting lookups needs train rows.")
    private = model.private().module
    units = {unit.name: unit for unit in Unit.of(private) if unit.name in tables}
    counts = {name: torch.zeros(unit.rows, dtype=torch.float64) for name, unit in units.items()}
    for name, unit in units.items():
        _count(unit.module, counts[name])
    with torch.no_grad():
        for batch in batches(bench.train, bench.signature, BATCH):
            private(**batch.inputs)
    return counts


def _count(module: nn.Module, counts: Tensor) -> None:
    """Count the ids a table is called with. A bag looks up more: it pads what it is given."""
    padding = module.padding_idx if isinstance(module, nn.EmbeddingBag | Bag) else None

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:  # noqa: ARG001
        ids = (args[0] if args else kwargs["input"]).reshape(-1).long()
        read = ids if padding is None else ids[ids != padding]
        counts.add_(torch.bincount(read, minlength=len(counts)))

    module.register_forward_pre_hook(hook, with_kwargs=True)


def squared_gradients(model: Model, bench: Bench, tables: Collection[str]) -> dict[str, Tensor]:
    """How much the loss depends on each weight of some tables: the diagonal of the Fisher matrix.

    Source: Theis et al. 2018, https://arxiv.org/abs/1801.05787 (Fisher information as the price
    of changing a weight).

    Args:
        model: its tables may be compressed already.
        bench: with ``train`` rows.
        tables: names of units.

    Returns:
        Float32 ``(rows, dim)`` by table, as ``slopes`` gives it: the mean over training rows, or
        lists, of the squared gradients of their own loss. Rows of the data that look a table up
        twice (a bag) count each lookup by itself.

    Raises:
        CompressionError: the bench has no training rows, or its task has no loss.
    """
    if bench.train is None:
        raise CompressionError("Gradients need train rows.")
    if bench.signature.task == "retrieval":
        raise CompressionError("Gradients need a loss, and task 'retrieval' has none yet.")
    private = model.private().module
    watched = _tables(private, tables)

    def loss(output: Tensor, batch: Batch, numbers: Tensor) -> Tensor:  # noqa: ARG001
        return hard_loss(bench.signature, output, batch)

    found = slopes(private, bench.signature, bench.train, loss, watched)
    return {name: curvature for name, (_, curvature) in found.items()}


def sensitivities(model: Model, bench: Bench, tables: Collection[str]) -> dict[str, Sensitivity]:
    """How much the network's output depends on the rows and columns of some tables.

    Args:
        model: its tables may be compressed already.
        bench: with ``train`` rows.
        tables: names of units.

    Raises:
        CompressionError: the bench has no training rows.
    """
    if bench.train is None:
        raise CompressionError("Gradients need train rows.")
    private = model.private().module
    return sensitivity(private, bench.signature, bench.train, _tables(private, tables))


def _tables(module: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """Modules from ids to rows, by unit, of a private tree.

    A bag becomes a lookup and a reduction, so that its lookups can be seen one by one.
    """
    found: dict[str, nn.Module] = {}
    for unit in Unit.of(module):
        if unit.name not in names:
            continue
        table = unit.module
        if isinstance(table, nn.EmbeddingBag):
            table = plain_bag(table)
            swap(module, unit.name, table)
        found[unit.name] = table.table if isinstance(table, Bag) else table
    return found
