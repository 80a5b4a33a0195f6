"""Shared code of the row-wise integer formats: settings, and packed codes of 2 and 4 bits."""

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
    """Settings of the row-wise integer formats; subclasses set ``levels`` and some defaults."""

    levels: ClassVar[tuple[int, int]]
    """Number of levels: symmetric around zero, and asymmetric (with an offset)."""

    kind: str
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    scale: ScaleType = Field("float16", description="How scales and offsets are stored.")
    symmetric: bool = Field(
        True,
        description="true: levels around zero, without an offset. false: an offset for each scale, "
        "so that the levels cover the range exactly.",
    )
    clipping: Clipping = Field(
        "min_max",
        description="Range of the levels. min_max: all weights, none is clipped. The others clip "
        "the largest weights if that lowers the squared error. least_squares: the best of four "
        "ranges, then scale and offset are fitted to the codes. greedy: shortened step by step, by "
        "at most 16 %. mse: searched. They take about 7, 33 and 26 times as long as min_max; "
        "without 'symmetric', greedy takes 65 times and mse several hundred times as long.",
    )
    rows_per_scale: RowsPerScale = Field(
        1, description="Number of neighbouring rows that share a scale; 0: one for the table."
    )

    @property
    def grid(self) -> Grid:
        """The quantization grid: number of levels, type of scales, and clipping rule."""
        levels = self.levels[0] if self.symmetric else self.levels[1]
        return Grid(
            levels,
            symmetric=self.symmetric,
            clipping=self.clipping,
            scale=self.scale,
            rows_per_scale=self.rows_per_scale,
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the stored layout of a table."""
        return scales.select_settings(self.grid)

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """Fit scale and offset if the table has one scale; otherwise return no parameters.

        Scales of rows are fitted when their block is encoded.
        """
        return scales.fit_table(rows, self.grid)


@dataclass(frozen=True)
class PackedRowsFormat:
    """Row-wise format with packed codes of 2 or 4 bits.

    It stores ``codes``, uint8 ``(rows, ceil(dim * bits / 8))``, several codes per byte as in
    ``quantize/kernels/bitpacking.py``, ``scale``, and ``offset`` if the levels are asymmetric.

    Attributes:
        name: name of the format and of its custom op.
        bits: bits of a code, 2 or 4.
        zero_code: the code of zero with symmetric levels; 1.5 if zero is between the codes 1 and 2.
        learned: names of the tensors that training may change.

    The protocol ``TableFormat`` (``core/modules/formats.py``) explains the methods.
    """

    name: str
    bits: int
    zero_code: float
    learned: tuple[str, ...] = ("scale", "offset")

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        codes = TensorSpec((rows, -(-dim * self.bits // 8)), torch.uint8)
        return {"codes": codes, **scales.layout(rows, settings)}

    def lookup(
        self, stored: Mapping[str, Tensor], ids: Tensor, dim: int, settings: Mapping[str, Any]
    ) -> Tensor:
        rows_per_scale = scales.SharedScales.from_settings(settings).rows_per_scale
        op = getattr(torch.ops.recpress, self.name)
        rows: Tensor = op(
            stored["codes"], stored["scale"], stored.get("offset"), ids, dim, rows_per_scale
        )
        return rows

    def decode_codes(self, packed: Tensor, dim: int, *, symmetric: bool) -> Tensor:
        """Decode packed codes ``(*, bytes)`` to multiples of the scale, float32 ``(*, dim)``."""
        multiples = bitpacking.unpack(packed, dim, self.bits).float()
        return multiples - self.zero_code if symmetric else multiples


def packed_rows_format(name: str, bits: int, zero_code: float) -> PackedRowsFormat:
    """Create a format and register its custom op ``recpress::<name>``."""
    table_format = PackedRowsFormat(name, bits, zero_code)

    @torch.library.custom_op(f"recpress::{name}", mutates_args=())
    def lookup(
        codes: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        ids: Tensor,
        dim: int,
        rows_per_scale: int,
    ) -> Tensor:
        decode = table_format.decode_codes
        return scales.look_up_packed_rows(codes, scale, offset, ids, dim, rows_per_scale, decode)

    scales.register_packed_op(lookup, table_format.decode_codes)
    return table_format
