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
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

from compressors.formats import PackedTable
from compressors.lower.onnxruntime import (
    FLOAT,
    FLOAT16,
    INT32,
    INT64,
    as_matrix,
    constant,
    divided_by,
    entries,
    joined_bytes,
    kmeans_levels,
    placed,
    side_by_side,
    without_padding,
)
from compressors.tables.kmeans import KMeansFormat
from compressors.tables.product_codes import ProductCodesFormat
from compressors.tables.residual_codes import ResidualCodesFormat
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


def unpacked(codes: Any, ids: Any, count: int, width: int) -> Any:
    """Codes as int32 ``(*ids, count)``, kept packed in the engine.

    A quantized constant may only be dequantized, so codes are stored as signed numbers (int8, or
    two int4 a byte), dequantized with a scale of 1, gathered, and made whole numbers again. Left
    as uint8 they would become int32 without a word. Nibbles of two codes are taken apart by
    dividing, since there are no bit operations.
    """
    nibbles = width < 8
    one = op.Constant(value=onnx.helper.make_tensor("", FLOAT16, [], [1.0]))
    table = op.DequantizeLinear(codes, one)
    found = op.Cast(op.Gather(table, ids, axis=0), to=INT32)
    found = op.Add(found, constant(INT32, 8 if nibbles else 128))
    if width == 2:
        high = op.Div(found, constant(INT32, 4))
        low = op.Sub(found, op.Mul(high, constant(INT32, 4)))
        found = op.Concat(low, high, axis=-1)
    return without_padding(found, count, width)


def kmeans_table(codes: Any, codebook: Any, scale: Any, ids: Any, dim: int, width: int) -> Any:
    """Gather codes, then their levels."""
    return kmeans_levels(unpacked(codes, ids, dim, width), codebook, scale, ids)


def product_codes(codes: Any, codebook: Any, ids: Any, dim: int, parts: int, width: int) -> Any:
    """Gather codes, then their entries, and put the parts side by side."""
    found = entries(unpacked(codes, ids, parts, width), codebook, parts)
    return side_by_side(found, ids, dim, parts)


def residual_codes(codes: Any, codebook: Any, ids: Any, books: int, width: int) -> Any:
    """Gather codes, then their entries, and add them up."""
    found = entries(unpacked(codes, ids, books, width), codebook, books)
    return op.ReduceSum(found, op.Constant(value_ints=[-2]), keepdims=0)


def float16_table(weight: Any, ids: Any) -> Any:
    """Gather float16 rows, then widen them."""
    return op.Cast(op.Gather(weight, ids, axis=0), to=FLOAT)


def planned_place(planes: Any, ids: Any) -> Any:
    """Dequantize with scale 1, gather, and add up the bytes of each place."""
    return joined_bytes(_whole_numbers(planes, ids), int(planes.shape[1]))


def kept_place(within: Any, before: Any, ids: Any) -> Any:
    """Dequantize with scale 1, gather, and add the count before the block."""
    return placed(_whole_numbers(within, ids), before, ids)


def _whole_numbers(values: Any, ids: Any) -> Any:
    """Rows of an int8 constant as int64; behind a DequantizeLinear it stays a byte each."""
    as_float = op.DequantizeLinear(values, op.Constant(value_float=1.0))
    return op.Cast(op.Gather(as_float, ids, axis=0), to=INT64)


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
        ops.kmeans_table.default: kmeans_table,
        ops.product_codes.default: product_codes,
        ops.residual_codes.default: residual_codes,
        ops.float16_table.default: float16_table,
        ops.planned_place.default: planned_place,
        ops.kept_place.default: kept_place,
        ops.divided_by.default: divided_by,
        ops.static_int8_linear.default: static_int8_linear,
        ops.float16_linear.default: float16_linear,
    }


def retyped(table: PackedTable, name: str, values: np.ndarray) -> ir.TensorProtocol | None:
    """A stored tensor in the type and shape TensorRT's operators take; None if it has them.

    Args:
        table: whose it is.
        name: its name in the table's format.
        values: as the module stores it.
    """
    match table.storage.name, name:
        case "rowwise_int8", "scale":
            return ir.Tensor(values.reshape(-1))
        case "rowwise_int4", "codes":
            return int4_tensor(values)
        case (("kmeans" | "product_codes" | "residual_codes"), "codes"):
            return codes_tensor(values, width_of_codes(table))
    return None


def codes_tensor(values: np.ndarray, width: int) -> ir.TensorProtocol:
    """Packed codes as signed numbers: int8, each 128 lower, or int4, each 8 lower.

    An int4 holds a code of 4 bits, or two of 2 bits, which lie half a row apart.
    """
    if width == 8:
        return ir.Tensor((values ^ 128).view(np.int8))
    if width == 2:
        low, high = (values & 15, values >> 4)  # planes 0 and 1, planes 2 and 3
        even, odd = low & 3 | (high & 3) << 2, low >> 2 | high & 12
        values = even | odd << 4
    return int4_tensor(values)


def width_of_codes(table: PackedTable) -> int:
    """Bits of a stored code of a table with a codebook."""
    form = table.storage
    if not isinstance(form, KMeansFormat | ProductCodesFormat | ResidualCodesFormat):
        raise TypeError(f"{form.name!r} has no codes of a codebook")
    return form.width(table.rows, table.dim, table.settings)


def int4_tensor(planar: np.ndarray) -> ir.PackedTensor:
    """Planar nibbles, offset 8, uint8 ``(rows, half)``, as an int4 tensor ``(rows, 2 * half)``."""
    packed = packed_int4(planar)
    shape = ir.Shape((packed.shape[0], 2 * packed.shape[1]))
    return ir.PackedTensor(packed.reshape(-1), ir.DataType.INT4, shape=shape)


def packed_int4(planar: np.ndarray) -> np.ndarray:
    """Planar nibbles, offset 8, as ONNX's own int4 bytes: two's complement, low nibble first.

    ``planar`` uint8 ``(rows, half)`` -> uint8 ``(rows, half)`` standing for int4
    ``(rows, 2 * half)``.
    """
    codes = unpack(torch.from_numpy(planar), 2 * planar.shape[1]).numpy().view(np.uint8) & 15
    packed: np.ndarray = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed
