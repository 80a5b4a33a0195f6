"""Custom ops and formats for tables and dense layers in 16-bit floats: float16 and bfloat16."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.core.modules.formats import TensorSpec
from compressors.quantize.kernels.products import compute_grad_x_by_blocks, multiply_by_blocks


@torch.library.custom_op("recpress::float16_product", mutates_args=())
def float16_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply float32 ``(*, dim)`` by every row of ``weight`` ``(rows, dim)``: ``(*, rows)``."""
    return multiply_by_blocks(x, weight)


@float16_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save_product(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _compute_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    grad_weight = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return compute_grad_x_by_blocks(grad, weight), grad_weight.to(weight.dtype)


float16_product.register_autograd(_compute_gradients, setup_context=_save_product)


@dataclass(frozen=True)
class ShortFloatTableFormat:
    """Stores ``weight`` ``(rows, dim)`` in a 16-bit float dtype.

    Attributes:
        name: name of the format, which is the name of the dtype.
        dtype: dtype of the stored tensor.
        learned: names of the tensors that can be trained: none, because rounding would undo Adam's
            small updates.
    """

    name: str
    dtype: torch.dtype
    learned: tuple[str, ...] = ()

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec((rows, dim), self.dtype)}

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        ids: Tensor,
        dim: int,
        settings: Mapping[str, Any],
    ) -> Tensor:
        op = getattr(torch.ops.recpress, f"{self.name}_table")
        rows: Tensor = op(stored["weight"], ids)
        return rows

    def can_multiply(self, settings: Mapping[str, Any]) -> bool:
        return self.dtype == torch.float16  # ONNX Runtime has no bfloat16 MatMul on CPUs

    def multiply(self, stored: Mapping[str, Tensor], x: Tensor) -> Tensor:
        scores: Tensor = torch.ops.recpress.float16_product(x, stored["weight"])
        return scores


@dataclass(frozen=True)
class ShortFloatLinearFormat:
    """Stores ``weight`` ``(out, in)`` and ``bias`` ``(out,)`` in a 16-bit float dtype.

    For a layer without bias, the stored bias is zero.

    Attributes:
        name: name of the format, which is the name of the dtype.
        dtype: dtype of the stored tensors.
        learned: names of the tensors that can be trained: none, as for tables.
    """

    name: str
    dtype: torch.dtype
    learned: tuple[str, ...] = ()

    def layout(
        self,
        inputs: int,
        outputs: int,
        settings: Mapping[str, Any],
        *,
        bias: bool,
    ) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec((outputs, inputs), self.dtype),
            "bias": TensorSpec((outputs,), self.dtype),
        }

    def apply(
        self,
        stored: Mapping[str, Tensor],
        x: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        op = getattr(torch.ops.recpress, f"{self.name}_linear")
        y: Tensor = op(x, stored["weight"], stored["bias"])
        return y


def short_float_table_format(name: str, dtype: torch.dtype) -> ShortFloatTableFormat:
    """Create a table format and register its op ``recpress::<name>_table``.

    The op takes ``weight`` ``(rows, dim)`` and ids, and returns float32 ``(*ids, dim)``: rows are
    looked up as stored and converted afterwards.
    """

    @torch.library.custom_op(f"recpress::{name}_table", mutates_args=())
    def table(weight: Tensor, ids: Tensor) -> Tensor:
        return weight[ids].float()

    def fake(weight: Tensor, ids: Tensor) -> Tensor:
        return weight.new_empty((*ids.shape, weight.shape[1]), dtype=torch.float32)

    def save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, ids = ctx.saved_tensors
        total = torch.zeros(weight.shape, device=weight.device)
        total.index_add_(0, ids.reshape(-1), grad.reshape(-1, grad.shape[-1]))
        return total.to(weight.dtype), None

    table.register_fake(fake)
    table.register_autograd(backward, setup_context=save_inputs)
    return ShortFloatTableFormat(name, dtype)


def short_float_linear_format(name: str, dtype: torch.dtype) -> ShortFloatLinearFormat:
    """Create a dense format and register its op ``recpress::<name>_linear``.

    The op takes float32 ``(*, in)``, ``(out, in)`` and ``(out,)``, and returns float32
    ``(*, out)``.
    """

    @torch.library.custom_op(f"recpress::{name}_linear", mutates_args=())
    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight.float(), bias.float())

    def fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    def save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = ctx.saved_tensors
        flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_weight, grad_bias = flat_grad.T @ flat_x, flat_grad.sum(0)
        return grad @ weight.float(), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)

    linear.register_fake(fake)
    linear.register_autograd(backward, setup_context=save_inputs)
    return ShortFloatLinearFormat(name, dtype)
