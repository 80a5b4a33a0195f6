"""Embedding tables as bfloat16: half the bytes, float32's range, three decimal digits.

A weight keeps 8 significant bits, float16 11; so take ``float16`` unless weights lie beyond 65,504
or below 6e-5, where float16 has no range left. Looked up as stored and widened after.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compressors.contracts import Frozen
from compressors.core.modules.formats import TableFormat, TensorSpec
from compressors.core.step_settings import MinRows, TablePatterns
from compressors.errors.compression import CompressionError


def encode(table: Tensor) -> Tensor:
    """Weights ``(rows, dim)`` rounded to bfloat16.

    Raises:
        CompressionError: a weight lies within a rounding of float32's largest number.
    """
    short = table.to(torch.bfloat16)
    if not bool(torch.isfinite(short).all()):
        raise CompressionError(
            f"A weight of {float(table.abs().max()):g} is beyond bfloat16's 3.39e38. Leave the "
            f"table out of the step."
        )
    return short


@torch.library.custom_op("recpress::bfloat16_table", mutates_args=())
def bfloat16_table(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of a bfloat16 ``(rows, dim)`` table as float32 ``(*ids, dim)``."""
    return weight[ids].float()


@bfloat16_table.register_fake
def _(weight: Tensor, ids: Tensor) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    weight, ids = ctx.saved_tensors
    total = torch.zeros(weight.shape, device=weight.device)
    total.index_add_(0, ids.reshape(-1), grad.reshape(-1, grad.shape[-1]))
    return total.to(weight.dtype), None


bfloat16_table.register_autograd(_backward, setup_context=_keep)


@dataclass(frozen=True)
class BFloat16Format:
    """``weight`` bfloat16 ``(rows, dim)``."""

    name: str = "bfloat16"
    learned: tuple[str, ...] = ()  # too coarse to be trained in: Adam's small steps would vanish

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:  # noqa: ARG002
        return {"weight": TensorSpec((rows, dim), torch.bfloat16)}

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        ids: Tensor,
        dim: int,  # noqa: ARG002
        settings: Mapping[str, Any],  # noqa: ARG002
    ) -> Tensor:
        rows: Tensor = torch.ops.recpress.bfloat16_table(stored["weight"], ids)
        return rows


FORMAT = BFloat16Format()


class BFloat16(Frozen):
    """Store embedding tables as bfloat16."""

    kind: Literal["bfloat16"] = "bfloat16"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1

    @property
    def storage(self) -> TableFormat:
        """The format this step writes."""
        return FORMAT

    def settings(self) -> dict[str, Any]:
        """Nothing: the layout is the same for every table."""
        return {}

    def fit(self, rows: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Nothing is learned: each weight is rounded by itself."""
        return {}

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002
        """Stored tensors of one block of rows, float ``(rows, dim)``."""
        return {"weight": encode(block)}
