"""Embedding tables as one byte per weight, with one scale for each row or group of rows.

By default each row has a scale, so large weights of a popular item do not round the small weights
of a rare item to zero. A table of ``rows x dim`` float32 shrinks from ``4 * rows * dim`` to
``rows * (dim + 2)`` bytes with a float16 scale per row. Asymmetric levels have an offset per row,
so the table takes ``rows * (dim + 4)`` bytes. The setting ``rows_per_scale`` is the number of
neighbouring rows that share a scale and an offset; 0 means all rows of the table.

Paper: Guan et al. 2019, https://arxiv.org/abs/1911.02079 (row-wise uniform quantization).
Differs: symmetric by default (TensorRT has no zero point, so a symmetric lookup is cheaper there),
and no weight is clipped by default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressors.contracts.reasons import Reason
from compressors.contracts.value_errors import value_error
from compressors.core.modules.formats import TableFormat, TensorSpec
from compressors.core.placeholders import is_placeholder
from compressors.quantize.kernels.levels import dequantize
from compressors.quantize.kernels.products import compute_grad_x_by_blocks, multiply_by_blocks
from compressors.quantize.tables import scales
from compressors.quantize.tables.rowwise import RowwiseSettings

BLOCK_ROWS = 65_536
"""Rows of which the rounding error is computed at once."""


def code_type(*, symmetric: bool) -> torch.dtype:
    """Return the dtype of codes: int8 in [-127, 127] if symmetric, else uint8 in [0, 255]."""
    return torch.int8 if symmetric else torch.uint8


@torch.library.custom_op("recpress::rowwise_int8", mutates_args=())
def rowwise_int8(
    codes: Tensor, scale: Tensor, offset: Tensor | None, ids: Tensor, rows_per_scale: int
) -> Tensor:
    """Look up rows of a stored table as float32 ``(*ids, dim)``.

    Args:
        codes: int8 or uint8 ``(rows, dim)``.
        scale: ``(scales, 1)``.
        offset: ``(scales, 1)``; None if the levels are symmetric.
        ids: row numbers, of any shape.
        rows_per_scale: number of rows that share a scale; 0: all rows of the table.
    """
    indices = scales.scale_indices(ids, rows_per_scale)
    return dequantize(
        codes[ids].float(), scale[indices], None if offset is None else offset[indices]
    )


@rowwise_int8.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    ids: Tensor,
    rows_per_scale: int,
) -> Tensor:
    return scale.new_empty((*ids.shape, codes.shape[1]), dtype=torch.float32)


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, int],
    output: Tensor,
) -> None:
    *tensors, ctx.rows_per_scale = inputs
    ctx.save_for_backward(*tensors)


def _compute_gradients(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor | None, None, None]:
    codes, scale, offset, ids = ctx.saved_tensors
    grad_scale = scales.compute_gradient(grad, codes[ids].float(), scale, ids, ctx.rows_per_scale)
    grad_offset = None
    if offset is not None:
        grad_offset = scales.compute_gradient(grad, None, offset, ids, ctx.rows_per_scale)
    return None, grad_scale, grad_offset, None, None


rowwise_int8.register_autograd(_compute_gradients, setup_context=_setup_context)


@torch.library.custom_op("recpress::rowwise_int8_product", mutates_args=())
def rowwise_int8_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Multiply float32 ``(*, dim)`` by every row of a table with symmetric levels.

    Args:
        x: float32 ``(*, dim)``.
        codes: int8 ``(rows, dim)``.
        scale: ``(rows, 1)``, or ``(1, 1)`` if all rows share a scale.

    Returns:
        Float32 ``(*, rows)``.
    """
    return multiply_by_blocks(x, codes) * scale.float().flatten()


@rowwise_int8_product.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _compute_product_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    x, codes, scale = ctx.saved_tensors
    grad_x = compute_grad_x_by_blocks(grad * scale.float().flatten(), codes)
    grad_scale_by_row = (grad * multiply_by_blocks(x, codes)).reshape(-1, len(codes)).sum(dim=0)
    grad_scale = grad_scale_by_row if len(scale) > 1 else grad_scale_by_row.sum()
    return grad_x, None, grad_scale.reshape(-1, 1).to(scale.dtype)


rowwise_int8_product.register_autograd(_compute_product_gradients, setup_context=_save_inputs)


