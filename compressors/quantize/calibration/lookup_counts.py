"""What a network reads of its tables: how often each row, and how much the loss depends on it.

Rows are counted where they are looked up, by a hook on each table's module, so that whatever
stands before a lookup (a map of rows, a default for unknown ids, padding) is taken into account.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from compressors.contracts import Bench
from compressors.core.batches import Batch, batches
from compressors.core.model import Model
from compressors.core.modules.composed import ComposedTable
from compressors.core.modules.formats import Bag
from compressors.core.units import Unit, plain_bag, swap
from compressors.errors.steps import RowsMissing, StepRefused
from compressors.quantize.calibration.loss_gradients import Sensitivity, loss_gradients, sensitivity
from compressors.task_kinds.loss import hard_loss

BATCH = 8192


def lookup_counts(model: Model, bench: Bench, tables: Collection[str]) -> dict[str, Tensor]:
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
        raise RowsMissing("lookup_counts_need_rows")
    private = model.private().module
    every = {unit.name: unit for unit in Unit.of(private)}
    whole = {every[name].part_of or name for name in tables}
    counts = {name: torch.zeros(every[name].rows, dtype=torch.float64) for name in whole}
    for name, count in counts.items():
        _count(every[name].module, count)
    with torch.no_grad():
        for batch in batches(bench.train, bench.signature, BATCH):
            private(**batch.inputs)
        # A composed table calls its parts for ids that are not theirs, and within a bag for
        # padding: only the table itself is told what is read.
        names = {unit.module: unit.name for unit in every.values()}
        for name in whole:
            table = every[name].module
            inner = table.table if isinstance(table, Bag) else table
            counts |= _of_parts(inner, counts[name], names)
    return {name: counts[name] for name in tables}


def _of_parts(
    table: nn.Module, counts: Tensor, names: Mapping[nn.Module, str]
) -> dict[str, Tensor]:
    """Lookups of the tables inside a table, at any depth."""
    if not isinstance(table, ComposedTable):
        return {}
    stored = dict(table.named_buffers(recurse=False))
    found: dict[str, Tensor] = {}
    for part, count in table.composition.lookup_counts(stored, counts, table.settings).items():
        module = table.get_submodule(part)
        found |= {names[module]: count, **_of_parts(module, count, names)}
    return found


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
        Float32 ``(rows, dim)`` by table, as ``loss_gradients`` gives it: the mean over training
        rows, or lists, of the squared gradients of their own loss. Rows of the data that look a
        table up twice (a bag) count each lookup by itself.

    Raises:
        CompressionError: the bench has no training rows, or its task has no loss.
    """
    if bench.train is None:
        raise RowsMissing("gradients_need_rows")
    if bench.signature.task == "retrieval":
        raise StepRefused("gradients_need_loss")
    private = model.private().module
    watched = _tables(private, tables)

    def loss(output: Tensor, batch: Batch, numbers: Tensor) -> Tensor:  # noqa: ARG001
        return hard_loss(bench.signature, output, batch)

    found = loss_gradients(private, bench.signature, bench.train, loss, watched)
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
        raise RowsMissing("gradients_need_rows")
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
