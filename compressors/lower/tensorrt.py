"""How each storage format is written down for TensorRT and TensorRT-RTX.

A quantized constant may only feed a DequantizeLinear, so tables are dequantized before their
Gather; the builder fuses the two and keeps the table packed (the audit of the engine's scratch
memory proves it). Everything is symmetric: a non-zero zero point is refused. Precision is what
the graph says, since builders from version 11 on know no other way.

Scales keep their stored type: with float16 scales a looked-up weight is rounded to float16 once,
which is what parity tolerates here and not in ONNX Runtime's graph.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import opset21 as op

from compressors.lower.onnxruntime import FLOAT, FLOAT16, as_matrix, constant, divided_by
from compressors.tables.rowwise_int4 import unpack


def rowwise_int8(codes: Any, scale: Any, ids: Any) -> Any:
    """Dequantize by row, then gather."""
    return op.Cast(op.Gather(op.DequantizeLinear(codes, scale, axis=0), ids, axis=0), to=FLOAT)


def rowwise_int4(codes: Any, scale: Any, ids: Any, dim: int) -> Any:
    """Dequantize with one block a row, then gather. ``codes`` is retyped to int4 afterwards."""
    even = dim + dim % 2
    table = op.DequantizeLinear(codes, scale, axis=1, block_size=even)
    rows = op.Gather(table, ids, axis=0)
    if dim % 2:
        rows = op.Slice(rows, [0], [dim], [-1])
    return op.Cast(rows, to=FLOAT)


def float16_table(weight: Any, ids: Any) -> Any:
    """Gather float16 rows, then widen them."""
    return op.Cast(op.Gather(weight, ids, axis=0), to=FLOAT)


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


def translations() -> dict[Any, Callable[..., Any]]:
    """Custom op -> the subgraph that stands for it."""
    ops = torch.ops.recpress
    return {
        ops.rowwise_int8.default: rowwise_int8,
        ops.rowwise_int4.default: rowwise_int4,
        ops.float16_table.default: float16_table,
        ops.divided_by.default: divided_by,
        ops.static_int8_linear.default: static_int8_linear,
        ops.float16_linear.default: float16_linear,
    }


def packed_int4(planar: np.ndarray) -> np.ndarray:
    """Planar nibbles, offset 8, as ONNX's own int4 bytes: two's complement, low nibble first.

    ``planar`` uint8 ``(rows, half)`` -> uint8 ``(rows, half)`` standing for int4
    ``(rows, 2 * half)``.
    """
    codes = unpack(torch.from_numpy(planar), 2 * planar.shape[1]).numpy().view(np.uint8) & 15
    packed: np.ndarray = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed
