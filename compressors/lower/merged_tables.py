"""Merge the lookups of several tables into one.

At batch size 1, the time of a graph depends on its number of operators. A lookup in a packed table
takes about ten. Tables that are stored alike can be concatenated into one, which needs about ten
operators for all of them. The inputs of a group share their table's format, settings and width, and
the policy for ids out of range.

The network is not changed: it receives looked-up rows instead of ids, and its tables return them
unchanged. This is correct only if the network uses such an input for nothing but its table's
lookup. A trial run checks that: it passes inputs that only the table can read, and compares the
predictions bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import IdInput, Signature, is_out_of_memory
from compressors.core.batches import example
from compressors.core.modules.formats import PackedTable
from compressors.core.units import private_copy, swap
from compressors.lower.merged_codebooks import codes_of, merge_tables

MOST_BYTES = 2**28
"""Largest size of a group in bytes: its tables are copied, and lookups in larger ones are bound by
memory, not by the number of operators.
"""
TRIED_ROWS = 64


@dataclass(frozen=True)
class TableGroup:
    """Inputs with one id per row whose tables are stored alike, in the order of the signature."""

    inputs: tuple[IdInput, ...]
    tables: tuple[PackedTable, ...]


class MergedTable(nn.Module):
    """The tables of a group, concatenated into one along the rows."""

    first: Tensor
    last: Tensor
    instead: Tensor

    def __init__(self, group: TableGroup, rows_of_table: dict[str, int]) -> None:
        super().__init__()
        self.names = tuple(item.name for item in group.inputs)
        self.label = ", ".join(item.table for item in group.inputs)
        self.policy = group.inputs[0].out_of_range
        rows = [rows_of_table[item.table] for item in group.inputs]
        dtype = getattr(torch, group.inputs[0].dtype)
        begins = torch.tensor([0, *rows[:-1]]).cumsum(0)
        for name, values in (
            ("first", begins),
            ("last", torch.tensor(rows) - 1),
            ("instead", torch.tensor([item.default_row for item in group.inputs])),
        ):
            self.register_buffer(name, values.to(dtype), persistent=False)  # (inputs,)
        self.table = _concatenated(group.tables)
        self.dim = group.tables[0].dim

    def forward(self, given: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Look up the rows of every input, and mark the rows of a request to refuse.

        Args:
            given: ids by input, ``(rows,)`` each.

        Returns:
            Float32 ``(rows, dim)`` for each input, and bool ``(rows,)``: the rows to refuse. None
            if the policy refuses no row.
        """
        ids: Tensor = torch.ops.recpress.join_ids(list(given))  # (rows, inputs)
        inside = torch.minimum(torch.maximum(ids, torch.zeros_like(self.last)), self.last)
        refused = None
        if self.policy != "clamp":
            outside = inside != ids
            if self.policy == "default_row":
                inside = torch.where(outside, self.instead, ids)
            else:  # as floats: not every target can reduce booleans
                refused = outside.to(torch.float32).sum(dim=1) > 0
        looked_up: Tensor = self.table(inside + self.first)  # (rows, inputs, dim)
        flat: Tensor = torch.ops.recpress.join_rows(looked_up)  # (rows, inputs * dim)
        return list(torch.split(flat, self.dim, dim=1)), refused


@torch.library.custom_op("recpress::join_ids", mutates_args=())
def join_ids(ids: list[Tensor]) -> Tensor:
    """Stack the ids of several inputs, ``(rows,)`` each, into ``(rows, inputs)``."""
    return torch.stack(ids, dim=1)


@join_ids.register_fake
def _(ids: list[Tensor]) -> Tensor:
    return ids[0].new_empty((ids[0].shape[0], len(ids)))


@torch.library.custom_op("recpress::join_rows", mutates_args=())
def join_rows(rows: Tensor) -> Tensor:
    """Flatten looked-up rows ``(rows, inputs, dim)`` to ``(rows, inputs * dim)``."""
    return rows.flatten(1).clone()


@join_rows.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], rows.shape[1] * rows.shape[2]))


