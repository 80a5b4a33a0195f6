"""Tables in which several ids share a row: the composition of merged, clustered and pruned tables.

A map gives for each id the index of the stored row that it looks up. It takes one byte per id for
up to 256 stored rows, two for up to 65,536, and so on. A *plane* contains the bytes of one
significance of all ids. TensorRT stores one-byte constants in one byte only as int8 inputs of a
DequantizeLinear (it silently widens uint8 and int16 to four bytes in its engine), so the bytes are
int8 for all targets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressors.core.modules.composed import Composition, Parts, PartSpec, sum_counts
from compressors.core.modules.formats import TensorSpec


def bytes_needed(stored_rows: int) -> int:
    """Return the number of bytes per id of ``byte_planes`` for a number of stored rows."""
    return max(1, -(-(stored_rows - 1).bit_length() // 8))


def byte_planes(index: Tensor, stored_rows: int) -> Tensor:
    """Encode indices, int ``(rows,)`` in [0, stored_rows), as int8 ``(rows, bytes_needed)``.

    The least significant byte comes first. 128 is subtracted from each byte, so that it is int8.
    """
    planes = [(index >> (8 * plane)) & 255 for plane in range(bytes_needed(stored_rows))]
    return (torch.stack(planes, dim=1) - 128).to(torch.int8)


@torch.library.custom_op("recpress::unique_row_index", mutates_args=())
def unique_row_index(planes: Tensor, ids: Tensor) -> Tensor:
    """Decode the row indices of ids ``(*,)`` from ``byte_planes`` ``(rows, k)``: int64 ``(*,)``."""
    byte_values = planes[ids].to(torch.int64) + 128  # (*ids, k)
    significance = 256 ** torch.arange(planes.shape[1], device=planes.device)  # (k,)
    return (byte_values * significance).sum(dim=-1)


@unique_row_index.register_fake
def _(planes: Tensor, ids: Tensor) -> Tensor:
    return planes.new_empty(ids.shape, dtype=torch.int64)


@dataclass(frozen=True)
class RowMapComposition:
    """A table ``unique`` of stored rows, and for each id the index of its row: ``planes``.

    The indices are encoded by ``byte_planes``. The setting ``places`` is the number of rows of
    ``unique``.

    A composition defines how a table computes its rows from stored tensors and from inner tables,
    its *parts*. The protocol ``Composition`` (``core/modules/composed.py``) explains the methods.
    ``learned``: names of the stored tensors that training may change. ``first``: the value of all
    entries of a placeholder, which must be valid indices.
    """

    name: str = "row_map"
    learned: tuple[str, ...] = ()

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        shape = (rows, bytes_needed(settings["places"]))
        return {"planes": TensorSpec(shape, torch.int8, first=-128)}  # -128 encodes index 0

    def parts(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, PartSpec]:
        return {"unique": PartSpec(settings["places"], dim)}

    def lookup_counts(
        self, stored: Mapping[str, Tensor], counts: Tensor, settings: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        ids = torch.arange(len(counts))
        index = torch.ops.recpress.unique_row_index(stored["planes"], ids)
        return {"unique": sum_counts(counts, index, settings["places"])}

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        parts: Parts,
        ids: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        rows: Tensor = parts["unique"](torch.ops.recpress.unique_row_index(stored["planes"], ids))
        return rows


COMPOSITION: Composition = RowMapComposition()
