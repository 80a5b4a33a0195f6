"""Merge tables with codebooks into one: their codes and their codebooks are concatenated.

An id of input ``i`` selects the codes of its row, which index the ``i``-th table's codebooks. This
format exists only in graphs for ONNX Runtime; it is never stored in a bundle.
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
    """Number of codes per row and bits per code; None if the table has no codebook."""
    for form in FORMATS:
        if table.storage == form:  # a copied network has copies of them
            wide = form.width(table.rows, table.dim, table.settings)
            if isinstance(form, kmeans.KMeansFormat):
                return table.dim, wide
            return form.shape(table.rows, table.dim, table.settings).books, wide
    return None


@dataclass(frozen=True)
class MergedCodebookFormat:
    """The format of several tables of one format with codebooks of one shape.

    Args:
        inside: the format of each table.
        inputs: number of tables.
        count: codes per row.
        wide: bits per stored code.
        laid: layout of the concatenated tensors, by name.
    """

    inside: TableFormat
    inputs: int
    count: int
    wide: int
    laid: Mapping[str, TensorSpec]
    learned: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The tag of the format of the merged tables."""
        return self.inside.name

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return dict(self.laid)

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        ids: Tensor,
        dim: int,
        settings: Mapping[str, Any],
    ) -> Tensor:
        """Look up ids ``(rows, inputs)``: float32 ``(rows, inputs, dim)``."""
        codebook = stored["codebook"]
        scalar = self.inside == kmeans.FORMAT
        books = self.inputs if scalar else self.inputs * self.count
        first = torch.arange(books, dtype=torch.int32) * (len(codebook) // books)
        codes: Tensor = torch.ops.recpress.merged_codes(stored["codes"], ids, self.count, self.wide)
        places = codes + first.reshape(self.inputs, -1)  # (rows, inputs, count)
        entries = F.embedding(places, codebook).float()  # (rows, inputs, count, entry)
        if scalar:
            rows = entries.squeeze(3)
            if "scale" not in stored:
                return rows
            return rows * F.embedding(ids, stored["scale"]).float()  # (rows, inputs, 1)
        if self.inside == residual_codes.FORMAT:
            return entries.sum(dim=2)
        columns = product_codes.columns(dim, self.count)
        rows = entries.flatten(2)
        return rows if columns is None else rows[:, :, columns]


def merge_tables(tables: Sequence[PackedTable], stored: dict[str, Tensor]) -> PackedTable:
    """Merge tables with equal ``codes_of`` and codebooks of equal shape into one.

    Args:
        tables: in the order of their inputs.
        stored: their tensors, concatenated along the first dimension, by name.

    Raises:
        ValueError: the tables have no codebooks.
    """
    first, described = tables[0], codes_of(tables[0])
    if described is None:
        raise ValueError(f"tables of format {first.storage.name!r} have no codebooks")
    if stored["codebook"].dim() == 1:
        stored = {**stored, "codebook": stored["codebook"].unsqueeze(1)}
    every = first.storage.layout(first.rows, first.dim, first.settings)
    laid = {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype, every=every[name].every)
        for name, tensor in stored.items()
    }
    form = MergedCodebookFormat(first.storage, len(tables), *described, laid)
    rows = sum(table.rows for table in tables)
    return PackedTable(form, rows, first.dim, first.settings, stored)


@torch.library.custom_op("recpress::merged_codes", mutates_args=())
def merged_codes(codes: Tensor, ids: Tensor, count: int, width: int) -> Tensor:
    """Codes of the requested rows: int32 ``(*ids, count)`` from bytes ``(rows, bytes)``."""
    return unpack(codes[ids], count, width).to(torch.int32)


@merged_codes.register_fake
def _(codes: Tensor, ids: Tensor, count: int, width: int) -> Tensor:
    return codes.new_empty((*ids.shape, count), dtype=torch.int32)
