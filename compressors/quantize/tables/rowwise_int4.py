"""Embedding tables as half a byte per weight, with one scale for each row or group of rows.

A table of ``rows x dim`` float32 shrinks from ``4 * rows * dim`` to
``rows * (ceil(dim / 2) + 2)`` bytes with a float16 scale per row. Asymmetric levels have an offset
per row, so the table takes ``rows * (ceil(dim / 2) + 4)`` bytes.

Paper: Guan et al. 2019, https://arxiv.org/abs/1911.02079 (row-wise 4-bit).
Differs: symmetric by default (TensorRT has no zero point, so a symmetric lookup is cheaper there),
and no weight is clipped by default.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from compressors.core.modules.formats import TableFormat
from compressors.quantize.tables import scales
from compressors.quantize.tables.rowwise import RowwiseSettings, packed_rows_format

# In symmetric levels, code 8 is zero.
FORMAT = packed_rows_format("rowwise_int4", bits=4, zero_code=8)


class RowwiseInt4(RowwiseSettings):
    """Store embedding tables as half a byte per weight and one scale per row."""

    levels: ClassVar[tuple[int, int]] = (15, 16)  # numbers of codes: symmetric, asymmetric

    kind: Literal["rowwise_int4"] = "rowwise_int4"

    @property
    def storage(self) -> TableFormat:
        """The format that the step writes."""
        return FORMAT

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode a block of rows, float ``(rows, dim)``; ``params`` is the result of ``fit``."""
        return scales.encode_codes(block, params, self.grid, FORMAT.bits)
