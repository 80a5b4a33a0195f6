"""Embedding tables as 8-bit floats (E4M3), with one scale for each row or group of rows.

E4M3 numbers have 4 significant bits from 2^-6 to 448. Below 2^-6 they are evenly spaced by 2^-9, so
without a scale, a table whose weights are around 0.01 would have only a dozen values. The scale
maps the largest weight of a row to 448. A weight then has 4 significant bits down to 1/28,672 of
its row's largest weight. Compared with int8, weights near the largest one are less precise, and
weights below a fourteenth of it more precise. The floats are stored as bytes, because neither torch
nor ONNX gathers or compares 8-bit floats. A table of ``rows x dim`` takes ``rows * (dim + 2)``
bytes with a float16 scale per row.

Format: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433 (E4M3 without infinities).
Differs: a scale per row instead of one per tensor. No weight is clipped: the
precision of a float is relative to its value, so a smaller range does not make it finer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.core.modules.formats import TableFormat, TensorSpec
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import MinRows, TablePatterns
from compressors.quantize.kernels.levels import Grid, RowsPerScale, ScaleType, dequantize
from compressors.quantize.tables import scales

LARGEST = 448
"""The largest E4M3 number."""

LEVELS = 2 * LARGEST + 1
"""Scales are computed as for integers from -448 to 448, so that a row's largest weight is 448."""


def encode(table: Tensor, scale: Tensor, rows_per_scale: int = 1) -> Tensor:
    """Encode a table as the bits of the nearest 8-bit floats, uint8 ``(rows, dim)``.

    Args:
        table: float, ``(rows, dim)``; its first row is the first of the rows that share a scale.
        scale: the stored scales, ``(number of scales, 1)``.
        rows_per_scale: number of rows that share a scale; 0: all rows of the table.
    """
    rows = torch.arange(len(table), device=table.device)
    scale_of_row = scale[scales.scale_indices(rows, rows_per_scale)].float()
    rounded = (table.float() / scale_of_row).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8)


def convert_from_float8(codes: Tensor) -> Tensor:
    """Convert the bits of 8-bit floats to float32, in the same shape."""
    return codes.view(torch.float8_e4m3fn).float()


@torch.library.custom_op("recpress::float8_e4m3_table", mutates_args=())
def float8_e4m3_table(codes: Tensor, scale: Tensor, ids: Tensor, rows_per_scale: int) -> Tensor:
    """Look up rows of a stored table: codes ``(rows, dim)``, ids -> float32 ``(*ids, dim)``."""
    scale_of_id = scale[scales.scale_indices(ids, rows_per_scale)]
    return dequantize(convert_from_float8(codes[ids]), scale_of_id, offset=None)


@float8_e4m3_table.register_fake
def _(codes: Tensor, scale: Tensor, ids: Tensor, rows_per_scale: int) -> Tensor:
    return scale.new_empty((*ids.shape, codes.shape[1]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    *tensors, ctx.rows_per_scale = inputs
    ctx.save_for_backward(*tensors)


def _compute_gradients(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
    codes, scale, ids = ctx.saved_tensors
    grad_scale = scales.compute_gradient(
        grad, convert_from_float8(codes[ids]), scale, ids, ctx.rows_per_scale
    )
    return None, grad_scale, None, None


float8_e4m3_table.register_autograd(_compute_gradients, setup_context=_setup_context)


@dataclass(frozen=True)
class Float8E4M3Format:
    """Stores ``codes`` uint8 ``(rows, dim)``, the bits of 8-bit floats, and ``scale``.

    ``learned``: names of the tensors that training may change. The protocol ``TableFormat``
    (``core/modules/formats.py``) explains the methods.
    """

    name: str = "float8_e4m3"
    learned: tuple[str, ...] = ("scale",)

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        codes = TensorSpec((rows, dim), torch.uint8)
        return {"codes": codes, **scales.layout(rows, settings)}

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        ids: Tensor,
        dim: int,
        settings: Mapping[str, Any],
    ) -> Tensor:
        rows_per_scale = scales.SharedScales.from_settings(settings).rows_per_scale
        codes, scale = stored["codes"], stored["scale"]
        rows: Tensor = torch.ops.recpress.float8_e4m3_table(codes, scale, ids, rows_per_scale)
        return rows


FORMAT = Float8E4M3Format()


class Float8E4M3(StepSettings):
    """Store embedding tables as 8-bit floats and one scale per row."""

    kind: Literal["float8_e4m3"] = "float8_e4m3"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    scale: ScaleType = Field("float16", description="How scales are stored.")
    rows_per_scale: RowsPerScale = Field(
        1, description="Number of neighbouring rows that share a scale; 0: one for the table."
    )

    @property
    def storage(self) -> TableFormat:
        """The format that the step writes."""
        return FORMAT

    @property
    def grid(self) -> Grid:
        """The grid from which scales are computed; its levels are not those of 8-bit floats."""
        return Grid(LEVELS, scale=self.scale, rows_per_scale=self.rows_per_scale)

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the stored layout of a table."""
        return scales.select_settings(self.grid)

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """Fit the scale if the table has one for all rows; otherwise return no parameters."""
        return scales.fit_table(rows, self.grid)

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode a block of rows, float ``(rows, dim)``; ``params`` is the result of ``fit``."""
        stored = scales.fit_block(block, self.grid)
        scale = {**params, **stored}["scale"]
        return {"codes": encode(block, scale, self.rows_per_scale), **stored}
