"""Embedding tables as half a byte per weight and one scale per row.

A table of ``rows x dim`` float32 shrinks from ``4 * rows * dim`` to
``rows * (ceil(dim / 2) + 2)`` bytes with float16 scales.

Paper: Guan et al. 2019, https://arxiv.org/abs/1911.02079 (row-wise 4-bit).
Differs: symmetric (TensorRT takes no zero point), so a range has one end instead of two and the
paper's greedy search becomes a search over that end: every share of the largest weight is tried.

Stored *planar*: the low nibbles of a row are the first half of its weights, the high nibbles
the second, each plus 8. Unpacking is then two element-wise ops and one concatenation. For
batches ONNX Runtime runs these several times faster than its own 4-bit lookup,
GatherBlockQuantized; for single rows the two are about equal (``benchmarks/int4_lookup.py``).
TensorRT's own packing is made when the graph is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.contracts import Frozen
from compressors.formats import TableFormat, TensorSpec
from compressors.tables.rowwise_int8 import ScaleType, row_scale

Clipping = Literal["min_max", "mse"]
LEVELS = 7
OFFSET = 8
SHARES = tuple(1 - place / 50 for place in range(1, 26))
"""What of a row's largest weight is tried as the end of its range: 0.98 down to 0.5."""


def encode(
    table: Tensor, scale_type: ScaleType = "float16", clipping: Clipping = "min_max"
) -> tuple[Tensor, Tensor]:
    """Round each row to 15 even levels, symmetric around zero.

    Args:
        table: float, ``(rows, dim)``.
        scale_type: how the scales are stored; codes are fitted to the stored scale.
        clipping: whether the largest weight of a row ends its range (``min_max``), or whichever
            of ``SHARES`` of it gives the row the smallest squared error (``mse``).

    Returns:
        ``packed`` uint8 ``(rows, ceil(dim / 2))`` and ``scale`` ``(rows, 1)``, always positive.

    Raises:
        CompressionError: a weight is too large for a float16 scale.
    """
    scale = row_scale(table, LEVELS, scale_type)
    if clipping == "mse":
        scale = clipped_scale(table, scale)
    return pack(_codes(table, scale).to(torch.int8)), scale


def clipped_scale(table: Tensor, widest: Tensor) -> Tensor:
    """The scale of each row with the smallest squared error, among shares of the widest.

    Args:
        table: float, ``(rows, dim)``.
        widest: scales that clip nothing, ``(rows, 1)`` as stored; one of the choices, so no row
            gets worse.
    """
    best, least = widest, _squared_error(table, widest)  # (rows, 1)
    for share in SHARES:
        scale = (widest.float() * share).to(widest.dtype)
        error = _squared_error(table, scale)
        better = (error < least) & (scale > 0)
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _codes(table: Tensor, scale: Tensor) -> Tensor:
    return (table.float() / scale.float()).round().clamp(-LEVELS, LEVELS)


def _squared_error(table: Tensor, scale: Tensor) -> Tensor:
    gap = _codes(table, scale) * scale.float() - table.float()
    return gap.square().sum(dim=1, keepdim=True)


def pack(codes: Tensor) -> Tensor:
    """Int8 codes in [-8, 7], ``(rows, dim)``, as planar nibbles uint8 ``(rows, ceil(dim/2))``."""
    half = (codes.shape[1] + 1) // 2
    shifted = torch.full((codes.shape[0], 2 * half), OFFSET, dtype=torch.uint8)
    shifted[:, : codes.shape[1]] = (codes + OFFSET).to(torch.uint8)
    return shifted[:, :half] | (shifted[:, half:] << 4)


def unpack(packed: Tensor, dim: int) -> Tensor:
    """Planar nibbles uint8 ``(*, ceil(dim / 2))`` as int8 codes ``(*, dim)``."""
    planes = torch.cat([packed & 15, packed >> 4], dim=-1)
    return planes[..., :dim].to(torch.int8) - OFFSET


def decode(packed: Tensor, scale: Tensor, dim: int) -> Tensor:
    """Weights as float32, ``(*, dim)``."""
    return unpack(packed, dim).float() * scale.float()


@torch.library.custom_op("recpress::rowwise_int4", mutates_args=())
def rowwise_int4(codes: Tensor, scale: Tensor, ids: Tensor, dim: int) -> Tensor:
    """Rows of a stored table: planar ``(rows, ceil(dim/2))``, ids -> ``(*ids, dim)``."""
    return decode(codes[ids], scale[ids], dim)


@rowwise_int4.register_fake
def _(codes: Tensor, scale: Tensor, ids: Tensor, dim: int) -> Tensor:  # noqa: ARG001
    return scale.new_empty((*ids.shape, dim), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.dim = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
    codes, scale, ids = ctx.saved_tensors
    each = (grad * unpack(codes[ids], ctx.dim).float()).sum(dim=-1).reshape(-1)
    total = torch.zeros(scale.shape[0], device=scale.device).index_add_(0, ids.reshape(-1), each)
    return None, total.unsqueeze(1).to(scale.dtype), None, None


rowwise_int4.register_autograd(_backward, setup_context=_keep)


@dataclass(frozen=True)
class RowwiseInt4Format:
    """``codes`` uint8 ``(rows, ceil(dim / 2))``, planar nibbles, and ``scale`` ``(rows, 1)``."""

    name: str = "rowwise_int4"
    learned: tuple[str, ...] = ("scale",)

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return {
            "codes": TensorSpec((rows, (dim + 1) // 2), torch.uint8),
            "scale": TensorSpec((rows, 1), getattr(torch, settings["scale"])),
        }

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        ids: Tensor,
        dim: int,
        settings: Mapping[str, Any],  # noqa: ARG002
    ) -> Tensor:
        rows: Tensor = torch.ops.recpress.rowwise_int4(stored["codes"], stored["scale"], ids, dim)
        return rows


FORMAT = RowwiseInt4Format()


class RowwiseInt4(Frozen):
    """Store embedding tables as half a byte per weight and one scale per row."""

    kind: Literal["rowwise_int4"] = "rowwise_int4"
    tables: tuple[str, ...] = Field(
        ("*",), description="Tables to compress: module names, with * for any characters."
    )
    min_rows: int = Field(1, ge=1, description="Tables with fewer rows stay as they are.")
    scale: ScaleType = Field("float16", description="How the scale of each row is stored.")
    clipping: Clipping = Field(
        "min_max",
        description="min_max: the largest weight of a row ends its range. mse: a row may be "
        "clipped where that lowers its squared error; 26 times the work.",
    )

    @property
    def storage(self) -> TableFormat:
        """The format this step writes."""
        return FORMAT

    def settings(self) -> dict[str, Any]:
        """What the format needs to know to lay a table out."""
        return {"scale": self.scale}

    def fit(self, rows: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Nothing is learned: each row is encoded from itself."""
        return {}

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002
        """Stored tensors of one block of rows, float ``(rows, dim)``."""
        codes, scale = encode(block, self.scale, self.clipping)
        return {"codes": codes, "scale": scale}
