"""Weight-only quantization of dense layers: blocks, codes and the custom op.

The methods ``weight_int8`` and ``weight_int4`` differ only in the number of bits of a code. A *row*
is the weights of one output. A scale is shared by ``block`` consecutive weights of a row, or by
all. Levels and clipping are as for tables (``kernels/levels.py``, ``kernels/clipping.py``). Levels
are symmetric around zero, because TensorRT supports no zero point. A *multiple* is a rounded weight
divided by its scale, an integer; a *code* is the multiple plus ``zero_code``, which is not
negative.

Codes have the layout of ONNX Runtime's MatMulNBits and of ONNX's int4: two neighbouring codes per
byte, the first in the low half. Tables have another layout (``kernels/bitpacking.py``). No target
has to repack the codes of layers. A row is padded to full blocks with the code of zero, and the
plan counts these bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.core.modules.formats import TensorSpec
from compressors.quantize.kernels.clipping import fit
from compressors.quantize.kernels.levels import (
    Clipping,
    FittedRange,
    Grid,
    ScaleType,
    nearest_multiples,
)

Block = Literal[0, 16, 32, 64, 128, 256]
"""Number of neighbouring inputs that share a scale, as MatMulNBits allows; 0: the whole row."""

Activations = Literal["float32", "int8"]

ROW_MULTIPLE = 16
"""A row without blocks is padded to a multiple of this, so that it can be split into blocks."""

MAX_MULTIPLE = 127
"""Largest multiple of a rounded input."""

SMALLEST_INPUT = 1e-36
"""A block of inputs whose largest absolute value is at most this is rounded to zero.

127 divided by a smaller number could overflow float32.
"""


def create_grid(bits: int, clipping: Clipping, scale: ScaleType) -> Grid:
    """Return the symmetric grid of codes of ``bits`` bits: ``2 ** bits - 1`` levels.

    ``clipping`` is the rule that fits scales, ``scale`` the dtype in which they are stored.
    """
    return Grid(2**bits - 1, clipping=clipping, scale=scale)


def zero_code(bits: int) -> int:
    """Return the code that represents zero."""
    return 1 << (bits - 1)


def padded_length(inputs: int, block: int) -> int:
    """Return the number of codes of a row: a multiple of the block, or of 16 without blocks."""
    unit = block or ROW_MULTIPLE
    return -(-inputs // unit) * unit


def block_length(inputs: int, block: int) -> int:
    """Return the number of inputs per block in a target's kernel.

    A row without blocks is divided into the largest blocks that the kernel supports.
    """
    if block:
        return block
    length = padded_length(inputs, block)
    return next(size for size in (128, 64, 32, ROW_MULTIPLE) if length % size == 0)


def split_into_blocks(weight: Tensor, block: int) -> Tensor:
    """Reshape weights ``(out, in)`` to blocks ``(out * blocks, block)``, padded with zeros."""
    if not block:
        return weight
    padded = F.pad(weight, (0, padded_length(weight.shape[1], block) - weight.shape[1]))
    return padded.reshape(-1, block)


def fit_scales(weight: Tensor, block: int, grid: Grid) -> Tensor:
    """Fit the scale of every block: ``(out, blocks)`` in the stored dtype.

    Args:
        weight: float, ``(out, in)``.
        block: number of inputs that share a scale; 0 for all inputs of a row.
        grid: the levels.

    Raises:
        ValueNotStorable: a scale or offset is too large for the type in which it is stored.
    """
    return fit(split_into_blocks(weight.float(), block), grid).scale.reshape(len(weight), -1)


def round_to_multiples(weight: Tensor, scale: Tensor, block: int, grid: Grid) -> Tensor:
    """Return the nearest multiple of the scale for every weight: float32 ``(out, in)``."""
    blocks = split_into_blocks(weight.float(), block)
    multiples = nearest_multiples(blocks, FittedRange(scale.reshape(-1, 1), None), grid)
    return multiples.reshape(len(weight), -1)[:, : weight.shape[1]]


def expand_scales(scale: Tensor, inputs: int, block: int) -> Tensor:
    """Repeat scales ``(out, blocks)`` for each weight: float32 ``(out, in)``.

    Without blocks, the result is ``(out, 1)``.
    """
    if not block:
        return scale.float()
    return scale.float().repeat_interleave(block, dim=1)[:, :inputs]


def pack(multiples: Tensor, block: int, bits: int) -> Tensor:
    """Encode multiples of the scale, ``(out, in)``, as stored codes.

    Returns:
        uint8 ``(out, padded inputs)`` with 8 bits, ``(out, padded inputs / 2)`` with 4.
    """
    outputs, inputs = multiples.shape
    zero = zero_code(bits)
    codes = multiples.new_full((outputs, padded_length(inputs, block)), zero, dtype=torch.uint8)
    codes[:, :inputs] = (multiples + zero).to(torch.uint8)
    return codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(codes: Tensor, inputs: int, bits: int) -> Tensor:
    """Decode stored codes to multiples of the scale, float32 ``(out, in)``."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    return codes[:, :inputs].float() - zero_code(bits)


