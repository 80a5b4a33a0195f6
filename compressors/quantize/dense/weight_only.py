"""Weight-only quantization of dense layers: blocks, codes and the custom op.

``weight_int8`` and ``weight_int4`` differ only in the width of a code. Consecutive inputs share a
scale: ``block`` inputs or all inputs of a row. Grids and clipping are those of tables
(``kernels/levels.py``, ``kernels/clipping.py``). All are symmetric, because TensorRT supports no
zero point.

Codes have the layout of ONNX Runtime's MatMulNBits and of ONNX's int4: two neighbouring codes per
byte, the first in the low half. They are not planar as in tables, so no target repacks them. A row
is padded to full blocks with codes of zero, and the plan counts those bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts.reasons import Reason
from compressors.core.modules.formats import TensorSpec
from compressors.core.steps.decisions import Decision, choose_dense
from compressors.core.units import Unit
from compressors.quantize.kernels.clipping import fit
from compressors.quantize.kernels.levels import Clipping, FittedRange, Grid, ScaleType, nearest

Block = Literal[0, 16, 32, 64, 128, 256]
"""How many neighbouring inputs share a scale; 0 is the whole row. What MatMulNBits takes."""
Activations = Literal["float32", "int8"]
SHORTEST = 16
"""A row without blocks is filled up to a multiple of this, so that it can be read in blocks."""
LEVELS = 127
"""Of an input that is rounded."""
SMALLEST = 1e-36
"""A block of smaller inputs is zero: 127 divided by less is beyond float32."""


def grid(bits: int, clipping: Clipping, scale: ScaleType) -> Grid:
    """The symmetric grid of codes of ``bits`` bits: ``2 ** bits - 1`` levels around zero."""
    return Grid(2**bits - 1, clipping=clipping, scale=scale)


def zero_code(bits: int) -> int:
    """The code that represents zero."""
    return 1 << (bits - 1)


def padded(inputs: int, block: int) -> int:
    """Number of codes of a row: padded to a multiple of the block, or of 16 without blocks."""
    whole = block or SHORTEST
    return -(-inputs // whole) * whole


def together(inputs: int, block: int) -> int:
    """Number of inputs that are computed, and with int8 inputs rounded, together."""
    if block:
        return block
    length = padded(inputs, block)
    return next(size for size in (128, 64, 32, SHORTEST) if length % size == 0)


def in_blocks(weight: Tensor, block: int) -> Tensor:
    """Reshape weights ``(out, in)`` to blocks ``(out * blocks, block)``, padded with zeros."""
    if not block:
        return weight
    whole = F.pad(weight, (0, padded(weight.shape[1], block) - weight.shape[1]))
    return whole.reshape(-1, block)


def fitted_scale(weight: Tensor, block: int, levels: Grid) -> Tensor:
    """The scale of every block, ``(out, blocks)``, as stored.

    Args:
        weight: float, ``(out, in)``.
        block: number of inputs that share a scale; 0 for all inputs of a row.
        levels: the grid.

    Raises:
        CompressionError: a weight is too large for the type of the scales.
    """
    return fit(in_blocks(weight.float(), block), levels).scale.reshape(len(weight), -1)


def nearest_steps(weight: Tensor, scale: Tensor, block: int, levels: Grid) -> Tensor:
    """The nearest level of every weight, counted in scales: float32 ``(out, in)``."""
    blocks = in_blocks(weight.float(), block)
    steps = nearest(blocks, FittedRange(scale.reshape(-1, 1), None), levels)
    return steps.reshape(len(weight), -1)[:, : weight.shape[1]]


def of_inputs(scale: Tensor, inputs: int, block: int) -> Tensor:
    """Expand scales ``(out, blocks)`` to inputs: float32 ``(out, in)``, or ``(out, 1)``."""
    if not block:
        return scale.float()
    return scale.float().repeat_interleave(block, dim=1)[:, :inputs]


def pack(steps: Tensor, block: int, bits: int) -> Tensor:
    """Encode levels counted in scales, ``(out, in)``, as stored codes, uint8.

    ``(out, padded)`` with 8 bits, ``(out, padded / 2)`` with 4.
    """
    outputs, inputs = steps.shape
    zero = zero_code(bits)
    codes = steps.new_full((outputs, padded(inputs, block)), zero, dtype=torch.uint8)
    codes[:, :inputs] = (steps + zero).to(torch.uint8)
    return codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(codes: Tensor, inputs: int, bits: int) -> Tensor:
    """Decode stored codes to levels counted in scales, float32 ``(out, in)``."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    return codes[:, :inputs].float() - zero_code(bits)


def rounded(x: Tensor, width: int) -> Tensor:
    """Round inputs ``(*, in)`` to 255 levels, with one scale for each ``width`` inputs.

    These are the operations, in the same order, of ONNX Runtime's MatMulNBits at accuracy level 4.
    """
    inputs = x.shape[-1]
    blocks = F.pad(x, (0, -inputs % width)).reshape(*x.shape[:-1], -1, width)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    steps = (blocks * torch.where(largest > SMALLEST, LEVELS / largest, 0.0)).round()
    near: Tensor = (steps * (largest / LEVELS)).flatten(-2)[..., :inputs]
    return near


