"""Concatenate tables of one format, settings and width, so that one lookup reads all of them."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from compressors.core.modules.formats import PackedTable
from compressors.lower.lookups.find_lookups import Table
from compressors.lower.lookups.merged_codebooks import codes_of, merge_tables
from compressors.lower.lookups.merged_scales import (
    CodesFormat,
    build_table,
    concatenate_codes,
    has_one_scale,
)

MAX_BYTES = 2**28
"""Largest size of concatenated tables in bytes.

They are copied, and the latency of lookups in larger tables depends on memory access rather than on
the number of operators.
"""
LARGE_NETWORK = 2**29
"""Bytes from which a graph links to the files of a bundle instead of storing weights again."""
MAX_BYTES_OF_LARGE = 2**24
"""Largest size of concatenated tables in a large network; its larger tables stay links."""


def find_limit(module: nn.Module) -> int:
    """Return the largest size in bytes of tables that may be copied into a network's graph."""
    tensors = {id(tensor): tensor.nbytes for tensor in module.state_dict(keep_vars=True).values()}
    return MAX_BYTES if sum(tensors.values()) <= LARGE_NETWORK else MAX_BYTES_OF_LARGE


class MergedTable(nn.Module):
    """Tables that are concatenated along their rows.

    Attributes:
        table: the concatenated tables, or the only one. It returns the rows of several tables; see
            ``reader`` for those of one.
        label: the names of the tables, separated by commas.
        first_row: the first row of each table in ``table``, by the ``id`` of the table.
    """

    def __init__(self, tables: Sequence[Table], read: Sequence[Table], label: str) -> None:
        """Concatenate tables with equal results of ``merge_key``.

        Args:
            tables: the tables, each once.
            read: the table of each id of a row, for a lookup of several ids per row.
            label: the names of the tables, separated by commas.
        """
        super().__init__()
        self.label = label
        self.first_row = {}
        count = 0
        for table in tables:
            self.first_row[id(table)] = count
            count += rows_of(table)
        self.table = _concatenate(tables, read)

    def reader(self, table: Table) -> Table:
        """Return a module that looks up rows of one table, by their numbers in ``table``."""
        storage = self.table.storage if isinstance(self.table, PackedTable) else None
        if isinstance(storage, CodesFormat) and storage.lookups:  # the scales of several lookups
            return build_table(_packed(self.table).get_buffer("codes"), [_packed(table)])
        return self.table


def merge_key(table: Table) -> Hashable | None:
    """Return a value that is equal for tables that can be concatenated; None if one cannot be."""
    if isinstance(table, nn.Embedding):
        is_plain = table.max_norm is None and table.weight.dtype == torch.float32
        return ("float32", table.embedding_dim) if is_plain else None
    if has_one_scale(table):
        return ("codes", table.dim)
    layout = table.storage.layout(table.rows, table.dim, table.settings)
    codebook_shape = None
    if has_codebook(table):
        codebook_shape = tuple(table.get_buffer("codebook").shape)
    elif any(spec.rows_per_entry != 1 for spec in layout.values()):
        return None
    settings = tuple(sorted(table.settings.items()))
    return (table.storage.name, table.dim, settings, codebook_shape)


def has_codebook(table: Table) -> bool:
    """Return whether the codes of a table refer to the entries of a codebook."""
    return isinstance(table, PackedTable) and codes_of(table) is not None


def rows_of(table: Table) -> int:
    """Return the number of rows of a table."""
    return table.rows if isinstance(table, PackedTable) else table.num_embeddings


def count_bytes(tables: Sequence[Table]) -> int:
    """Return the bytes of all tensors of some tables."""
    return sum(tensor.nbytes for table in tables for tensor in table.state_dict().values())


def is_stored_as_codes(table: Table) -> bool:
    """Return whether a graph stores a table as codes that int8 layers can read."""
    return isinstance(table, PackedTable) and has_one_scale(table)


def _packed(table: Table) -> PackedTable:
    assert isinstance(table, PackedTable)  # noqa: S101 - ``merge_key`` distinguishes them
    return table


def _concatenate(tables: Sequence[Table], read: Sequence[Table]) -> Table:
    first = tables[0]
    if is_stored_as_codes(first):
        codes = concatenate_codes([_packed(table) for table in tables])
        return build_table(codes, [_packed(table) for table in read])
    if len(tables) == 1:
        return first
    if not isinstance(first, PackedTable):
        weight = torch.cat([_get_weight(table) for table in tables])
        rows, dim = weight.shape
        return nn.Embedding(rows, dim, _weight=weight)
    stored = {
        name: torch.cat([table.get_buffer(name) for table in tables])
        for name, _ in first.named_buffers()
    }
    if has_codebook(first):
        return merge_tables([_packed(table) for table in tables], stored)
    rows = sum(map(rows_of, tables))
    return PackedTable(first.storage, rows, first.dim, first.settings, stored)


def _get_weight(table: Table) -> Tensor:
    weight = table.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - of an nn.Embedding
    return weight.detach()
