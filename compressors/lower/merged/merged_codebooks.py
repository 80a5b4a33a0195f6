"""Merge several tables with codebooks into one by concatenating their codes and their codebooks.

A codebook is a small table of entries (numbers or vectors), which codes of rows refer to by index.

The merged table looks up one id per input and row. An id of input ``i`` selects a row of codes, and
these index the codebooks of table ``i``. The merged format exists only in graphs for ONNX Runtime;
it is never stored in a bundle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.core.modules.formats import PackedTable, TableFormat, TensorSpec
from compressors.quantize.kernels.bitpacking import unpack
from compressors.quantize.tables import kmeans, product_codes, residual_codes

FORMATS = (kmeans.FORMAT, product_codes.FORMAT, residual_codes.FORMAT)


def codes_of(table: PackedTable) -> tuple[int, int] | None:
    """Return a table's number of codes per row and bits per code; None if it has no codebook."""
    for storage_format in FORMATS:
        if table.storage == storage_format:  # equal, not identical, in a copied network
            code_bits = storage_format.width(table.rows, table.dim, table.settings)
            if isinstance(storage_format, kmeans.KMeansFormat):
                return table.dim, code_bits
            return storage_format.shape(table.rows, table.dim, table.settings).books, code_bits
    return None


@dataclass(frozen=True)
class MergedCodebookFormat:
    """The storage format of a table that merges tables of one format and codebook shape.

    Attributes:
        table_format: the format of each table.
        inputs: number of tables, which is the number of ids per row.
        codes_per_row: number of codes per row.
        code_bits: bits per stored code.
        merged_layout: shape and dtype of each concatenated tensor, by name.
        learned: names of trainable tensors; empty, because merged tables are not trained.
    """

    table_format: TableFormat
    inputs: int
    codes_per_row: int
    code_bits: int
    merged_layout: Mapping[str, TensorSpec]
    learned: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the format that each table has."""
        return self.table_format.name

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Return shape and dtype of each stored tensor; the arguments are not needed."""
        return dict(self.merged_layout)

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        ids: Tensor,
        dim: int,
        settings: Mapping[str, Any],
    ) -> Tensor:
        """Look up rows by ids.

        Args:
            stored: the concatenated tensors by name.
            ids: row numbers in the merged table, ``(rows, inputs)``.
            dim: width of each table.
            settings: the settings of the tables' format.

        Returns:
            Float32 ``(rows, inputs, dim)``.
        """
        codebook = stored["codebook"]
        is_kmeans = self.table_format == kmeans.FORMAT
        codebooks = self.inputs if is_kmeans else self.inputs * self.codes_per_row
        first_entries = torch.arange(codebooks, dtype=torch.int32) * (len(codebook) // codebooks)
        codes: Tensor = torch.ops.recpress.merged_codes(
            stored["codes"], ids, self.codes_per_row, self.code_bits
        )
        entry_rows = codes + first_entries.reshape(self.inputs, -1)  # (rows, inputs, count)
        entries = F.embedding(entry_rows, codebook).float()  # (rows, inputs, count, entry)
        if is_kmeans:
            rows = entries.squeeze(3)
            if "scale" not in stored:
                return rows
            return rows * F.embedding(ids, stored["scale"]).float()  # (rows, inputs, 1)
        if self.table_format == residual_codes.FORMAT:
            return entries.sum(dim=2)
        columns = product_codes.padded_columns(dim, self.codes_per_row)
        rows = entries.flatten(2)
        return rows if columns is None else rows[:, :, columns]


def merge_tables(tables: Sequence[PackedTable], stored: dict[str, Tensor]) -> PackedTable:
    """Build one table from tables with equal results of ``codes_of`` and equal codebook shapes.

    Args:
        tables: the tables in the order of the inputs that look rows up in them.
        stored: the tables' tensors, concatenated along the first dimension, by name.

    Raises:
        ValueError: the tables have no codebooks.
    """
    first, code_shape = tables[0], codes_of(tables[0])
    if code_shape is None:
        raise ValueError(f"tables of format {first.storage.name!r} have no codebooks")
    if stored["codebook"].dim() == 1:
        stored = {**stored, "codebook": stored["codebook"].unsqueeze(1)}
    layout_of_table = first.storage.layout(first.rows, first.dim, first.settings)
    merged_layout = {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype, every=layout_of_table[name].every)
        for name, tensor in stored.items()
    }
    storage_format = MergedCodebookFormat(first.storage, len(tables), *code_shape, merged_layout)
    rows = sum(table.rows for table in tables)
    return PackedTable(storage_format, rows, first.dim, first.settings, stored)


@torch.library.custom_op("recpress::merged_codes", mutates_args=())
def merged_codes(codes: Tensor, ids: Tensor, count: int, width: int) -> Tensor:
    """Unpack the codes of rows: int32 ``(*ids, count)`` from bytes ``(rows, bytes)``.

    ``count`` is the number of codes per row, ``width`` the bits of a code.
    """
    return unpack(codes[ids], count, width).to(torch.int32)


@merged_codes.register_fake
def _(codes: Tensor, ids: Tensor, count: int, width: int) -> Tensor:
    return codes.new_empty((*ids.shape, count), dtype=torch.int32)
