"""Embedding tables as a quarter byte per weight, with one scale for each row or group of rows.

A table of ``rows x dim`` float32 shrinks from ``4 * rows * dim`` to
``rows * (ceil(dim / 4) + 4)`` bytes with a float16 scale and offset per row. With symmetric levels,
which have no offset, it takes ``rows * (ceil(dim / 4) + 2)`` bytes. For 16 columns, half of the
asymmetric bytes are scales and offsets, so set ``rows_per_scale`` to share them between rows.

Paper: Guan et al. 2019, https://arxiv.org/abs/1911.02079 (row-wise, asymmetric).
Differs: 2 bits instead of 4. By default levels are asymmetric and clipped to the range of least
squared error: with four levels, clipping and offsets lower the error much more than with sixteen
(docs/results/movielens.md).
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.core.modules.formats import TableFormat
from compressors.quantize.kernels import bitpacking
from compressors.quantize.kernels.levels import Clipping
from compressors.quantize.tables import scales
from compressors.quantize.tables.rowwise import RowwiseSettings, packed_rows_format

# In symmetric levels, zero is between the codes 1 and 2.
FORMAT = packed_rows_format("rowwise_int2", bits=2, zero_code=1.5)


def pack_multiples(multiples: Tensor, *, symmetric: bool) -> Tensor:
    """Pack multiples of the scale ``(rows, dim)`` into packed uint8 ``(rows, ceil(dim / 4))``."""
    codes = multiples + FORMAT.zero_code if symmetric else multiples
    return bitpacking.pack(codes.to(torch.uint8), FORMAT.bits)


class RowwiseInt2(RowwiseSettings):
    """Store embedding tables as a quarter of a byte per weight and one scale per row."""

    levels: ClassVar[tuple[int, int]] = (4, 4)  # numbers of codes: symmetric, asymmetric

    kind: Literal["rowwise_int2"] = "rowwise_int2"
    symmetric: bool = Field(
        False, description=RowwiseSettings.model_fields["symmetric"].description
    )
    clipping: Clipping = Field(
        "mse", description=RowwiseSettings.model_fields["clipping"].description
    )

    @property
    def storage(self) -> TableFormat:
        """The format that the step writes."""
        return FORMAT

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode a block of rows, float ``(rows, dim)``; ``params`` is the result of ``fit``."""
        multiples, stored = scales.encode_block(block, params, self.grid)
        return {"codes": pack_multiples(multiples, symmetric=self.symmetric), **stored}
