"""Store int8 tables with one scale each as codes that int8 layers can read.

ONNX Runtime multiplies unsigned inputs, so an int8 code is stored as an uint8 code that is larger
by 128. Several tables can share one lookup, whose codes then have one scale per table. The format
exists only in graphs for ONNX Runtime; it is never stored in a bundle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressors.core.modules.formats import PackedTable, TensorSpec
from compressors.lower.lookups.code_operators import ZERO
from compressors.quantize.tables import rowwise_int8
from compressors.quantize.tables.scales import SharedScales


@dataclass(frozen=True)
class CodesFormat:
    """The storage format of concatenated tables that have one scale each.

    It stores ``codes``, uint8 ``(rows, dim)``, and ``scale``, float32: a scalar, or ``(lookups,)``
    if ids ``(rows, lookups)`` select rows of several tables.

    Attributes:
        lookups: number of scales; 0 for a scalar.
        name: the name of the format that each table has.
        learned: names of the tensors that training may change; none, because these tables are not
            trained.
    """

    lookups: int
    name: str = rowwise_int8.FORMAT.name
    learned: tuple[str, ...] = ()

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Return shape and dtype of both tensors."""
        scales = (self.lookups,) if self.lookups else ()
        return {
            "codes": TensorSpec((rows, dim), torch.uint8),
            "scale": TensorSpec(scales, torch.float32, rows_per_entry=0),
        }

    def lookup(
        self, stored: Mapping[str, Tensor], ids: Tensor, dim: int, settings: Mapping[str, Any]
    ) -> Tensor:
        """Look up codes and convert them: float32 ``(*ids, dim)``."""
        codes = torch.ops.recpress.table_codes(stored["codes"], ids)
        rows: Tensor = torch.ops.recpress.dequantize_codes(codes, stored["scale"])
        return rows


def has_one_scale(table: PackedTable) -> bool:
    """Return whether all rows of an int8 table have the same scale and no offset."""
    if table.storage != rowwise_int8.FORMAT:
        return False
    scales = SharedScales.from_settings(table.settings)
    return scales.symmetric and scales.rows_per_scale == 0


def concatenate_codes(tables: Sequence[PackedTable]) -> Tensor:
    """Concatenate the codes of int8 tables along their rows: uint8 ``(rows, dim)``."""
    codes = torch.cat([table.get_buffer("codes").view(torch.uint8) for table in tables])
    return codes.bitwise_xor_(ZERO)  # adds 128 to the int8 number with these bits


def build_table(codes: Tensor, tables: Sequence[PackedTable]) -> PackedTable:
    """Build the table that looks up codes, given the table of each lookup.

    Args:
        codes: the result of ``concatenate_codes``.
        tables: the table of each id of a row; or only one, for ids of any shape.
    """
    scale = torch.cat([table.get_buffer("scale").float().reshape(1) for table in tables])
    lookups = len(tables) if len(tables) > 1 else 0
    stored = {"codes": codes, "scale": scale if lookups else scale[0]}
    rows, dim = codes.shape
    return PackedTable(CodesFormat(lookups), rows, dim, {}, stored)
