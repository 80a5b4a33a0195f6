"""Embedding tables as a quarter of a byte per weight and a scale per row, or per several rows.

A table of ``rows x dim`` float32 shrinks from ``4 * rows * dim`` to
``rows * (ceil(dim / 4) + 4)`` bytes with a float16 scale and offset per row; symmetric, without
offset, to ``rows * (ceil(dim / 4) + 2)``. At dim 16 the scales are half of that: share them.

Paper: Guan et al. 2019, https://arxiv.org/abs/1911.02079 (row-wise, asymmetric).
Differs: 2 bits instead of 4, and ranges of least squared error unless asked for otherwise: with
four levels clipping and offsets are worth much more than with sixteen (docs/table-methods.md).
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

BITS = 2
LEVELS = 4
ZERO = 1.5
"""Where zero lies among the codes of a symmetric grid: between the middle two."""


def store(steps: Tensor, *, symmetric: bool) -> Tensor:
    """Levels counted in scales, ``(rows, dim)``, as planar codes uint8 ``(rows, ceil(dim/4))``."""
    return bitpacking.pack((steps + ZERO if symmetric else steps).to(torch.uint8), BITS)


def steps_of(packed: Tensor, dim: int, *, symmetric: bool) -> Tensor:
    """Planar codes ``(*, ceil(dim / 4))`` as levels counted in scales, float32 ``(*, dim)``."""
    steps = bitpacking.unpack(packed, dim, BITS).float()
    return steps - ZERO if symmetric else steps


@torch.library.custom_op("recpress::rowwise_int2", mutates_args=())
def rowwise_int2(
    codes: Tensor, scale: Tensor, offset: Tensor | None, ids: Tensor, dim: int, rows_per_scale: int
) -> Tensor:
    """Rows of a stored table: planar ``(rows, ceil(dim/4))``, ids -> float32 ``(*ids, dim)``."""
    return scales.planar_rows(codes, scale, offset, ids, dim, rows_per_scale, steps_of)


scales.make_planar(rowwise_int2, steps_of)


@dataclass(frozen=True)
class RowwiseInt2Format:
    """``codes`` uint8 ``(rows, ceil(dim / 4))``, planar, ``scale`` and, asymmetric, ``offset``."""

    name: str = "rowwise_int2"
    learned: tuple[str, ...] = ("scale", "offset")

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        codes = TensorSpec((rows, -(-dim // 4)), torch.uint8)
        return {"codes": codes, **scales.layout(rows, settings)}

    def lookup(
        self, stored: Mapping[str, Tensor], ids: Tensor, dim: int, settings: Mapping[str, Any]
    ) -> Tensor:
        together = scales.SharedScales.of(settings).rows_per_scale
        codes, scale, offset = stored["codes"], stored["scale"], stored.get("offset")
        rows: Tensor = torch.ops.recpress.rowwise_int2(codes, scale, offset, ids, dim, together)
        return rows


FORMAT = RowwiseInt2Format()


class RowwiseInt2(Frozen):
    """Store embedding tables as a quarter of a byte per weight and one scale per row."""

    kind: Literal["rowwise_int2"] = "rowwise_int2"
    tables: tuple[str, ...] = Field(
        ("*",), description="Tables to compress: module names, with * for any characters."
    )
    min_rows: int = Field(1, ge=1, description="Tables with fewer rows stay as they are.")
    scale: ScaleType = Field("float16", description="How scales and offsets are stored.")
    symmetric: bool = Field(
        False, description="Levels around zero, or an offset beside every scale and all codes used."
    )
    clipping: Clipping = Field(
        "mse",
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
        return Grid(LEVELS, self.symmetric, self.clipping, self.scale, self.rows_per_scale)

    def settings(self) -> dict[str, Any]:
        """What the format needs to know to lay a table out."""
        return scales.settings_of(self.grid)

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """The scale of the table where it has but one; nothing else is learned."""
        return scales.fit_table(rows, self.grid)

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors of one block of rows, float ``(rows, dim)``."""
        steps, stored = scales.encode_block(block, params, self.grid)
        return {"codes": store(steps, symmetric=self.symmetric), **stored}
