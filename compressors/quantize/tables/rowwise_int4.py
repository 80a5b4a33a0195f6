"""Embedding tables as half a byte per weight and a scale per row, or per several rows.

A table of ``rows x dim`` float32 shrinks from ``4 * rows * dim`` to
``rows * (ceil(dim / 2) + 2)`` bytes with a float16 scale per row; asymmetric, with an offset, to
``rows * (ceil(dim / 2) + 4)``.

Paper: Guan et al. 2019, https://arxiv.org/abs/1911.02079 (row-wise 4-bit).
Differs: symmetric unless asked for otherwise (TensorRT takes no zero point, so a symmetric lookup
is the cheaper one there), and min-max unless asked for otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.contracts import Frozen
from compressors.core.modules.formats import TableFormat, TensorSpec
from compressors.quantize.kernels import bitpacking
from compressors.quantize.kernels.levels import Clipping, Grid, RowsPerScale, ScaleType
from compressors.quantize.tables import scales

BITS = 4
LEVELS, ALL_LEVELS = 15, 16
ZERO = 8
"""The code of a symmetric grid's zero."""


def steps_of(packed: Tensor, dim: int, *, symmetric: bool) -> Tensor:
    """Planar codes ``(*, ceil(dim / 2))`` as levels counted in scales, float32 ``(*, dim)``."""
    steps = bitpacking.unpack(packed, dim, BITS).float()
    return steps - ZERO if symmetric else steps


@torch.library.custom_op("recpress::rowwise_int4", mutates_args=())
def rowwise_int4(
    codes: Tensor, scale: Tensor, offset: Tensor | None, ids: Tensor, dim: int, rows_per_scale: int
) -> Tensor:
    """Rows of a stored table: planar ``(rows, ceil(dim/2))``, ids -> float32 ``(*ids, dim)``."""
    return scales.planar_rows(codes, scale, offset, ids, dim, rows_per_scale, steps_of)


scales.make_planar(rowwise_int4, steps_of)


@dataclass(frozen=True)
class RowwiseInt4Format:
    """``codes`` uint8 ``(rows, ceil(dim / 2))``, planar, ``scale`` and, asymmetric, ``offset``."""

    name: str = "rowwise_int4"
    learned: tuple[str, ...] = ("scale", "offset")

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        codes = TensorSpec((rows, -(-dim // 2)), torch.uint8)
        return {"codes": codes, **scales.layout(rows, settings)}

    def lookup(
        self, stored: Mapping[str, Tensor], ids: Tensor, dim: int, settings: Mapping[str, Any]
    ) -> Tensor:
        together = scales.SharedScales.of(settings).rows_per_scale
        codes, scale, offset = stored["codes"], stored["scale"], stored.get("offset")
        rows: Tensor = torch.ops.recpress.rowwise_int4(codes, scale, offset, ids, dim, together)
        return rows


FORMAT = RowwiseInt4Format()


class RowwiseInt4(Frozen):
    """Store embedding tables as half a byte per weight and one scale per row."""

    kind: Literal["rowwise_int4"] = "rowwise_int4"
    tables: tuple[str, ...] = Field(
        ("*",), description="Tables to compress: module names, with * for any characters."
    )
    min_rows: int = Field(1, ge=1, description="Tables with fewer rows stay as they are.")
    scale: ScaleType = Field("float16", description="How scales and offsets are stored.")
    symmetric: bool = Field(
        True, description="Levels around zero, or an offset beside every scale and all codes used."
    )
    clipping: Clipping = Field(
        "min_max",
        description="min_max: the largest weight ends a range. The others clip one where that "
        "lowers its squared error: least_squares in 7 times the work, greedy 33 and mse 26 times, "
        "asymmetric 65 and some hundred times.",
    )
    rows_per_scale: RowsPerScale = Field(
        1, description="Neighbouring rows that share a scale; 0: one scale for the table."
    )

    @property
    def storage(self) -> TableFormat:
        """The format this step writes."""
        return FORMAT

    @property
    def grid(self) -> Grid:
        """Which levels there are and how they are fitted."""
        return Grid(
            LEVELS if self.symmetric else ALL_LEVELS,
            self.symmetric,
            self.clipping,
            self.scale,
            self.rows_per_scale,
        )

    def settings(self) -> dict[str, Any]:
        """What the format needs to know to lay a table out."""
        return scales.settings_of(self.grid)

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """The scale of the table where it has but one; nothing else is learned."""
        return scales.fit_table(rows, self.grid)

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors of one block of rows, float ``(rows, dim)``."""
        return scales.encode_codes(block, params, self.grid, BITS)
