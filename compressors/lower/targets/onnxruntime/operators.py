"""Translations of compressed layers for ONNX Runtime, and the list of all translations.

Tables are in ``tables.py``, dense layers with codes of few bits in ``dense.py``.

An int8 dense layer needs explicit zero points on weight and bias, and no Relu directly after the
Gemm; otherwise ONNX Runtime silently computes it in float (``benchmarks/qdq_forms.py``).
"""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset21 as op

from compressors.lower.graph_builders import FLOAT, INT32, as_matrix, constant
from compressors.lower.targets.onnxruntime import dense as onnxruntime_dense
from compressors.lower.targets.onnxruntime import tables as onnxruntime_tables


def static_int8_linear(x: Any, codes: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
    """Q/DQ around a Gemm, in the only form that ONNX Runtime fuses to a fast QGemm.

    Inputs are uint8 with zero point 128, which gives the same levels as int8 with zero point 0.
    ONNX Runtime prepacks weights only for unsigned inputs, and does not convert inputs to unsigned
    if two layers read the same input.
    """
    zero = constant(onnx.TensorProto.UINT8, 128)
    channels = int(codes.shape[0])
    flat, restore = as_matrix(x, int(codes.shape[1]), channels)
    inputs = op.DequantizeLinear(op.QuantizeLinear(flat, input_scale, zero), input_scale, zero)
    weight_zero = constant(onnx.TensorProto.INT8, [0] * channels)
    weight = op.DequantizeLinear(codes, weight_scale, weight_zero, axis=0)
    step = op.Mul(weight_scale, input_scale)
    whole = op.Cast(op.Round(op.Div(bias, step)), to=INT32)
    bias_zero = constant(INT32, [0] * channels)
    offset = op.DequantizeLinear(whole, step, bias_zero, axis=0)
    return restore(op.Gemm(inputs, weight, offset, transB=1))


def short_float_linear(x: Any, weight: Any, bias: Any) -> Any:
    """A Gemm with weights widened at session start: CPUs have no float16 or bfloat16 Gemm."""
    flat, restore = as_matrix(x, int(weight.shape[1]), int(weight.shape[0]))
    return restore(op.Gemm(flat, op.Cast(weight, to=FLOAT), op.Cast(bias, to=FLOAT), transB=1))


def join_ids(ids: Any) -> Any:
    """Concatenate, then transpose: two operators instead of one per input."""
    rows = op.Reshape(op.Concat(*ids, axis=0), op.Constant(value_ints=[len(ids), -1]))
    return op.Transpose(rows, perm=[1, 0])


def join_rows(rows: Any) -> Any:
    """Flatten the rows of several inputs into one row."""
    width = int(rows.shape[1]) * int(rows.shape[2])
    return op.Reshape(rows, op.Constant(value_ints=[-1, width]))


def translations() -> dict[Any, Callable[..., Any]]:
    """Custom op -> the function that builds its subgraph."""
    ops = torch.ops.recpress
    return {
        **onnxruntime_tables.translations(),
        **onnxruntime_dense.translations(),
        ops.static_int8_linear.default: static_int8_linear,
        ops.float16_linear.default: short_float_linear,
        ops.bfloat16_linear.default: short_float_linear,
        ops.join_ids.default: join_ids,
        ops.join_rows.default: join_rows,
    }