def table_groups(
    model: nn.Module, part: nn.Module, signature: Signature, rows_of_table: dict[str, int]
) -> list[TableGroup]:
    """Find the inputs whose tables can be looked up together.

    Args:
        model: in evaluation mode, bags rewritten.
        part: the submodule that the graph runs.
        signature: with the inputs of this graph only.
        rows_of_table: number of rows by table name.
    """
    paths = {name: module for name, module in model.named_modules() if module is part}
    path = next(iter(paths))
    id_inputs = [item for item in signature.inputs if isinstance(item, IdInput) and not item.shape]
    tables_read = [item.table for item in signature.inputs if hasattr(item, "table")]
    alike: dict[Any, list[tuple[IdInput, PackedTable]]] = {}
    for item in id_inputs:
        table = model.get_submodule(item.table)
        if (
            isinstance(table, PackedTable)
            and _is_concatenable(table)
            and tables_read.count(item.table) == 1
        ):
            settings = tuple(sorted(table.settings.items()))
            books = tuple(table.get_buffer("codebook").shape) if codes_of(table) else None
            key = (table.storage.name, table.dim, settings, books, item.dtype, item.out_of_range)
            alike.setdefault(key, []).append((item, table))
    return [
        group
        for members in alike.values()
        if len(members) > 1
        and sum(table.get_buffer(n).nbytes for _, table in members for n in _names(table))
        <= MOST_BYTES
        and _predictions_unchanged(
            model, path, signature, rows_of_table, group := TableGroup(*zip(*members, strict=True))
        )
    ]


def with_merged_tables(
    model: nn.Module, found: Sequence[TableGroup], stand_in: type[nn.Module] = nn.Identity
) -> nn.Module:
    """A copy of the network in which the tables of the groups return their input unchanged."""
    copied = private_copy(model)
    for group in found:
        for item in group.inputs:
            swap(copied, item.table, stand_in())
    return copied


def _is_concatenable(table: PackedTable) -> bool:
    """Whether such tables can be concatenated: each entry is for one row, or of a codebook."""
    layout = table.storage.layout(table.rows, table.dim, table.settings)
    return codes_of(table) is not None or all(spec.every == 1 for spec in layout.values())


def _names(table: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, _ in table.named_buffers())


def _concatenated(tables: Sequence[PackedTable]) -> PackedTable:
    first = tables[0]
    stored = {
        name: torch.cat([table.get_buffer(name) for table in tables]) for name in _names(first)
    }
    if codes_of(first) is not None:
        return merge_tables(tables, stored)
    rows = sum(table.rows for table in tables)
    return PackedTable(first.storage, rows, first.dim, first.settings, stored)


@torch.no_grad()
def _predictions_unchanged(
    model: nn.Module,
    path: str,
    signature: Signature,
    rows_of_table: dict[str, int],
    group: TableGroup,
) -> bool:
    """Whether predictions stay the same if only the tables can read a group's inputs."""
    inputs = example(signature, rows_of_table, TRIED_ROWS)
    expected = model.get_submodule(path)(**inputs)
    rows, _ = MergedTable(group, rows_of_table)([inputs[item.name] for item in group.inputs])
    sealed = {item.name: _Sealed(row) for item, row in zip(group.inputs, rows, strict=True)}
    opened = with_merged_tables(model, [group], _Opening)
    try:
        predictions = opened.get_submodule(path)(**{**inputs, **sealed})
    except Exception as fault:  # any use of the ids other than a lookup fails here
        if is_out_of_memory(fault):
            raise
        return False
    return bool(torch.equal(predictions, expected))


@dataclass(frozen=True)
class _Sealed:
    """Rows that only ``_Opening`` can read: no operator accepts this as a tensor."""

    rows: Tensor


class _Opening(nn.Module):
    """A table's placeholder that returns the rows of a ``_Sealed`` and rejects all other input."""

    def forward(self, input: _Sealed) -> Tensor:  # noqa: A002 - torch's name for the ids
        if not isinstance(input, _Sealed):
            raise TypeError(f"rows that were looked up together; found {type(input).__name__}")
        return input.rows
