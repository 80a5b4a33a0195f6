"""Merge the lookups of several tables into one.

At batch size 1, the latency of a graph depends on its number of operators, and a lookup in a packed
table takes about ten. Tables with the same format, settings and width can be concatenated into one,
which takes about ten operators for all of them.

Lookups are merged if the ids of each are one column of the same matrix. It does not matter how the
network selects the column, or what it does with the rows. The matrix may be an input of the model,
or the ids of several inputs, which ``ServingWrapper`` joins. Where a network concatenates looked-up
rows again, the rows of the merged lookup take the place of the result.

Each row is stored once: other lookups of a concatenated table, such as those of a list of ids, read
the concatenated one too.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from compressors.lower.lookups.codes_into_layers import pass_codes_to_layers
from compressors.lower.lookups.find_lookups import (
    Column,
    Lookup,
    Table,
    find_column,
    find_lookups,
)
from compressors.lower.lookups.join_rows import join_rows
from compressors.lower.lookups.merged_tables import (
    MergedTable,
    count_bytes,
    find_limit,
    has_codebook,
    is_stored_as_codes,
    merge_key,
)
from compressors.lower.lookups.program_editor import ProgramEditor, dtype_of, row_shape

MERGED = "together"
"""Names of the initializers of merged tables begin with this name, so it must not change."""
_aten = torch.ops.aten


@dataclass(frozen=True)
class Read:
    """A table, and a column of ids that are looked up in it.

    Attributes:
        table: the table.
        column: index of the column.
        lookups: the operators that look these ids up; several if the network repeats a lookup.
    """

    table: Table
    column: int
    lookups: tuple[Lookup, ...]


@dataclass(frozen=True)
class LookupGroup:
    """Tables of which one lookup reads rows.

    Attributes:
        tables: the tables by name, each once.
        matrix: the matrix of ids, of which each lookup in ``reads`` takes one column; None if there
            are none.
        reads: the lookups that are merged.
        others: other lookups of the tables.
    """

    tables: dict[str, Table]
    matrix: fx.Node | None
    reads: tuple[Read, ...]
    others: tuple[Lookup, ...]


def merge_lookups(
    program: torch.export.ExportedProgram, module: nn.Module
) -> tuple[MergedTable, ...]:
    """Merge the lookups of a program where possible, and pass codes of tables to int8 layers.

    Args:
        program: the program, which is changed in place.
        module: the module from which it was traced.

    Returns:
        The concatenated tables. The names of their stored tensors in the program begin with
        ``together.0.table``, ``together.1.table`` and so on.
    """
    editor = ProgramEditor(program, module)
    merged: list[MergedTable] = []
    looked_up: list[fx.Node] = []
    stored = {node: id(tensor) for node, tensor in editor.tensors.items()}
    lookups = find_lookups(editor.graph, stored, module)
    for group in group_lookups(lookups, find_limit(module)):
        tables = list(group.tables.values())
        label = ", ".join(group.tables)
        read = [read.table for read in group.reads] or tables
        table = MergedTable(tables, read, label)
        name = f"{MERGED}.{len(merged)}.table"
        if group.matrix is not None:
            looked_up.append(_merge(editor, group, group.matrix, table, name))
        for number, lookup in enumerate(group.others):
            # A single table has its own name; its tensors are added by the first lookup.
            _redirect(editor, lookup, table, f"{name}.{number}" if group.reads else name)
        merged.append(table)
    join_rows(editor, looked_up)
    pass_codes_to_layers(editor, module)
    editor.finish()
    return tuple(merged)


def group_lookups(lookups: Sequence[Lookup], limit: int) -> list[LookupGroup]:
    """Group lookups of tables that can be concatenated.

    A group has at least two different reads; or one table of codes, which int8 layers may read.

    Args:
        lookups: the lookups of a program.
        limit: largest size of the tables of a group, in bytes.
    """
    by_table: dict[int, list[Lookup]] = {}
    for lookup in lookups:
        by_table.setdefault(id(lookup.table), []).append(lookup)
    columns: dict[Lookup, Column] = {}
    members: dict[Hashable, list[Lookup]] = {}
    for lookup in lookups:
        key, column = merge_key(lookup.table), find_column(lookup.ids)
        if key is None or column is None or not lookup.is_only_use:
            continue
        if has_codebook(lookup.table) and len(by_table[id(lookup.table)]) > 1:
            continue  # the position of an id among the ids of a row determines the codebook
        columns[lookup] = column
        members.setdefault((key, column.matrix), []).append(lookup)
    result: list[LookupGroup] = []
    grouped: set[int] = set()
    for together in members.values():
        free = [lookup for lookup in together if id(lookup.table) not in grouped]
        group = _build_group(_leave_out_largest(free, limit), columns, by_table)
        if group is not None:
            result.append(group)
            grouped |= {id(table) for table in group.tables.values()}
    for of_table in by_table.values():
        first = of_table[0]
        is_small = count_bytes([first.table]) <= limit
        is_free = first.is_only_use and id(first.table) not in grouped
        if is_stored_as_codes(first.table) and is_small and is_free:
            result.append(LookupGroup({first.name: first.table}, None, (), tuple(of_table)))
    return result


def _leave_out_largest(lookups: Sequence[Lookup], limit: int) -> list[Lookup]:
    """Return the lookups without those of the largest tables: ``limit`` bytes together."""
    by_size = sorted(
        {id(lookup.table): lookup.table for lookup in lookups}.values(),
        key=lambda table: count_bytes([table]),
    )
    while by_size and count_bytes(by_size) > limit and not _reads_without_copy(by_size):
        by_size.pop()
    return [lookup for lookup in lookups if any(lookup.table is table for table in by_size)]


def _reads_without_copy(tables: Sequence[Table]) -> bool:
    """Return whether a lookup of these tables reads a stored tensor of the model as it is."""
    return len(tables) == 1 and not is_stored_as_codes(tables[0])


def _build_group(
    lookups: Sequence[Lookup],
    columns: dict[Lookup, Column],
    by_table: dict[int, list[Lookup]],
) -> LookupGroup | None:
    """Return the group of lookups with equal keys and matrices; None if they are one read."""
    repeated: dict[tuple[int, int], list[Lookup]] = {}
    tables: dict[str, Table] = {}
    for lookup in lookups:
        read = (id(lookup.table), columns[lookup].index)
        repeated.setdefault(read, []).append(lookup)
        if all(lookup.table is not table for table in tables.values()):
            tables[lookup.name] = lookup.table
    if len(repeated) < 2:
        return None
    reads = tuple(
        Read(same[0].table, columns[same[0]].index, tuple(same)) for same in repeated.values()
    )
    others = [
        lookup
        for table in tables.values()
        for lookup in by_table[id(table)]
        if lookup not in lookups
    ]
    return LookupGroup(tables, columns[lookups[0]].matrix, reads, tuple(others))


def _merge(
    editor: ProgramEditor, group: LookupGroup, matrix: fx.Node, merged: MergedTable, name: str
) -> fx.Node:
    """Replace the reads of a group by one lookup; return its output, ``(rows, lookups, dim)``."""
    offsets = [merged.first_row[id(read.table)] for read in group.reads]
    with editor.after(matrix):
        ids = _select_columns(editor, matrix, [read.column for read in group.reads], name)
        if any(offsets):
            added = editor.add_tensor(f"{name}.first_rows", torch.tensor(offsets))
            ids = editor.call(_aten.add.Tensor, ids, added)
        rows = editor.insert(merged.table, ids, name)
        for index, read in enumerate(group.reads):
            row = editor.call(_aten.select.int, rows, 1, index)  # (rows, dim)
            for lookup in read.lookups:
                shape = row_shape(lookup.node) or ()
                same = row_shape(row) == shape
                reshaped = row if same else editor.call(_aten.reshape.default, row, [-1, *shape])
                lookup.node.replace_all_uses_with(reshaped)
    return rows


def _select_columns(
    editor: ProgramEditor, matrix: fx.Node, columns: Sequence[int], name: str
) -> fx.Node:
    """Add the selection of columns as int64 ``(rows, columns)``."""
    (width,) = row_shape(matrix) or (1,)
    first, last = columns[0], columns[-1]
    ids = matrix
    if row_shape(matrix) == ():
        ids = editor.call(_aten.unsqueeze.default, matrix, 1)
    if list(columns) != list(range(width)):
        if list(columns) == list(range(first, last + 1)):
            ids = editor.call(_aten.slice.Tensor, ids, 1, first, last + 1)
        else:
            indices = editor.add_tensor(f"{name}.columns", torch.tensor(columns))
            ids = editor.call(_aten.index_select.default, ids, 1, indices)
    return _convert_to_int64(editor, ids)


def _redirect(editor: ProgramEditor, lookup: Lookup, merged: MergedTable, name: str) -> None:
    """Let a lookup read the concatenated table."""
    with editor.after(lookup.ids):
        ids = _convert_to_int64(editor, lookup.ids)
        first_row = merged.first_row[id(lookup.table)]
        if first_row:
            ids = editor.call(_aten.add.Tensor, ids, first_row)
        lookup.node.replace_all_uses_with(editor.insert(merged.reader(lookup.table), ids, name))


def _convert_to_int64(editor: ProgramEditor, ids: fx.Node) -> fx.Node:
    return ids if dtype_of(ids) == torch.int64 else editor.call(_aten.to.dtype, ids, torch.int64)
