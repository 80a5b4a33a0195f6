"""Embedding tables as one byte per weight and one scale per row.

A rare item's small weights keep their own scale and are not rounded away by a popular one. A
table of ``rows x dim`` float32 shrinks from ``4 * rows * dim`` to ``rows * (dim + 2)`` bytes
with float16 scales.

Paper: Guan et al. 2019, https://arxiv.org/abs/1911.02079 (row-wise uniform quantization).
Differs: symmetric (TensorRT takes no zero point) and plain min-max.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.contracts import Frozen
from compressors.errors import CompressionError
from compressors.formats import TableFormat, TensorSpec

ScaleType = Literal["float16", "float32"]
LEVELS = 127


def encode(table: Tensor, scale_type: ScaleType = "float16") -> tuple[Tensor, Tensor]:
    """Round each row to 255 even levels, symmetric around zero.

    Args:
        table: float, ``(rows, dim)``.
        scale_type: how the scales are stored; codes are fitted to the stored scale.

    Returns:
        ``codes`` int8 ``(rows, dim)`` in [-127, 127] and ``scale`` ``(rows, 1)``, always
        positive; a row of zeros has only zero codes.

    Raises:
        CompressionError: a weight is too large for a float16 scale.
    """
    scale = row_scale(table, LEVELS, scale_type)
    codes = (table.float() / scale.float()).round().clamp(-LEVELS, LEVELS).to(torch.int8)
    return codes, scale


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Weights as float32, ``(*, dim)``, from int8 ``(*, dim)`` and scales ``(*, 1)``."""
    return codes.float() * scale.float()


def row_scale(table: Tensor, levels: int, scale_type: ScaleType) -> Tensor:
    """The largest weight of each row over the number of levels, as stored: ``(rows, 1)``.

    Raises:
        CompressionError: a weight is too large for a float16 scale.
    """
    scale = table.float().abs().amax(dim=1, keepdim=True) / levels
    dtype = torch.float16 if scale_type == "float16" else torch.float32
    if scale_type == "float16" and bool((scale > torch.finfo(torch.float16).max).any()):
        raise CompressionError(
            f"A weight of {float(table.abs().max()):g} needs a scale above float16's largest "
            f"number. Set the step's scale to 'float32'."
        )
    # TensorRT wants every scale positive: the smallest stored step stands for "nearly nothing",
    # and a row of zeros has zero codes under any scale.
    smallest = 2.0**-24 if scale_type == "float16" else torch.finfo(torch.float32).tiny
    stored = scale.clamp(min=smallest).to(dtype)
    # Float16 steps evenly by 2^-24 below 2^-14: a scale rounded down there by more than half a
    # level over the whole row would clip the row's largest weights, so it is rounded up.
    clipped = scale * levels > stored.float() * (levels + 0.5)
    return torch.where(clipped, stored + smallest, stored)


@torch.library.custom_op("recpress::rowwise_int8", mutates_args=())
def rowwise_int8(codes: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """Rows of a stored table: int8 ``(rows, dim)``, ``(rows, 1)``, ids -> ``(*ids, dim)``."""
    return decode(codes[ids], scale[ids])


@rowwise_int8.register_fake
def _(codes: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    return scale.new_empty((*ids.shape, codes.shape[1]), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
    codes, scale, ids = ctx.saved_tensors
    each = (grad * codes[ids].float()).sum(dim=-1).reshape(-1)  # one number per lookup
    total = torch.zeros(scale.shape[0], device=scale.device).index_add_(0, ids.reshape(-1), each)
    return None, total.unsqueeze(1).to(scale.dtype), None


rowwise_int8.register_autograd(_backward, setup_context=_keep)


@dataclass(frozen=True)
class RowwiseInt8Format:
    """``codes`` int8 ``(rows, dim)`` and ``scale`` ``(rows, 1)``."""

    name: str = "rowwise_int8"
    learned: tuple[str, ...] = ("scale",)

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return {
            "codes": TensorSpec((rows, dim), torch.int8),
            "scale": TensorSpec((rows, 1), getattr(torch, settings["scale"])),
        }

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        ids: Tensor,
        dim: int,  # noqa: ARG002
        settings: Mapping[str, Any],  # noqa: ARG002
    ) -> Tensor:
        rows: Tensor = torch.ops.recpress.rowwise_int8(stored["codes"], stored["scale"], ids)
        return rows


FORMAT = RowwiseInt8Format()


class RowwiseInt8(Frozen):
    """Store embedding tables as one byte per weight and one scale per row."""

    kind: Literal["rowwise_int8"] = "rowwise_int8"
    tables: tuple[str, ...] = Field(
        ("*",), description="Tables to compress: module names, with * for any characters."
    )
    min_rows: int = Field(1, ge=1, description="Tables with fewer rows stay as they are.")
    scale: ScaleType = Field("float16", description="How the scale of each row is stored.")

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
        codes, scale = encode(block, self.scale)
        return {"codes": codes, "scale": scale}