def round_inputs(x: Tensor, block: int) -> Tensor:
    """Round inputs ``(*, in)`` to 255 levels, with one scale for each ``block`` inputs.

    These are the operations, in the same order, of ONNX Runtime's MatMulNBits at accuracy level 4
    (inputs rounded to int8).
    """
    inputs = x.shape[-1]
    blocks = F.pad(x, (0, -inputs % block)).reshape(*x.shape[:-1], -1, block)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    multiples = (
        blocks * torch.where(largest > SMALLEST_INPUT, MAX_MULTIPLE / largest, 0.0)
    ).round()
    rounded: Tensor = (multiples * (largest / MAX_MULTIPLE)).flatten(-2)[..., :inputs]
    return rounded


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
    """Compute a dense layer from its packed weights.

    ``x`` float32 ``(*, in)``, ``codes`` uint8 ``(out, padded * bits / 8)``, where ``padded`` is
    ``padded_length(in, block)``, ``scale`` ``(out, blocks)``, ``bias`` float32 ``(out,)`` ->
    float32 ``(*, out)``.
    """
    weight, layer_inputs = _convert_operands(x, codes, scale, bits, block, activations)
    return F.linear(layer_inputs, weight, bias)


def _convert_operands(
    x: Tensor, codes: Tensor, scale: Tensor, bits: int, block: int, activations: str
) -> tuple[Tensor, Tensor]:
    """Return dequantized weights, float32 ``(out, in)``, and the inputs, rounded if int8."""
    inputs = x.shape[-1]
    weight = unpack(codes, inputs, bits) * expand_scales(scale, inputs, block)
    return weight, round_inputs(x, block_length(inputs, block)) if activations == "int8" else x


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, bias, ctx.bits, ctx.block, ctx.activations = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, codes, scale)


def _compute_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Compute straight-through gradients for the rounding of inputs; no input is clipped."""
    x, codes, scale = ctx.saved_tensors
    weight, layer_inputs = _convert_operands(x, codes, scale, ctx.bits, ctx.block, ctx.activations)
    flat_grad = grad.reshape(-1, grad.shape[-1])
    flat_inputs = layer_inputs.reshape(-1, layer_inputs.shape[-1])
    inputs = x.shape[-1]
    grad_scale_by_weight = (flat_grad.T @ flat_inputs) * unpack(
        codes, inputs, ctx.bits
    )  # (out, in)
    if ctx.block:
        grad_scale = (
            split_into_blocks(grad_scale_by_weight, ctx.block).sum(dim=1).reshape(scale.shape)
        )
    else:
        grad_scale = grad_scale_by_weight.sum(dim=1, keepdim=True)
    grad_bias = flat_grad.sum(dim=0) if ctx.has_bias else None
    return grad @ weight, None, grad_scale.to(scale.dtype), grad_bias, None, None, None


weight_only_linear.register_autograd(_compute_gradients, setup_context=_setup_context)


class LayoutSettings(NamedTuple):
    """The settings of a step or of a stored layer that determine layout and computation.

    Attributes:
        block: number of inputs that share a scale; 0: all inputs of an output.
        scale: dtype of the stored scales.
        activations: ``int8`` if inputs are rounded, otherwise ``float32``.
    """

    block: int
    scale: torch.dtype
    activations: str

    @staticmethod
    def from_settings(settings: Mapping[str, Any]) -> "LayoutSettings":
        """Read them from the ``settings`` of a step or of a stored layer."""
        dtype = getattr(torch, settings["scale"])
        return LayoutSettings(settings["block"], dtype, settings["activations"])


@dataclass(frozen=True)
class WeightOnlyFormat:
    """Stores packed ``codes`` uint8, ``scale`` ``(out, blocks)``, and a float32 ``bias`` if any.

    ``learned``: names of the tensors that training may change. The protocol ``LinearFormat``
    (``core/modules/formats.py``) explains its methods, except ``rounded_inputs``, which belongs to
    the protocol in ``calibration/input_ranges.py``.
    """

    name: str
    bits: int
    learned: tuple[str, ...] = ("scale", "bias")

    def layout(
        self, inputs: int, outputs: int, settings: Mapping[str, Any], *, bias: bool
    ) -> dict[str, TensorSpec]:
        block, dtype, _ = LayoutSettings.from_settings(settings)
        length = padded_length(inputs, block)
        specs = {
            "codes": TensorSpec((outputs, length * self.bits // 8), torch.uint8),
            "scale": TensorSpec((outputs, length // block if block else 1), dtype),
        }
        return {**specs, "bias": TensorSpec((outputs,), torch.float32)} if bias else specs

    def apply(self, stored: Mapping[str, Tensor], x: Tensor, settings: Mapping[str, Any]) -> Tensor:
        block, _, activations = LayoutSettings.from_settings(settings)
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
        """Return the inputs that the weights multiply, rounded if int8: float32 ``(*, in)``."""
        block, _, activations = LayoutSettings.from_settings(settings)
        return round_inputs(x, block_length(x.shape[-1], block)) if activations == "int8" else x


def pack_tensors(
    multiples: Tensor, scale: Tensor, bias: Tensor | None, block: int, bits: int
) -> dict[str, Tensor]:
    """Return a layer's stored tensors from multiples ``(out, in)`` and scales ``(out, blocks)``."""
    tensors = {"codes": pack(multiples, block, bits), "scale": scale}
    return tensors if bias is None else {**tensors, "bias": bias.float().clone()}
