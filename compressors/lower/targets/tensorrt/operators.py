"""Translations of compressed layers and the list of all translations for TensorRT (and RTX).

Tables are in ``tables.py``, the types of stored tensors in ``types.py``. The graph determines the
precision of every operator; builders from version 11 on have no other way to set it.
"""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset21 as op

from compressors.lower.graph_builders import BFLOAT16, FLOAT, FLOAT16, as_matrix, constant
from compressors.lower.targets.tensorrt import tables as tensorrt_tables
from compressors.lower.targets.tensorrt.dense_types import signed_length
from compressors.quantize.dense.weight_only import LEVELS, SMALLEST, together


def static_int8_linear(x: Any, codes: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
    """Q/DQ around a Gemm with a float bias: TensorRT refuses an int32 DequantizeLinear.

    The bias is rounded to multiples of the int32 step, as in the module. With a very wide input
    range a step is larger than the bias, and an unrounded bias would give different scores.
    """
    flat, restore = as_matrix(x, int(codes.shape[1]), int(codes.shape[0]))
    zero = constant(onnx.TensorProto.INT8, 0)
    inputs = op.DequantizeLinear(op.QuantizeLinear(flat, input_scale, zero), input_scale)
    weight = op.DequantizeLinear(codes, weight_scale, axis=0)
    step = op.Mul(weight_scale, input_scale)
    rounded = op.Mul(op.Round(op.Div(bias, step)), step)
    return restore(op.Gemm(inputs, weight, rounded, transB=1))


def float16_linear(x: Any, weight: Any, bias: Any) -> Any:
    """A Gemm in float16 between two casts."""
    flat, restore = as_matrix(x, int(weight.shape[1]), int(weight.shape[0]))
    y = op.Gemm(op.Cast(flat, to=FLOAT16), weight, bias, transB=1)
    return op.Cast(restore(y), to=FLOAT)


def bfloat16_linear(x: Any, weight: Any, bias: Any) -> Any:
    """A Gemm in bfloat16 between two casts."""
    flat, restore = as_matrix(x, int(weight.shape[1]), int(weight.shape[0]))
    y = op.Gemm(op.Cast(flat, to=BFLOAT16), weight, bias, transB=1)
    return op.Cast(restore(y), to=FLOAT)


def weight_only_linear(
    x: Any, codes: Any, scale: Any, bias: Any, bits: int, block: int, activations: str
) -> Any:
    """A Gemm after a DequantizeLinear of its weights, whose codes ``types.py`` converts later.

    It computes in float16 if the scales are float16, as weight-only kernels do; the bias is then
    added in float32. Inputs are padded with zeros to the number of codes.
    """
    outputs, inputs = int(codes.shape[0]), int(x.shape[-1])
    flat, restore = as_matrix(x, inputs, outputs)
    if activations == "int8":
        flat = _rounded(flat, inputs, together(inputs, block))
    flat = _filled(flat, signed_length(inputs, block, bits) - inputs)
    if block:
        weight = op.DequantizeLinear(codes, scale, axis=1, block_size=block)
    else:
        weight = op.DequantizeLinear(codes, scale, axis=0)
    if int(scale.dtype) != FLOAT16:
        return restore(op.Gemm(flat, weight, bias, transB=1))
    y = op.Cast(op.Gemm(op.Cast(flat, to=FLOAT16), weight, transB=1), to=FLOAT)
    return restore(y if bias is None else op.Add(y, bias))


def _filled(x: Any, more: int) -> Any:
    """Append ``more`` zeros to each row."""
    return op.Pad(x, op.Constant(value_ints=[0, 0, 0, more])) if more else x


def _rounded(x: Any, inputs: int, width: int) -> Any:
    """``compressors.quantize.dense.weight_only.rounded`` in ONNX operators."""
    blocks = op.Reshape(_filled(x, -inputs % width), op.Constant(value_ints=[0, -1, width]))
    largest = op.ReduceMax(op.Abs(blocks), op.Constant(value_ints=[-1]), keepdims=1)
    levels = op.Constant(value_float=float(LEVELS))
    # Avoids a division by zero; a block of zeros stays zero.
    some = op.Max(largest, op.Constant(value_float=SMALLEST))
    steps = op.Round(op.Mul(blocks, op.Div(levels, some)))
    near = op.Reshape(op.Mul(steps, op.Div(largest, levels)), op.Constant(value_ints=[0, -1]))
    return op.Slice(near, [0], [inputs], [1]) if inputs % width else near


def float8_linear(x: Any, codes: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
    """Q/DQ in 8-bit floats around a Gemm with a float bias."""
    flat, restore = as_matrix(x, int(codes.shape[1]), int(codes.shape[0]))
    near = op.QuantizeLinear(flat, input_scale, output_dtype=onnx.TensorProto.FLOAT8E4M3FN)
    axis = {"axis": 0} if len(weight_scale.shape) else {}
    weight = op.DequantizeLinear(codes, weight_scale, **axis)
    return restore(op.Gemm(op.DequantizeLinear(near, input_scale), weight, bias, transB=1))


def translations() -> dict[Any, Callable[..., Any]]:
    """Custom op -> the function that builds its subgraph."""
    ops = torch.ops.recpress
    return {
        ops.weight_only_linear.default: weight_only_linear,
        ops.float8_linear.default: float8_linear,
        **tensorrt_tables.translations(),
        ops.static_int8_linear.default: static_int8_linear,
        ops.float16_linear.default: float16_linear,
        ops.bfloat16_linear.default: bfloat16_linear,
    }
