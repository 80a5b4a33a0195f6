"""Shared parts of the row-wise integer formats: settings, and packed codes of 2 and 4 bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compressors.core.modules.formats import TensorSpec
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import MinRows, TablePatterns
from compressors.quantize.kernels import bitpacking
from compressors.quantize.kernels.levels import Clipping, Grid, RowsPerScale, ScaleType
from compressors.quantize.tables import scales


class RowwiseSettings(StepSettings):
    """Settings of a row-wise integer format; each format sets its defaults and its levels."""

    levels: ClassVar[tuple[int, int]]
    """Levels of a symmetric and of an asymmetric grid."""

    kind: str
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    scale: ScaleType = Field("float16", description="How scales and offsets are stored.")
    symmetric: bool = Field(
        True, description="Levels around zero; or an offset for each scale, and all codes used."
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
    def grid(self) -> Grid:
        """The levels, and how ranges are fitted to them."""
        levels = self.levels[0] if self.symmetric else self.levels[1]
        return Grid(levels, self.symmetric, self.clipping, self.scale, self.rows_per_scale)

    def settings(self) -> dict[str, Any]:
        """The settings that determine the stored layout of a table."""
        return scales.settings_of(self.grid)

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """Fit the scale of a table with one scale; otherwise return no parameters."""
        return scales.fit_table(rows, self.grid)


@dataclass(frozen=True)
class PackedRowsFormat:
    """``codes`` uint8 ``(rows, ceil(dim * bits / 8))``, planar; ``scale``, and optional ``offset``.

    Attributes:
        name: name of the format and of its custom op.
        bits: bits of a code, 2 or 4.
        zero: the place of zero among the codes of a symmetric grid.
        learned: the tensors that training may change.
    """

    name: str
    bits: int
    zero: float
    learned: tuple[str, ...] = ("scale", "offset")

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        codes = TensorSpec((rows, -(-dim * self.bits // 8)), torch.uint8)
        return {"codes": codes, **scales.layout(rows, settings)}

    def lookup(
        self, stored: Mapping[str, Tensor], ids: Tensor, dim: int, settings: Mapping[str, Any]
    ) -> Tensor:
        together = scales.SharedScales.of(settings).rows_per_scale
        op = getattr(torch.ops.recpress, self.name)
        rows: Tensor = op(
            stored["codes"], stored["scale"], stored.get("offset"), ids, dim, together
        )
        return rows

    def steps_of(self, packed: Tensor, dim: int, *, symmetric: bool) -> Tensor:
        """Decode planar codes ``(*, bytes)`` to levels counted in scales, float32 ``(*, dim)``."""
        steps = bitpacking.unpack(packed, dim, self.bits).float()
        return steps - self.zero if symmetric else steps


def packed_rows_format(name: str, bits: int, zero: float) -> PackedRowsFormat:
    """Create a format and register its custom op ``recpress::<name>``."""
    form = PackedRowsFormat(name, bits, zero)

    @torch.library.custom_op(f"recpress::{name}", mutates_args=())
    def lookup(
        codes: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        ids: Tensor,
        dim: int,
        rows_per_scale: int,
    ) -> Tensor:
        return scales.planar_rows(codes, scale, offset, ids, dim, rows_per_scale, form.steps_of)

    scales.make_planar(lookup, form.steps_of)
    return form