@dataclass(frozen=True)
class RowwiseInt8Format:
    """Stores ``codes`` ``(rows, dim)``, ``scale``, and ``offset`` if the levels are asymmetric.

    ``learned``: names of the tensors that training may change. The protocol ``TableFormat``
    (``core/modules/formats.py``) explains the methods.
    """

    name: str = "rowwise_int8"
    bits: int = 8
    learned: tuple[str, ...] = ("scale", "offset")

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        symmetric = scales.SharedScales.from_settings(settings).symmetric
        codes = TensorSpec((rows, dim), code_type(symmetric=symmetric))
        return {"codes": codes, **scales.layout(rows, settings)}

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        ids: Tensor,
        dim: int,
        settings: Mapping[str, Any],
    ) -> Tensor:
        rows_per_scale = scales.SharedScales.from_settings(settings).rows_per_scale
        codes, scale, offset = stored["codes"], stored["scale"], stored.get("offset")
        rows: Tensor = torch.ops.recpress.rowwise_int8(codes, scale, offset, ids, rows_per_scale)
        return rows

    def can_multiply(self, settings: Mapping[str, Any]) -> bool:
        sharing = scales.SharedScales.from_settings(settings)
        return sharing.symmetric and sharing.rows_per_scale in (0, 1)  # one for all, or one per row

    def multiply(self, stored: Mapping[str, Tensor], x: Tensor) -> Tensor:
        op = torch.ops.recpress.rowwise_int8_product
        scores: Tensor = op(x, stored["codes"], stored["scale"])
        return scores


FORMAT = RowwiseInt8Format()


class RowwiseInt8(RowwiseSettings):
    """Store embedding tables as one byte per weight, with a scale per row or group of rows."""

    levels: ClassVar[tuple[int, int]] = (255, 256)  # numbers of codes: symmetric, asymmetric

    kind: Literal["rowwise_int8"] = "rowwise_int8"
    one_scale_error: float | None = Field(
        None,
        gt=0,
        description="A table gets one scale for all rows if its rounding error is then at most "
        "this share of its weights (both root mean squares), else one for each row. ONNX Runtime "
        "passes the codes of a table with one scale to int8 layers without converting them. Needs "
        "'symmetric', and 'rows_per_scale' 1. Not set: 'rows_per_scale' applies to all tables.",
    )

    @model_validator(mode="after")
    def _require_one_scale_to_be_possible(self) -> Self:
        if self.one_scale_error is not None and not (self.symmetric and self.rows_per_scale == 1):
            raise value_error("one_scale_needs_symmetric_rows")
        return self

    def for_table(self, weight: Tensor) -> tuple["RowwiseInt8", tuple[Reason, ...]]:
        """Return the settings for one table, and a reason for its scale.

        Args:
            weight: float ``(rows, dim)``. A placeholder gets a scale for each row, which takes more
                bytes.
        """
        if self.one_scale_error is None or not len(weight) or is_placeholder(weight):
            return self, ()
        one_scale = self.model_copy(update={"rows_per_scale": 0, "one_scale_error": None})
        by_row = self.model_copy(update={"one_scale_error": None})
        error = one_scale.rounding_error(weight)
        if error <= self.one_scale_error:
            return one_scale, (Reason("one_scale", error=error),)
        return by_row, (Reason("one_scale_inexact", error=error, most=self.one_scale_error),)

    def rounding_error(self, weight: Tensor) -> float:
        """Return the error of a table's weights, as a share of them (both root mean squares).

        Args:
            weight: float ``(rows, dim)``. ``rows_per_scale`` is 0.
        """
        scale = self.fit(weight)["scale"].float()
        error = total = 0.0
        for block in torch.split(weight, BLOCK_ROWS):
            rows = block.float()
            codes = (rows / scale).round().clamp(-127, 127)
            error += float((codes * scale - rows).double().square().sum())
            total += float(rows.double().square().sum())
        return (error / total) ** 0.5 if total else 0.0

    @property
    def storage(self) -> TableFormat:
        """The format that the step writes."""
        return FORMAT

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode one block of rows, float ``(rows, dim)``, to its stored tensors.

        ``params`` is the result of ``fit``: the scale (and offset) of the whole table if
        ``rows_per_scale`` is 0, otherwise empty. ``grid`` and ``fit`` are in ``rowwise.py``.
        """
        stored = scales.encode_codes(block, params, self.grid, FORMAT.bits)
        return {**stored, "codes": stored["codes"].view(code_type(symmetric=self.symmetric))}
