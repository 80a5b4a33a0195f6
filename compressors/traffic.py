"""What a network reads of its tables: how often each row, and how much the loss depends on it.

Rows are counted where they are looked up, by a hook on each table's module, so that whatever
stands before a lookup (a map of rows, a default for unknown ids, padding) is taken into account.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from compressors.batches import Rows, batches
from compressors.contracts import Bench
from compressors.errors import CompressionError
from compressors.formats import Bag
from compressors.loss import hard_loss, shuffled_rows
from compressors.model import Model
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

    The empirical one: squares of the gradients of each training row's own loss, added up. Rows of
    the data that look a table up twice (a bag) count each lookup by itself.

    Source: Theis et al. 2018, https://arxiv.org/abs/1801.05787 (Fisher information as the price
    of changing a weight).

    Args:
        model: its tables may be compressed already.
        bench: with ``train`` rows.
        tables: names of units.

    Returns:
        Float64 ``(rows, dim)`` by table.

    Raises:
        CompressionError: the bench has no training rows, or its task has no loss.
    """
    if bench.train is None:
        raise CompressionError("Gradients need train rows.")
    if bench.signature.task == "retrieval":
        raise CompressionError("Gradients need a loss, and task 'retrieval' has none yet.")
    private = model.private().module
    seen: list[tuple[str, Tensor, Tensor]] = []
    rows = {}
    for unit in Unit.of(private):
        if unit.name in tables:
            rows[unit.name] = unit.rows
            _watch(private, unit, seen)
    totals: dict[str, Tensor] = {}
    data = Rows(bench.train, bench.signature)
    for numbers in shuffled_rows(data, bench.signature, BATCH, bench.seed):
        seen.clear()
        batch = data.take(numbers)
        output = private(**batch.inputs)
        # The loss is a mean over rows or lists, so its sum has each one's own gradient.
        loss = hard_loss(bench.signature, output, batch) * _terms(bench, batch.group, len(numbers))
        grads = torch.autograd.grad(loss, [found for _, _, found in seen], allow_unused=True)
        for (name, ids, _), grad in zip(seen, grads, strict=True):
            if grad is None:
                continue
            squares = grad.reshape(-1, grad.shape[-1]).double().square()
            if name not in totals:
                totals[name] = torch.zeros(rows[name], squares.shape[1], dtype=torch.float64)
            totals[name].index_add_(0, ids.reshape(-1), squares)
    return totals


def _terms(bench: Bench, group: Tensor | None, rows: int) -> int:
    """How many losses a batch's mean is over."""
    if bench.signature.task != "ranking" or group is None:
        return rows
    return len(torch.unique(group))


def _watch(private: nn.Module, unit: Unit, seen: list[tuple[str, Tensor, Tensor]]) -> None:
    """Note each lookup of a table: its name, the ids ``(*,)``, and what was found ``(*, dim)``.

    What was found becomes a leaf that the rest of the network is computed from, so that no weight
    needs a gradient. Places that a bag pads get none.
    """
    module = unit.module
    if isinstance(module, nn.EmbeddingBag):
        module = plain_bag(module)
        swap(private, unit.name, module)
    table = module.table if isinstance(module, Bag) else module

    def hook(
        module: nn.Module,  # noqa: ARG001
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        found: Tensor,
    ) -> Tensor:
        leaf = found.detach().requires_grad_(True)
        seen.append((unit.name, (args[0] if args else kwargs["input"]).long(), leaf))
        return leaf

    table.register_forward_hook(hook, with_kwargs=True)
