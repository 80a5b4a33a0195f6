"""Merge the lookups of several tables into one.

At batch size 1, the latency of a graph depends on its number of operators, and a lookup in a packed
table takes about ten. Tables with the same format, settings and width can be concatenated into one,
which takes about ten operators for all of them. Their inputs must also have the same policy for ids
out of range.

The merged lookup runs before the network. The network receives looked-up rows in place of ids, and
the modules that replace its tables return them unchanged. This is correct only if the network uses
such an input for nothing but its table's lookup. A test run checks that: it passes rows in an
object that only the replaced tables can read, and compares the predictions bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import IdInput, Signature, all_tables, is_out_of_memory
from compressors.core.modules.formats import PackedTable
from compressors.core.random_inputs import generate_inputs
from compressors.core.scores import network_scores
from compressors.core.units import private_copy, swap
from compressors.lower.merged.merged_codebooks import codes_of, merge_tables

MAX_BYTES = 2**28
"""Largest size of a group in bytes.

The tables of a group are copied, and the latency of lookups in larger tables depends on memory
access rather than on the number of operators.
"""
TEST_ROWS = 64
"""Number of generated rows of the test run."""


@dataclass(frozen=True)
class TableGroup:
    """Inputs with one id per row, and their tables, which can be merged.

    Both are in the order of the signature.
    """

    inputs: tuple[IdInput, ...]
    tables: tuple[PackedTable, ...]


class MergedTable(nn.Module):
    """The tables of a group, concatenated along the rows, and their policy for ids out of range.

    Attributes:
        first: the first row of each input's table in the merged one, ``(inputs,)``.
        last: the largest id of each input, ``(inputs,)``.
        instead: the id that replaces one out of range if the policy is ``default_row``,
            ``(inputs,)``.
        label: the names of the tables, separated by commas.
        names: the names of the inputs.
        policy: what to do with an id out of range, as in ``IdInput.out_of_range``: ``clamp`` (use
            the first or last row), ``default_row`` (use ``instead``) or ``error`` (refuse the row).
    """

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
        first_rows = torch.tensor([0, *rows[:-1]]).cumsum(0)
        for name, values in (
            ("first", first_rows),
            ("last", torch.tensor(rows) - 1),
            ("instead", torch.tensor([item.default_row for item in group.inputs])),
        ):
            self.register_buffer(name, values.to(dtype), persistent=False)  # (inputs,)
        self.table = _concatenate(group.tables)
        self.dim = group.tables[0].dim

    def forward(self, ids_by_input: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Look up the rows of every input, and mark the rows of the batch to refuse.

        A refused row has an id out of range; its score will be NaN.

        Args:
            ids_by_input: the ids of each input, int ``(rows,)``.

        Returns:
            Float32 ``(rows, dim)`` for each input, and bool ``(rows,)``: the rows to refuse. None
            instead of the latter if the policy refuses no row.
        """
        ids: Tensor = torch.ops.recpress.join_ids(list(ids_by_input))  # (rows, inputs)
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
    """Group the inputs whose tables can be looked up together.

    Args:
        model: the model in evaluation mode, with each EmbeddingBag replaced by a ``Bag`` (a lookup
            in a table followed by a reduction).
        part: the submodule that the graph runs: the model itself, or one of its towers.
        signature: a signature with the inputs of this graph only.
        rows_of_table: number of rows by table name.

    Returns:
        Groups of at least two inputs each.
    """
    paths = {name: module for name, module in model.named_modules() if module is part}
    path = next(iter(paths))
    # One id per row, which may be any row of one table.
    id_inputs = [
        item
        for item in signature.inputs
        if isinstance(item, IdInput) and not (item.shape or item.more_tables or item.fields)
    ]
    tables_read = [table for item in signature.inputs for table in all_tables(item)]
    members_by_key: dict[Any, list[tuple[IdInput, PackedTable]]] = {}
    for item in id_inputs:
        table = model.get_submodule(item.table)
        if (
            isinstance(table, PackedTable)
            and _is_concatenable(table)
            and tables_read.count(item.table) == 1
        ):
            settings = tuple(sorted(table.settings.items()))
            codebook_shape = tuple(table.get_buffer("codebook").shape) if codes_of(table) else None
            key = (
                table.storage.name,
                table.dim,
                settings,
                codebook_shape,
                item.dtype,
                item.out_of_range,
            )
            members_by_key.setdefault(key, []).append((item, table))
    return [
        group
        for members in members_by_key.values()
        if len(members) > 1
        and sum(tensor.nbytes for _, table in members for tensor in table.buffers()) <= MAX_BYTES
        and _keeps_predictions(
            model, path, signature, rows_of_table, group := TableGroup(*zip(*members, strict=True))
        )
    ]


def replace_merged_tables(
    model: nn.Module, groups: Sequence[TableGroup], replacement: type[nn.Module] = nn.Identity
) -> nn.Module:
    """Copy a model and replace the tables of the groups by modules that return looked-up rows.

    Args:
        model: the model; it is not modified.
        groups: the groups whose tables are replaced.
        replacement: class of the modules that replace the tables.
    """
    copy = private_copy(model)
    for group in groups:
        for item in group.inputs:
            swap(copy, item.table, replacement())
    return copy


def _is_concatenable(table: PackedTable) -> bool:
    """Return whether a table has a codebook, or else only tensors with one entry per row."""
    layout = table.storage.layout(table.rows, table.dim, table.settings)
    return codes_of(table) is not None or all(spec.rows_per_entry == 1 for spec in layout.values())


def _concatenate(tables: Sequence[PackedTable]) -> PackedTable:
    """Concatenate tables of one format, settings and width along their rows."""
    first = tables[0]
    stored = {
        name: torch.cat([dict(table.named_buffers())[name] for table in tables])
        for name, _ in first.named_buffers()
    }
    if codes_of(first) is not None:
        return merge_tables(tables, stored)
    rows = sum(table.rows for table in tables)
    return PackedTable(first.storage, rows, first.dim, first.settings, stored)


@torch.no_grad()
def _keeps_predictions(
    model: nn.Module,
    path: str,
    signature: Signature,
    rows_of_table: dict[str, int],
    group: TableGroup,
) -> bool:
    """Return whether predictions stay the same if only the tables can read a group's inputs."""
    inputs = generate_inputs(signature, rows_of_table, TEST_ROWS)
    expected = network_scores(model.get_submodule(path), inputs, signature)
    rows, _ = MergedTable(group, rows_of_table)([inputs[item.name] for item in group.inputs])
    hidden = {item.name: _HiddenRows(row) for item, row in zip(group.inputs, rows, strict=True)}
    test_model = replace_merged_tables(model, [group], _RowsReader)
    try:
        changed: dict[str, Any] = {**inputs, **hidden}
        predictions = network_scores(test_model.get_submodule(path), changed, signature)
    except Exception as error:  # any use of the ids other than a lookup fails here
        if is_out_of_memory(error):
            raise
        return False
    return bool(torch.equal(predictions, expected))


@dataclass(frozen=True)
class _HiddenRows:
    """Looked-up rows that only ``_RowsReader`` can read, because operators reject this object."""

    rows: Tensor


class _RowsReader(nn.Module):
    """Replaces a table in the test run: returns the rows of ``_HiddenRows``, its only input."""

    def forward(self, input: _HiddenRows) -> Tensor:  # noqa: A002 - torch's name for the ids
        if not isinstance(input, _HiddenRows):
            raise TypeError(f"Expected looked-up rows, got {type(input).__name__}")
        return input.rows
