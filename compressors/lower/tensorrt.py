"""How compressed layers are written down for TensorRT and TensorRT-RTX.

Tables are in ``tensorrt_tables``, the types of stored tensors in ``tensorrt_types``. Precision is
what the graph says, since builders from version 11 on know no other way.
"""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset21 as op

from compressors.lower import tensorrt_tables
from compressors.lower.onnx_pieces import BFLOAT16, FLOAT, FLOAT16, as_matrix, constant


def static_int8_linear(x: Any, codes: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
    """Q/DQ around a Gemm with a float bias: an int32 DequantizeLinear is refused here."""
    flat, restore = as_matrix(x, int(codes.shape[1]), int(codes.shape[0]))
    zero = constant(onnx.TensorProto.INT8, 0)
    inputs = op.DequantizeLinear(op.QuantizeLinear(flat, input_scale, zero), input_scale)
    weight = op.DequantizeLinear(codes, weight_scale, axis=0)
    return restore(op.Gemm(inputs, weight, bias, transB=1))


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


def translations() -> dict[Any, Callable[..., Any]]:
    """Custom op -> the subgraph that stands for it."""
    ops = torch.ops.recpress
    return {
        **tensorrt_tables.translations(),
        ops.static_int8_linear.default: static_int8_linear,
        ops.float16_linear.default: float16_linear,
        ops.bfloat16_linear.default: bfloat16_linear,
    }
