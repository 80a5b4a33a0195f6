"""What a network reads of its tables: how often it looks up each row.

Rows are counted where they are looked up, by a hook on each table's module, so that whatever
stands before a lookup (a map of rows, a default for unknown ids, padding) is taken into account.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from compressors.batches import batches
from compressors.contracts import Bench
from compressors.errors import CompressionError
from compressors.formats import Bag
from compressors.model import Model
from compressors.units import Unit

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

    def counter(name: str, padding: int | None) -> None:
        def count(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:  # noqa: ARG001
            ids = (args[0] if args else kwargs["input"]).reshape(-1).long()
            if padding is not None:
                ids = ids[ids != padding]
            counts[name] += torch.bincount(ids, minlength=len(counts[name]))

        units[name].module.register_forward_pre_hook(count, with_kwargs=True)

    for name, unit in units.items():
        counter(name, padding_of(unit.module))
    with torch.no_grad():
        for batch in batches(bench.train, bench.signature, BATCH):
            private(**batch.inputs)
    return counts


def padding_of(module: nn.Module) -> int | None:
    """The id whose lookups are not read: that of a bag's padding."""
    if isinstance(module, nn.EmbeddingBag | Bag):
        return module.padding_idx
    return None
