"""Merge several tables with codebooks into one by concatenating their codes and their codebooks.

A codebook is a small list of entries, to which codes refer by index. In the format ``kmeans``, an
entry is a number, and a table row has one code per weight (all codes of the table index one
codebook). In ``product_codes`` and ``residual_codes``, an entry is a vector, and a table row has
one code per codebook.

A sample has one id per input. The id of input ``i`` selects a row of table ``i``, whose codes index
the codebooks of table ``i``. The merged format exists only in graphs for ONNX Runtime; it is never
stored in a bundle.
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
    """Return a table's number of codes per table row and bits per code; None without a codebook."""
    for storage_format in FORMATS:
        if table.storage == storage_format:  # equal, not identical, in a copied network
            code_bits = storage_format.width(table.rows, table.dim, table.settings)
            if isinstance(storage_format, kmeans.KMeansFormat):
                return table.dim, code_bits  # one code per weight
            shape = storage_format.shape(table.rows, table.dim, table.settings)
            return shape.num_codebooks, code_bits  # one code per codebook
    return None


@dataclass(frozen=True)
class MergedCodebookFormat:
    """The storage format of a table that merges tables of one format and codebook shape.

    Attributes:
        table_format: the format of each table.
        inputs: number of tables, which is the number of ids per sample.
        codes_per_row: number of codes per table row.
        code_bits: bits per stored code.
        merged_layout: shape and dtype of each concatenated tensor, by name.
        learned: names of the tensors that training may change (``TableFormat.learned``); empty,
            because merged tables are not trained.
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
        """Return shape and dtype of each stored tensor; they do not depend on the arguments."""
        return dict(self.merged_layout)

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        ids: Tensor,
        dim: int,
        settings: Mapping[str, Any],
    ) -> Tensor:
        """Look up table rows by ids.

        Args:
            stored: the concatenated tensors by name.
            ids: row numbers in the merged table, ``(samples, inputs)``.
            dim: number of weights of a table row.
            settings: the settings of the tables' format.

        Returns:
            Float32 ``(samples, inputs, dim)``.
        """
        codebook = stored["codebook"]
        is_kmeans = self.table_format == kmeans.FORMAT
        codebooks = self.inputs if is_kmeans else self.inputs * self.codes_per_row
        first_entries = torch.arange(codebooks, dtype=torch.int32) * (len(codebook) // codebooks)
        codes: Tensor = torch.ops.recpress.merged_codes(
            stored["codes"], ids, self.codes_per_row, self.code_bits
        )
        # (samples, inputs, codes_per_row), then with the numbers of an entry as last dimension
        entry_rows = codes + first_entries.reshape(self.inputs, -1)
        entries = F.embedding(entry_rows, codebook).float()
        if is_kmeans:
            rows = entries.squeeze(3)  # an entry is one number, and codes_per_row is dim
            if "scale" not in stored:
                return rows
            return rows * F.embedding(ids, stored["scale"]).float()  # (samples, inputs, 1)
        if self.table_format == residual_codes.FORMAT:
            return entries.sum(dim=2)
        # The entries are padded to equal lengths if codes_per_row does not divide dim.
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
    if stored["codebook"].dim() == 1:  # kmeans: entries are numbers, here vectors of length 1
        stored = {**stored, "codebook": stored["codebook"].unsqueeze(1)}
    layout_of_table = first.storage.layout(first.rows, first.dim, first.settings)
    merged_layout = {
        # ``rows_per_entry``: table rows per entry of the tensor's first dimension, as in each table
        name: TensorSpec(
            tuple(tensor.shape), tensor.dtype, rows_per_entry=layout_of_table[name].rows_per_entry
        )
        for name, tensor in stored.items()
    }
    storage_format = MergedCodebookFormat(first.storage, len(tables), *code_shape, merged_layout)
    rows = sum(table.rows for table in tables)
    return PackedTable(storage_format, rows, first.dim, first.settings, stored)


@torch.library.custom_op("recpress::merged_codes", mutates_args=())
def merged_codes(codes: Tensor, ids: Tensor, count: int, width: int) -> Tensor:
    """Unpack the codes of table rows: int32 ``(*ids, count)`` from uint8 ``(rows, bytes)``.

    ``count`` is the number of codes per table row, ``width`` the bits of a code.
    """
    return unpack(codes[ids], count, width).to(torch.int32)


@merged_codes.register_fake
def _(codes: Tensor, ids: Tensor, count: int, width: int) -> Tensor:
    return codes.new_empty((*ids.shape, count), dtype=torch.int32)