@torch.library.custom_op("recpress::weight_only_linear", mutates_args=())
def weight_only_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    block: int,
    activations: str,
) -> Tensor:
    """Compute a dense layer whose weights are decoded during the computation.

    ``x`` float32 ``(*, in)``, ``codes`` uint8 ``(out, padded * bits / 8)``, ``scale``
    ``(out, blocks)``, ``bias`` float32 ``(out,)`` -> float32 ``(*, out)``.
    """
    weight, read = _operands(x, codes, scale, bits, block, activations)
    return F.linear(read, weight, bias)


def _operands(
    x: Tensor, codes: Tensor, scale: Tensor, bits: int, block: int, activations: str
) -> tuple[Tensor, Tensor]:
    """The weights as float32 ``(out, in)``, and the inputs as they are multiplied."""
    inputs = x.shape[-1]
    weight = unpack(codes, inputs, bits) * of_inputs(scale, inputs, block)
    return weight, rounded(x, together(inputs, block)) if activations == "int8" else x


@weight_only_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    block: int,
    activations: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, bias, ctx.bits, ctx.block, ctx.activations = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, codes, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight-through gradients for the rounding of inputs; no input is clipped."""
    x, codes, scale = ctx.saved_tensors
    weight, read = _operands(x, codes, scale, ctx.bits, ctx.block, ctx.activations)
    flat, rows = grad.reshape(-1, grad.shape[-1]), read.reshape(-1, read.shape[-1])
    inputs = x.shape[-1]
    each = (flat.T @ rows) * unpack(codes, inputs, ctx.bits)  # (out, in)
    if ctx.block:
        to_scale = in_blocks(each, ctx.block).sum(dim=1).reshape(scale.shape)
    else:
        to_scale = each.sum(dim=1, keepdim=True)
    to_bias = flat.sum(dim=0) if ctx.has_bias else None
    return grad @ weight, None, to_scale.to(scale.dtype), to_bias, None, None, None


weight_only_linear.register_autograd(_backward, setup_context=_keep)


class Reading(NamedTuple):
    """Settings in a layer's record that determine how its codes are decoded."""

    block: int
    scale: torch.dtype
    activations: str

    @staticmethod
    def of(settings: Mapping[str, Any]) -> "Reading":
        """Read them from the ``settings`` of a step or a record."""
        dtype = getattr(torch, settings["scale"])
        return Reading(settings["block"], dtype, settings["activations"])


@dataclass(frozen=True)
class WeightOnlyFormat:
    """``codes`` uint8, ``scale`` ``(out, blocks)``, and ``bias`` float32 if there is one."""

    name: str
    bits: int
    learned: tuple[str, ...] = ("scale", "bias")

    def layout(
        self, inputs: int, outputs: int, settings: Mapping[str, Any], *, bias: bool
    ) -> dict[str, TensorSpec]:
        block, dtype, _ = Reading.of(settings)
        length = padded(inputs, block)
        laid = {
            "codes": TensorSpec((outputs, length * self.bits // 8), torch.uint8),
            "scale": TensorSpec((outputs, length // block if block else 1), dtype),
        }
        return {**laid, "bias": TensorSpec((outputs,), torch.float32)} if bias else laid

    def apply(self, stored: Mapping[str, Tensor], x: Tensor, settings: Mapping[str, Any]) -> Tensor:
        block, _, activations = Reading.of(settings)
        y: Tensor = torch.ops.recpress.weight_only_linear(
            x, stored["codes"], stored["scale"], stored.get("bias"), self.bits, block, activations
        )
        return y

    def rounded_inputs(
        self,
        stored: Mapping[str, Tensor],
        x: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        """The rounded inputs that are multiplied, float32 ``(*, in)``."""
        block, _, activations = Reading.of(settings)
        return rounded(x, together(x.shape[-1], block)) if activations == "int8" else x

    def bytes_of(self, unit: Unit, settings: Mapping[str, Any]) -> int:
        """Bytes of a dense layer in this format."""
        outputs, inputs = unit.weight.shape
        laid = self.layout(inputs, outputs, settings, bias=unit.bias is not None)
        return sum(spec.dtype.itemsize * torch.Size(spec.shape).numel() for spec in laid.values())


def choose_smaller(
    units: tuple[Unit, ...],
    patterns: tuple[str, ...],
    storage: WeightOnlyFormat,
    settings: Mapping[str, Any],
) -> dict[str, Decision]:
    """Select the dense layers that become smaller in a format; give a reason for each other.

    A layer with few inputs, padded to a block, may take more bytes than before.
    """
    decisions = choose_dense(units, patterns, storage.name)
    for unit in units:
        if unit.name not in decisions or not decisions[unit.name].selected:
            continue
        size = storage.bytes_of(unit, settings)
        if size >= unit.bytes:
            larger = Reason("not_smaller", step=storage.name, bytes=size, present=unit.bytes)
            decisions[unit.name] = Decision("skipped", (larger,))
    return decisions


def stored(
    steps: Tensor, scale: Tensor, bias: Tensor | None, block: int, bits: int
) -> dict[str, Tensor]:
    """The stored tensors of a layer, from levels ``(out, in)`` and scales ``(out, blocks)``."""
    tensors = {"codes": pack(steps, block, bits), "scale": scale}
    return tensors if bias is None else {**tensors, "bias": bias.float().clone()}
