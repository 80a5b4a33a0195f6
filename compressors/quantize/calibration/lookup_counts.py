"""Count lookups of table rows, and measure the sensitivity of loss and output to tables.

A hook on each table's module counts the ids with which it is called. So the counts include the
effect of all operations before a lookup, such as a default for unknown ids, or padding. Forward
code may also read a table's weight: rows that it selects are counted, and a product with the weight
counts each row once per multiplied vector.

A *composed table* computes its rows from other tables, its *parts*. For example, the row of an id
may be the sum of a row of each part. Parts are units too, so their lookups are counted.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from compressors.contracts import Bench
from compressors.core.batches import Batch, batches
from compressors.core.model import Model
from compressors.core.modules.composed import ComposedTable
from compressors.core.modules.formats import Bag
from compressors.core.modules.observed_table import ObservedTable, Read
from compressors.core.scores import call_network
from compressors.core.units import Unit, plain_bag, swap
from compressors.errors.steps import RowsMissing, StepRefused
from compressors.quantize.calibration.loss_gradients import Sensitivity, loss_gradients, sensitivity
from compressors.task_kinds.loss import hard_loss

BATCH = 8192
"""Training rows per batch."""


def lookup_counts(model: Model, bench: Bench, tables: Collection[str]) -> dict[str, Tensor]:
    """Count how often the training rows look up each row of some tables.

    Args:
        model: the network; its tables may already be compressed.
        bench: provides the ``train`` rows.
        tables: names of units.

    Returns:
        For each table name, float64 ``(rows,)``. Padding of bags is not counted.

    Raises:
        RowsMissing: the bench has no training rows.
    """
    if bench.train is None:
        raise RowsMissing("lookup_counts_need_rows")
    copied_module = model.private().module
    units = {unit.name: unit for unit in Unit.of(copied_module)}
    # Each table, or the composed table that contains it.
    outermost = {units[name].part_of or name for name in tables}
    counts = {name: torch.zeros(units[name].rows, dtype=torch.float64) for name in outermost}
    for name, count in counts.items():
        _count_lookups(copied_module, name, count)
    with torch.no_grad():
        for batch in batches(bench.train, bench.signature, BATCH):
            call_network(copied_module, batch.inputs, bench.signature)
        # Counts of parts are derived from the counts of the composed table. A hook on a part would
        # also count lookups whose rows the composed table discards, such as padding within a bag.
        names = {unit.module: unit.name for unit in units.values()}
        for name in outermost:
            table = units[name].module
            inner_table = table.table if isinstance(table, Bag) else table
            counts |= _counts_of_parts(inner_table, counts[name], names)
    return {name: counts[name] for name in tables}


def _counts_of_parts(
    table: nn.Module, counts: Tensor, names: Mapping[nn.Module, str]
) -> dict[str, Tensor]:
    """Return the lookup counts of the tables inside a composed table, at any depth."""
    if not isinstance(table, ComposedTable):
        return {}
    stored = dict(table.named_buffers(recurse=False))
    part_counts: dict[str, Tensor] = {}
    for part, count in table.composition.lookup_counts(stored, counts, table.settings).items():
        module = table.get_submodule(part)
        part_counts |= {names[module]: count, **_counts_of_parts(module, count, names)}
    return part_counts


def _count_lookups(network: nn.Module, name: str, counts: Tensor) -> None:
    """Add the rows that calls and reads of a table's weight use to ``counts``, without padding."""
    module = network.get_submodule(name)
    padding = module.padding_idx if isinstance(module, nn.EmbeddingBag | Bag) else None

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        ids = (args[0] if args else kwargs["input"]).reshape(-1).long()
        counted_ids = ids if padding is None else ids[ids != padding]
        counts.add_(torch.bincount(counted_ids, minlength=len(counts)))

    def observe(read: Read, read_by: Tensor | None) -> None:
        if read_by is None:  # the whole weight
            counts.add_(1)
        elif read == "looked_up":
            counts.add_(torch.bincount(read_by.reshape(-1).long(), minlength=len(counts)))
        else:
            counts.add_(read_by.numel() // read_by.shape[-1])  # the number of multiplied vectors

    # The wrapper reports when forward code reads the table's weight; the hook counts calls. Other
    # attributes of the table stay readable.
    observed = ObservedTable(module, observe, hides_attributes=False)
    observed.register_forward_pre_hook(hook, with_kwargs=True)
    swap(network, name, observed)


def squared_gradients(model: Model, bench: Bench, tables: Collection[str]) -> dict[str, Tensor]:
    """Compute the diagonal of the empirical Fisher matrix for the weights of some tables.

    Source: Theis et al. 2018, https://arxiv.org/abs/1801.05787 (Fisher information as the cost
    of changing a weight).

    Args:
        model: the network; its tables may already be compressed.
        bench: provides the ``train`` rows.
        tables: names of units.

    Returns:
        For each table name, float32 ``(rows, dim)``, as in ``loss_gradients``: the mean, over
        training rows or lists, of the squared gradient of the loss of that row or list. If a data
        row looks up several rows of a table (a bag), each lookup counts separately.

    Raises:
        RowsMissing: the bench has no training rows.
        StepRefused: the signature's task has no loss of rows or lists.
    """
    if bench.train is None:
        raise RowsMissing("gradients_need_rows")
    if not bench.signature.scores_rows:
        raise StepRefused("gradients_need_loss")
    copied_module = model.private().module
    modules = _lookup_modules(copied_module, tables)

    def loss(output: Tensor, batch: Batch, numbers: Tensor) -> Tensor:
        return hard_loss(bench.signature, output, batch)

    gradients = loss_gradients(copied_module, bench.signature, bench.train, loss, modules)
    return {name: curvature for name, (_, curvature) in gradients.items()}


def sensitivities(model: Model, bench: Bench, tables: Collection[str]) -> dict[str, Sensitivity]:
    """Compute the sensitivity of the network's output to the rows and columns of some tables.

    Args:
        model: the network; its tables may already be compressed.
        bench: provides the ``train`` rows.
        tables: names of units.

    Returns:
        The sensitivity, by table name.

    Raises:
        RowsMissing: the bench has no training rows.
    """
    if bench.train is None:
        raise RowsMissing("gradients_need_rows")
    copied_module = model.private().module
    return sensitivity(
        copied_module, bench.signature, bench.train, _lookup_modules(copied_module, tables)
    )


def _lookup_modules(module: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """Return the modules of a copied network that map ids to rows, by table name.

    An ``nn.EmbeddingBag`` is replaced by a lookup and a reduction, so that a hook receives each
    lookup separately.
    """
    modules: dict[str, nn.Module] = {}
    for unit in Unit.of(module):
        if unit.name not in names:
            continue
        table = unit.module
        if isinstance(table, nn.EmbeddingBag):
            table = plain_bag(table)
            swap(module, unit.name, table)
        modules[unit.name] = table.table if isinstance(table, Bag) else table
    return modules
