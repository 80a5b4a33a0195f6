"""Translate dense layers for TensorRT and TensorRT-RTX, and list all translations.

``tables.py`` translates tables; ``types.py`` and ``dense_types.py`` convert stored tensors. From
TensorRT 11 on, only the types in the graph determine the precision of an operator.
"""

from collections.abc import Callable
from typing import Any

import onnx
from onnxscript import opset21 as op

from compressors.lower.custom_operators import OPS
from compressors.lower.graph_builders import BFLOAT16, FLOAT, FLOAT16, constant, flatten_to_matrix
from compressors.lower.targets.tensorrt import tables as tensorrt_tables
from compressors.lower.targets.tensorrt.dense_types import signed_length
from compressors.quantize.dense.weight_only import MAX_MULTIPLE, SMALLEST_INPUT, block_length


def static_int8_linear(x: Any, codes: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
    """Build an int8 Gemm with a float bias: TensorRT refuses an int32 DequantizeLinear.

    The bias is rounded to multiples of the scale of int32 sums (weight scale times input scale), as
    in the module. With a very wide input range this scale is larger than the bias, and an unrounded
    bias would give different scores.
    """
    flat, restore = flatten_to_matrix(x, int(codes.shape[1]), int(codes.shape[0]))
    zero = constant(onnx.TensorProto.INT8, 0)
    inputs = op.DequantizeLinear(op.QuantizeLinear(flat, input_scale, zero), input_scale)
    weight = op.DequantizeLinear(codes, weight_scale, axis=0)
    bias_scale = op.Mul(weight_scale, input_scale)
    rounded = op.Mul(op.Round(op.Div(bias, bias_scale)), bias_scale)
    return restore(op.Gemm(inputs, weight, rounded, transB=1))


def float16_linear(x: Any, weight: Any, bias: Any) -> Any:
    """Build a Gemm in float16 between two casts."""
    flat, restore = flatten_to_matrix(x, int(weight.shape[1]), int(weight.shape[0]))
    y = op.Gemm(op.Cast(flat, to=FLOAT16), weight, bias, transB=1)
    return op.Cast(restore(y), to=FLOAT)


def bfloat16_linear(x: Any, weight: Any, bias: Any) -> Any:
    """Build a Gemm in bfloat16 between two casts."""
    flat, restore = flatten_to_matrix(x, int(weight.shape[1]), int(weight.shape[0]))
    y = op.Gemm(op.Cast(flat, to=BFLOAT16), weight, bias, transB=1)
    return op.Cast(restore(y), to=FLOAT)


def weight_only_linear(
    x: Any, codes: Any, scale: Any, bias: Any, bits: int, block: int, activations: str
) -> Any:
    """Build a Gemm after a DequantizeLinear of its weights.

    ``dense_types.py`` later converts the codes to signed ones. If the scales are float16, the Gemm
    computes in float16, as weight-only kernels do, and the bias is added in float32. Inputs are
    padded with zeros to the number of codes per row.

    Args:
        x: float32 ``(*, inputs)``.
        codes: uint8 codes of the weights, packed by row.
        scale: scale of each row, or of each block of a row.
        bias: float32 ``(outputs,)`` or None.
        bits: bits of a code, 4 or 8.
        block: number of weights that share a scale; 0 for one scale per row.
        activations: ``int8`` if inputs are rounded to int8.

    Returns:
        Float32 ``(*, outputs)``.
    """
    outputs, inputs = int(codes.shape[0]), int(x.shape[-1])
    flat, restore = flatten_to_matrix(x, inputs, outputs)
    if activations == "int8":
        flat = _round_inputs(flat, inputs, block_length(inputs, block))
    flat = _pad_with_zeros(flat, signed_length(inputs, block, bits) - inputs)
    if block:
        weight = op.DequantizeLinear(codes, scale, axis=1, block_size=block)
    else:
        weight = op.DequantizeLinear(codes, scale, axis=0)
    if int(scale.dtype) != FLOAT16:
        return restore(op.Gemm(flat, weight, bias, transB=1))
    y = op.Cast(op.Gemm(op.Cast(flat, to=FLOAT16), weight, transB=1), to=FLOAT)
    return restore(y if bias is None else op.Add(y, bias))


def _pad_with_zeros(x: Any, count: int) -> Any:
    """Append ``count`` zeros to each row."""
    return op.Pad(x, op.Constant(value_ints=[0, 0, 0, count])) if count else x


def _round_inputs(x: Any, inputs: int, block_size: int) -> Any:
    """Round inputs to int8 levels and back, by blocks of ``block_size`` inputs.

    Computes the same as ``compressors.quantize.dense.weight_only.round_inputs``.
    """
    blocks = op.Reshape(
        _pad_with_zeros(x, -inputs % block_size), op.Constant(value_ints=[0, -1, block_size])
    )
    largest = op.ReduceMax(op.Abs(blocks), op.Constant(value_ints=[-1]), keepdims=1)
    levels = op.Constant(value_float=float(MAX_MULTIPLE))
    # This avoids a division by zero; a block of zeros stays zero.
    divisor = op.Max(largest, op.Constant(value_float=SMALLEST_INPUT))
    codes = op.Round(op.Mul(blocks, op.Div(levels, divisor)))
    rounded = op.Reshape(op.Mul(codes, op.Div(largest, levels)), op.Constant(value_ints=[0, -1]))
    return op.Slice(rounded, [0], [inputs], [1]) if inputs % block_size else rounded


def float8_linear(x: Any, codes: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
    """Build a Gemm whose inputs and weights are 8-bit floats; the bias is float32."""
    flat, restore = flatten_to_matrix(x, int(codes.shape[1]), int(codes.shape[0]))
    rounded = op.QuantizeLinear(flat, input_scale, output_dtype=onnx.TensorProto.FLOAT8E4M3FN)
    axis = {"axis": 0} if len(weight_scale.shape) else {}
    weight = op.DequantizeLinear(codes, weight_scale, **axis)
    return restore(op.Gemm(op.DequantizeLinear(rounded, input_scale), weight, bias, transB=1))


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the function that builds the subgraph of each custom op."""
    return {
        OPS.weight_only_linear.default: weight_only_linear,
        OPS.float8_linear.default: float8_linear,
        **tensorrt_tables.translations(),
        OPS.static_int8_linear.default: static_int8_linear,
        OPS.float16_linear.default: float16_linear,
        OPS.bfloat16_linear.default: bfloat16_linear,
    }
